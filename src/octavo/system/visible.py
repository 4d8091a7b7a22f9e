"""Text for display: control sequences and invisible characters are written as escapes."""

from __future__ import annotations

import unicodedata


def visible(value: object) -> str:
    r"""One line that is safe to print in a terminal, whatever the text contains.

    Names come from untrusted files. Line breaks, escape sequences, the other control characters, characters that turn
    the direction of writing and lone surrogates are written as escapes, such as ``\n`` and ``\x1b``. Spaces of other
    widths become plain ones.
    """
    return "".join(c if c.isprintable() else _written_out(c) for c in str(value))


def _written_out(character: str) -> str:
    if unicodedata.category(character) == "Zs":
        return " "
    return character.encode("unicode_escape").decode("ascii")
