"""Docstrings, comments, messages and documents are in plain English: no archaisms, no private jargon."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src" / "octavo").rglob("*.py"))
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
PAGES += [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name not in {"recipes.md", "decisions.md"}]

#: What to write instead of each.
BANNED = {
    r"anew": "again, from scratch",
    r"as ever": "as before",
    r"whoever|thereof|therein|herein|whosoever": "plain words",
    r"it may be that": "may",
    r"in the place of": "instead of, in place of",
    r"in (?:its|their|whose) stead": "instead",
    r"what is none|is none of|are none of": "is not one of",
    r"(?:is|are) no (?:\w+ )?(?:sites?|artifacts?|methods?|files?|paths?|numbers?|integers?|tensors?|lists?|links?)":
        "is not a, are not",
    r"(?:no|any)(?: \w+)? any more": "no longer",
    r"next to nothing": "almost nothing",
    r"worked out|works? out": "computed, determined",
    r"held-back": "held-out",
    r"ma[dk]es? up for|making up for": "compensates",
    r"(?:has|have|had) no place for": "does not use",
    r"(?:is|are) filled by nothing": "nothing fills",
    r"stranger'?s?": "untrusted",
    r"shall": "must, will",
    r"raises? what it likes|fails in whatever way": "may raise any exception",
    r"is no business of": "does not concern",
    r"have no meaning|has no meaning": "cannot be combined with",
    r"less to multiply": "fewer multiplications",
}  # fmt: skip
WORDS = {re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE): advice for pattern, advice in BANNED.items()}
#: A docstring names its subject first.
BEGINNING = re.compile(r"(?:Of|Those|The same|Whose|Thereof)\b")


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every string of several words, placeholders left out; docstrings are among them."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, node.value


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every comment."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("#: ")


def prose(page: str) -> Iterator[tuple[int, str]]:
    """Lines of a Markdown page outside of its code."""
    code = False
    for number, line in enumerate(page.splitlines(), 1):
        if line.lstrip().startswith(("```", "~~~")):
            code = not code
        elif not code:
            yield number, re.sub(r"`[^`]*`", "…", line)


def faults(path: Path, texts: Iterator[tuple[int, str]]) -> list[str]:
    """Every banned word with its place and the word to use."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {found[0]!r}: write {advice}"
        for line, text in texts
        for word, advice in WORDS.items()
        if (found := word.search(" ".join(text.split())))
    ]


@pytest.mark.parametrize("room", sorted({path.relative_to(ROOT / "src" / "octavo").parts[0] for path in SOURCES}))
def test_source_has_plain_words(room: str) -> None:
    wrong = []
    for path in SOURCES:
        if path.relative_to(ROOT / "src" / "octavo").parts[0] != room:
            continue
        source = path.read_text("utf-8")
        tree = ast.parse(source)
        # Messages of recipes belong to saved results.
        texts = docstrings(tree) if room == "recipes" else strings(tree)
        wrong += faults(path, texts) + (faults(path, comments(source)) if room != "recipes" else [])
    assert not wrong, "\n".join(wrong)


def test_docstrings_name_their_subject_first() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in SOURCES
        for line, text in docstrings(ast.parse(path.read_text("utf-8")))
        if BEGINNING.match(text)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_has_plain_words(page: Path) -> None:
    wrong = faults(page, prose(page.read_text("utf-8")))
    assert not wrong, "\n".join(wrong)
