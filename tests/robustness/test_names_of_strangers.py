"""Names of tensors and files with markup and escape sequences, through every command that prints them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import octavo

NAMES = ["layer[/b].weight", "\x1b]0;owned\x07.weight", "[red]\u202ex\nforged: line", "`a`|<script>&"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A source whose name and tensors' names are hostile, its profile and its artifact."""
    folder = tmp_path_factory.mktemp("hostile")
    source = folder / "[red]\x1b[31m.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(32, 32, generator=generator) for name in NAMES}, source)
    octavo.profile(source, folder / "profile", methods=["rtn"])
    octavo.compress(source, ratio=3, methods=["rtn"]).save(folder / "out")
    return {"source": source, "profile": folder / "profile", "out": folder / "out", "new": folder / "[i]\x1b[2J"}


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "out"),
        ("verify", "out"),
        ("plan", "profile", "--ratio", "4"),
        ("compress", "source", "--ratio", "3", "--methods", "rtn", "--out", "new"),
        ("frontier", "source", "--ratios", "3", "--methods", "rtn", "--out", "profile"),
    ],
    ids=lambda words: words[0],
)
def test_nothing_of_a_name_reaches_the_terminal(
    command: Callable[..., Any], hostile: dict[str, Path], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    result = command(*(hostile.get(word, word) for word in words))
    assert result.code == 0, result.err
    assert all(character.isprintable() or character == "\n" for character in result.out + result.err)
    if words[0] in ("inspect", "plan"):
        for shown in ("layer[/b].weight", "\\x1b]0;owned\\x07.weight", "[red]\\u202ex\\nforged: line"):
            assert shown in result.out
    assert not re.search(r"(?m)^forged", result.out)


@pytest.mark.parametrize("ignored", NAMES[:3])
def test_errors_too(command: Callable[..., Any], hostile: dict[str, Path], tmp_path: Path, ignored: str) -> None:
    for words in (["compress", hostile["source"], "--ratio", "1e6", "--out", tmp_path / ignored.replace("/", "")],
                  ["compress", hostile["source"], "--ratio", "3", "--ignore", f"x{ignored}", "--out", tmp_path / "o"],
                  ["inspect", tmp_path / ignored]):  # fmt: skip
        result = command(*words)
        assert result.code and all(character.isprintable() or character == "\n" for character in result.err)
        assert result.err.count("\n") == 1


def test_card_and_page_too(hostile: dict[str, Path]) -> None:
    card = (hostile["out"] / "README.md").read_text()
    page = (hostile["out"] / "report.html").read_text()
    for text in (card, page):
        assert all(character.isprintable() or character == "\n" for character in text.replace("\u00ad", ""))
    assert "<script>&" not in page and "\n# \\[red\\]" in card
    names = {row["name"] for row in json.loads((hostile["out"] / "report.json").read_text())["sites"]}
    assert names == set(NAMES)
