"""Facts and passages that the suite asks for: those of a file, or the built-in ones."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from octavo.errors import RequestError
from octavo.system.paths import checked, reason

#: Where the subject stands in a template.
SLOT = "{}"
_TABLES = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Fact:
    """A subject and the answer to a question about it.

    Parameters
    ----------
    template
        How the question begins, with ``{}`` for the subject: ``The capital of {} is``.
    subject, answer
        ``France`` and ``Paris``.
    label
        A group of facts that is also scored on its own, such as ``rare``; empty for none.
    """

    template: str
    subject: str
    answer: str
    label: str = ""

    def __post_init__(self) -> None:
        if self.template.count(SLOT) != 1:
            raise ValueError(f"the template {self.template!r} needs {SLOT} once, where the subject stands")
        if not self.subject.strip() or not self.answer.strip():
            raise ValueError("subject and answer must not be empty")

    @property
    def prompt(self) -> str:
        """The text that the answer follows."""
        return self.template.replace(SLOT, self.subject)


@dataclass(frozen=True)
class Passage:
    """A short text, and a sentence that sums it up."""

    text: str
    summary: str

    def __post_init__(self) -> None:
        if not self.text.strip() or not self.summary.strip():
            raise ValueError("passage and summary must not be empty")


@dataclass(frozen=True)
class Facts:
    """What a suite is made from, and where it is from."""

    facts: tuple[Fact, ...]
    passages: tuple[Passage, ...]
    title: str


def builtin_facts() -> Facts:
    """Read 100 facts that most people know, and 16 passages written for this package."""
    text = (files("octavo.verification.knowledge") / "builtin.jsonl").read_text(encoding="utf-8")
    return _collected(_lines(text, "built-in facts"), "built-in facts")


def read_facts(path: str | Path) -> Facts:
    """Read facts from a file in UTF-8.

    A line of JSON has the keys ``template``, ``subject``, ``answer`` and optionally ``label``, or ``passage`` and
    ``summary``. A ``.csv`` or ``.tsv`` file has a header with these names. Without passages the built-in ones are used.

    Raises
    ------
    RequestError
        If the file cannot be read, or holds too few facts to ask for; the error names the line.
    """
    path = checked(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: facts cannot be read as UTF-8: {reason(error)}; save the file as UTF-8") from error
    delimiter = _TABLES.get(path.suffix.lower())
    found = _collected(_lines(text, str(path)) if delimiter is None else _rows(text, delimiter, str(path)), path.name)
    answers: dict[str, set[str]] = {}
    for fact in found.facts:
        answers.setdefault(fact.template, set()).add(fact.answer)
    if not answers:
        raise RequestError(f"{path}: holds no facts; give lines with template, subject and answer")
    if lonely := [template for template, own in answers.items() if len(own) < 2]:
        raise RequestError(
            f"{path}: the template {lonely[0]!r} has a single answer, so there is none to rank it against; give facts "
            "with other answers"
        )
    return Facts(found.facts, found.passages or builtin_facts().passages, found.title)


def _lines(text: str, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of lines of JSON, each with its place."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{where}: line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{place} is not JSON: {error}; write one object per line") from error
            if not isinstance(value, dict):
                raise RequestError(f"{place} is no object; write template, subject and answer")
            yield place, value


def _rows(text: str, delimiter: str, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            given = {key.strip().lower(): value for key, value in row.items() if isinstance(key, str) and value}
            if given:
                yield f"{where}: line {reader.line_num}", given
    except csv.Error as error:
        raise RequestError(f"{where}: line {reader.line_num} cannot be read as a table: {error}") from error


def _collected(entries: Iterator[tuple[str, Mapping[str, Any]]], title: str) -> Facts:
    facts: dict[Fact, None] = {}
    passages: dict[Passage, None] = {}
    for place, entry in entries:
        try:
            if "passage" in entry:
                passages[Passage(_text(entry, "passage"), _text(entry, "summary"))] = None
            else:
                label = _text(entry, "label") if entry.get("label") else ""
                fact = Fact(_text(entry, "template"), _text(entry, "subject"), _text(entry, "answer"), label)
                facts[fact] = None
        except ValueError as error:
            raise RequestError(f"{place}: {error}; correct the line") from error
    return Facts(tuple(facts), tuple(passages), title)


def _text(entry: Mapping[str, Any], key: str) -> str:
    if not isinstance(entry.get(key), str):
        raise ValueError(f"has no text under {key!r}")
    return str(entry[key]).strip()
