"""Mutants of artifacts, and what becomes of them when they are loaded."""
