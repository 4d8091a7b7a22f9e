"""The ``octavo`` command. Commands are thin: each parses its words, calls one Python function, and prints."""

from octavo.cli import exporting, folding, looking, reproducing  # noqa: F401  (commands register themselves)
from octavo.cli.frame import app, main

__all__ = ["app", "main"]
