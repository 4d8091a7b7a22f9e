"""Runtimes other than PyTorch: how forms run in them, and what that takes on this machine."""
