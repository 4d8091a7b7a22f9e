"""The ``octavo`` command. Commands are thin: each parses its arguments, calls one Python function, and prints."""

from octavo.cli.frame import app, main

__all__ = ["app", "main"]
