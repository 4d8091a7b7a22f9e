"""Runtimes that run forms."""
