"""What a terminal would obey is written out."""

import io

import pytest
from rich.table import Table

from octavo.cli.terminal import Terminal
from octavo.system.notes import Note, OctavoWarning, warn
from octavo.system.visible import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("layer.0.weight", "layer.0.weight"),
        ("größe × 中文", "größe × 中文"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x9b31m\x85", "\\x9b31m\\x85"),
        ("\u202egnp.exe\u2066", "\\u202egnp.exe\\u2066"),
        ("a\u2028b\u200b\ufeff", "a\\u2028b\\u200b\\ufeff"),
        ("\udc80\U000e0001", "\\udc80\\U000e0001"),
        ("a\u00a0b\u3000c", "a b c"),
        ("[red]x[/b]:smile:", "[red]x[/b]:smile:"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(text).isprintable()


@pytest.mark.parametrize("name", ["layer[/b].weight", "[red]x", "\x1b[31mred", ":smile:", "\u202eabc", "a\nb"])
def test_a_terminal_shows_names_as_they_are(name: str) -> None:
    terminal = Terminal()
    terminal.file, terminal.width = io.StringIO(), 60
    table = Table(name, "other", title=name, caption=name)
    table.add_row("cell", name)
    terminal.print(name)
    terminal.print(table)
    said = terminal.file.getvalue()
    assert said.count(visible(name)) == 5
    assert all(line.isprintable() for line in said.splitlines())


def test_warnings_too() -> None:
    with pytest.warns(OctavoWarning, match=r"^layer\\x1b\[31m: \[/b\]$"):
        warn([Note("[/b]", ["layer\x1b[31m"])], 0)
