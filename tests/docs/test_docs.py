"""The documentation is executed: its Python in full, its command lines as far as their commands and options.

Links, and the pages that are made from the code, are checked too. All Python blocks find the same small model, its
texts and one artifact of it in their folder, so that no page has to make its own.
"""

import doctest
import importlib
import importlib.util
import inspect
import re
import shlex
import shutil
import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import octavo
from octavo.cuts import CUTS
from octavo.flows import FLOWS
from octavo.forms import FORMS
from octavo.methods import METHODS
from octavo.recipes.frame import STUDIES
from octavo.targets import TARGETS
from octavo.training.regimens import REGIMENS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

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
            _, command, _ = command.resolve_command(typer.Context(command), [word])
            names = [*names, word]
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
        for registry in (CUTS, FLOWS, FORMS, METHODS, REGIMENS, STUDIES, TARGETS):
            stack.enter_context(registry.temporary())
        yield


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages speak of: ``path/to/model``, texts in two files, and the artifact ``folded``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("workplace")
    model = folder / "path" / "to" / "model"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).eval().save_pretrained(model)
    words = [f"word{k}" for k in range(62)]
    tokenizer = Tokenizer(WordLevel({word: k for k, word in enumerate(["[PAD]", "[UNK]", *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special).save_pretrained(model)
    for name in ("sentences.txt", "held-out.txt"):
        drawn = torch.randint(0, len(words), (48, 12)).tolist()
        (folder / name).write_text("\n".join(" ".join(words[k] for k in row) for row in drawn) + "\n", encoding="utf-8")
    done = octavo.compress(model, ratio=4, data=folder / "sentences.txt", preset="fast", progress=False)
    done.save(folder / "folded", progress=False)
    return folder


@pytest.mark.filterwarnings("ignore::octavo.OctavoWarning")
@pytest.mark.usefixtures("own_registries")
@pytest.mark.parametrize("page", python_pages())
def test_python_blocks_run(page: Path, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(f"page_{re.sub(r'[^a-z0-9]', '_', page.stem.lower())}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses and pickle look their module up
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "python" and block.run:
            # Leading newlines, so that a traceback names the line of the page.
            code = compile("\n" * block.line + block.text, str(page), "exec", dont_inherit=True)
            exec(code, module.__dict__)


def modules_with_examples() -> list[str]:
    """Modules whose docstrings have examples."""
    source = Path(octavo.__file__).parent
    return sorted(
        ".".join(file.relative_to(source.parent).with_suffix("").parts).removesuffix(".__init__")
        for file in source.rglob("*.py")
        if ">>> " in file.read_text(encoding="utf-8")
    )


@pytest.mark.filterwarnings("ignore::octavo.OctavoWarning")
@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings_run(
    name: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.attempted and not found.failed


@pytest.mark.parametrize("name", [name for name in octavo.__all__ if name.islower()])
def test_every_verb_has_an_example(name: str) -> None:
    assert ">>> " in (inspect.getdoc(getattr(octavo, name)) or ""), f"octavo.{name}: show how it is called"


@pytest.mark.parametrize("words", command_lines())
def test_command_lines_name_what_exists(words: list[str]) -> None:
    from typer.main import get_command
    from typer.testing import CliRunner

    from octavo.cli import app

    names, unknown = unknown_words(get_command(app), words[1:])
    assert not unknown, f"`{shlex.join(words)}`: {' '.join(['octavo', *names])} does not know {', '.join(unknown)}"
    result = CliRunner().invoke(app, [*names, "--help"])
    assert result.exit_code == 0, result.output


def targets(text: str) -> Iterator[str]:
    """Where the links and pictures of a page lead, fenced blocks left out."""
    fenced = re.sub(r"^( *)(`{3,}|~{3,})[^\n]*\n.*?^ *\2[`~]*$", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", fenced))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in targets(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.relative_to(ROOT)} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{target}: no such heading"


def test_every_page_is_in_the_table_of_contents() -> None:
    index, studies = ROOT / "docs" / "README.md", ROOT / "docs" / "recipes.md"
    linked = {
        (index.parent / target.partition("#")[0]).resolve()
        for listing in (index, studies)
        for target in targets(listing.read_text("utf-8"))
    }
    missing = {page for page in PAGES if page.is_relative_to(ROOT / "docs")} - linked - {index}
    assert not missing, f"docs/README.md does not link to {sorted(page.name for page in missing)}"


def test_reference_pages_are_those_of_the_code() -> None:
    folder = ROOT / "docs" / "reference"
    spec = importlib.util.spec_from_file_location("reference_generate", folder / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    old = [name for name, made in generate.PAGES.items() if (folder / name).read_text(encoding="utf-8") != made()]
    assert not old, f"{old} in docs/reference are not those of the code; run `make reference`"
    # The list of commands is read without importing them, and then knows no options.
    assert all("--help" in part or "| `" in part for part in (folder / "commands.md").read_text().split("\n## ")[1:])


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


def test_links_are_found() -> None:
    text = "# A [b](x.md#the-end) `[c](no)`\n```python\nx[0](1)\n```\n![d](e.svg)\n## The end: 1 − cosine\n"
    assert list(targets(text)) == ["x.md#the-end", "e.svg"]
    assert "the-end-1--cosine" in anchors(text)


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
