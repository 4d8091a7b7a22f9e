"""Published systems rebuilt from Octavo's parts, each with a check of its claims: ``octavo reproduce NAME``."""
