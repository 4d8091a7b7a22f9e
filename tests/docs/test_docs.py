"""What the documentation shows is run: its Python as it stands, its command lines as far as their options go."""

import re
import shlex
import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from octavo.flows import FLOWS
from octavo.training.regimens import REGIMENS

from octavo.cuts import CUTS
from octavo.forms import FORMS
from octavo.methods import METHODS
from octavo.recipes.base import RECIPES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]

FENCE = re.compile(r"( *)(`{3,}|~{3,})\s*([\w+-]*).*")
#: Stands on a line of its own before a Python block that is shown but not run: ``<!-- not run: needs a GPU -->``.
NOT_RUN = re.compile(r"<!--\s*not run:\s*\S.*-->")
SHELLS = ("bash", "sh", "console")


@dataclass(frozen=True)
class Block:
    """The inside of a fence, and the number of the line before its first."""

    language: str
    line: int
    text: str
    run: bool


def blocks(text: str) -> Iterator[Block]:
    """Fenced blocks in order; fences may be indented, as in lists."""
    opening: re.Match[str] | None = None
    start, run, inside = 0, True, [""]
    for number, line in enumerate(text.splitlines(), 1):
        if opening is None:
            opening = FENCE.fullmatch(line)
            if opening is not None:
                start, inside = number, []
            elif line.strip():
                run = NOT_RUN.fullmatch(line.strip()) is None
        elif line.strip().startswith(opening[2]) and not line.strip().strip(opening[2][0]):
            yield Block(opening[3].lower(), start, "\n".join(inside) + "\n", run)
            opening, run = None, True
        else:
            indent = len(opening[1])
            inside.append(line[indent:] if not line[:indent].strip() else line)
    assert opening is None, f"the block that begins in line {start} is not closed"


def commands(script: str) -> Iterator[tuple[int, list[str]]]:
    """The words of every ``octavo`` command line, with its offset in the script; pipes and ``&&`` divide commands."""
    lines = iter(enumerate(script.splitlines(), 1))
    for number, line in lines:
        while line.endswith("\\"):
            line = line[:-1] + " " + next(lines, (0, ""))[1]
        lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # the output of a command, with an apostrophe in it
            continue
        command: list[str] = []
        for word in [*words, ";"]:
            if word and not word.strip("();<>|&"):
                if command[:1] == ["octavo"]:
                    yield number, command
                command = []
            else:
                # Variables set for one command stand before it.
                command += [] if not command and re.fullmatch(r"\w+=.*", word) else [word]


def unknown_words(root: Any, words: list[str]) -> tuple[list[str], list[str]]:
    """Names of the command that ``words`` call, and those of its words that it does not know.

    ``root`` is the command of a typer app. Only subcommands and long options are looked at.
    """
    command, names, unknown = root, [], []
    for word in words:
        if word == "--":
            break
        if word.startswith("--"):
            known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
            if word.partition("=")[0] not in known | {"--help"}:
                unknown.append(word)
        elif getattr(command, "commands", None) and not word.startswith("-"):
            if word not in command.commands:
                return names, [*unknown, word]
            command, names = command.commands[word], [*names, word]
    return names, unknown


def python_pages() -> list[Any]:
    return [
        pytest.param(page, id=page.relative_to(ROOT).as_posix())
        for page in PAGES
        if any(block.language == "python" for block in blocks(page.read_text(encoding="utf-8")))
    ]


def command_lines() -> list[Any]:
    return [
        pytest.param(words, id=f"{page.relative_to(ROOT).as_posix()}:{block.line + offset}")
        for page in PAGES
        for block in blocks(page.read_text(encoding="utf-8"))
        if block.language in SHELLS
        for offset, words in commands(block.text)
    ]


@pytest.fixture
def own_registries() -> Iterator[None]:
    """Let a page register parts without other tests finding them."""
    with ExitStack() as stack:
        for registry in (CUTS, FLOWS, FORMS, METHODS, RECIPES, REGIMENS):
            stack.enter_context(registry.temporary())
        yield


@pytest.mark.usefixtures("own_registries")
@pytest.mark.parametrize("page", python_pages())
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(f"page_{re.sub(r'[^a-z0-9]', '_', page.stem.lower())}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses and pickle look their module up
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "python" and block.run:
            # Leading newlines, so that a traceback names the line of the page.
            code = compile("\n" * block.line + block.text, str(page), "exec", dont_inherit=True)
            exec(code, module.__dict__)


@pytest.mark.parametrize("words", command_lines())
def test_command_lines_name_what_exists(words: list[str]) -> None:
    from typer.main import get_command
    from typer.testing import CliRunner

    from octavo.cli import app

    names, unknown = unknown_words(get_command(app), words[1:])
    assert not unknown, f"`{shlex.join(words)}`: {' '.join(['octavo', *names])} does not know {', '.join(unknown)}"
    result = CliRunner().invoke(app, [*names, "--help"])
    assert result.exit_code == 0, result.output


def test_blocks_are_told_apart() -> None:
    text = (
        "a\n```python\nx = 1\n```\n<!-- not run: slow -->\n\n~~~~ python\n```\n~~~~\n"
        "1. b\n   ```bash\n   octavo\n\n   ```\n"
    )
    found = list(blocks(text))
    assert [(block.language, block.line, block.text, block.run) for block in found] == [
        ("python", 2, "x = 1\n", True),
        ("python", 7, "```\n", False),
        ("bash", 11, "octavo\n\n", True),
    ]
    with pytest.raises(AssertionError, match="line 1 is not closed"):
        list(blocks("```python\nx = 1\n"))


def test_command_lines_are_found() -> None:
    script = (
        "pip install octavo\n$ octavo inspect out  # what is in it\n"
        "A=1 octavo plan P \\\n  --ratio 12 | tee x && octavo methods\n"
        "octavo compress m --keep 'head*=8 bit' --ignore *.x > log\nIt's an output\n"
    )
    assert list(commands(script)) == [
        (2, ["octavo", "inspect", "out"]),
        (3, ["octavo", "plan", "P", "--ratio", "12"]),
        (3, ["octavo", "methods"]),
        (5, ["octavo", "compress", "m", "--keep", "head*=8 bit", "--ignore", "*.x"]),
    ]


def test_unknown_words_are_found() -> None:
    import typer
    from typer.main import get_command

    app = typer.Typer()

    @app.callback()
    def main(quiet: bool = False) -> None: ...

    @app.command()
    def compress(source: str, ratio: float = 8, resume: bool = typer.Option(True, "--resume/--afresh")) -> None: ...

    @app.command("methods")
    def list_methods() -> None: ...

    root = get_command(app)
    fine = ["--quiet", "compress", "methods", "--ratio=12", "--afresh", "--help"]
    assert unknown_words(root, fine) == (["compress"], [])
    assert unknown_words(root, ["compress", "m", "--ration", "8"]) == (["compress"], ["--ration"])
    assert unknown_words(root, ["methods", "--ratio", "8"]) == (["methods"], ["--ratio"])
    assert unknown_words(root, ["squeeze", "m"]) == ([], ["squeeze"])
    assert unknown_words(root, ["methods", "--", "--ratio"]) == (["methods"], [])
