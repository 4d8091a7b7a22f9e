"""Calibration texts: the user's, or the built-in text of the package."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from octavo.errors import RequestError
from octavo.system.paths import checked, reason

#: Every fourth text is held out; at least eight must remain for calibration.
MINIMUM_TEXTS = 10
#: The key or column that is read if there are several.
_KEY = "text"
_LINES = (".jsonl", ".ndjson", ".jsonlines")


def builtin_texts() -> list[str]:
    """Read 384 English sentences on many topics, written for this package."""
    return (files("octavo.sources") / "english.txt").read_text(encoding="utf-8").splitlines()


def read_texts(path: str | Path) -> list[str]:
    """Read texts from a UTF-8 file, by the suffix of its name.

    ``.jsonl`` and ``.ndjson`` have a string or an object with a string under ``text`` on every line, ``.json`` a list
    of these (or lines of them). ``.csv`` and ``.tsv`` have a header; the column ``text`` is read, or the first that
    holds more than numbers. Any other file has one text per line.

    Raises
    ------
    RequestError
        If the file cannot be read (the error names the line) or holds fewer than ten texts.
    """
    path = checked(path)
    try:
        # Some editors and spreadsheets write a byte order mark.
        content = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"{path}: calibration data cannot be read as UTF-8 text: {reason(error)}; save it as UTF-8"
        ) from error
    ending = path.suffix.lower()
    if ending in _LINES:
        found = _of_lines(content, path)
    elif ending == ".json":
        found = _of_list(content, path)
    elif ending in (".csv", ".tsv"):
        found = _of_table(content, path)
    else:
        found = iter(content.splitlines())
    texts = cleaned(text.strip() for text in found if text.strip())
    check_texts(texts, str(path))
    return texts


def cleaned(texts: Iterable[str]) -> list[str]:
    """Texts with lone surrogates, which tokenizers refuse, replaced by the replacement character."""
    return [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]


def check_texts(texts: list[str], where: str) -> None:
    """Raise :class:`RequestError` if there are too few texts to calibrate on."""
    if len(texts) < MINIMUM_TEXTS:
        raise RequestError(
            f"{where}: {len(texts)} calibration texts; at least {MINIMUM_TEXTS} are needed, one per line (256 work "
            "well)"
        )


def _of_lines(content: str, path: Path) -> Iterator[str]:
    # Only line feeds end a line of JSON: strings may contain other separators.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield _text(_parsed(line, f"{path}: line {number}"), f"{path}: line {number}")


def _of_list(content: str, path: Path) -> Iterator[str]:
    try:
        value = _parsed(content, f"{path}: the content")
    except RequestError:
        # JSON lines are often named .json; the error of the first bad line is more helpful.
        if not content.lstrip().startswith("{"):
            raise
        yield from _of_lines(content, path)
        return
    if not isinstance(value, list):
        raise RequestError(f"{path}: holds no list; write a list of strings, or of objects with a string under 'text'")
    for number, entry in enumerate(value, 1):
        yield _text(entry, f"{path}: entry {number}")


def _of_table(content: str, path: Path) -> Iterator[str]:
    header = content.split("\n", 1)[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
    # Strict: a quote that is never closed would otherwise swallow the rest of the file.
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise RequestError(f"{path}: line {reader.line_num} cannot be read as a table: {error}") from error
    names = [name.strip().lower() for name in rows[0][1]] if rows else []
    body = rows[1:]
    if _KEY in names:
        column = names.index(_KEY)
    else:
        wordy = (at for at in range(len(names)) if not all(_is_number(row[at]) for _, row in body if at < len(row)))
        column = next(wordy, -1)
    if body and column < 0:
        raise RequestError(f"{path}: no column holds text; name the text column 'text' in the first line")
    for number, row in body:
        if column >= len(row):
            raise RequestError(
                f"{path}: line {number} has {len(row)} columns, but the text is in column {column + 1}; complete the "
                "line"
            )
        yield row[column]


def _is_number(cell: str) -> bool:
    try:
        float(cell or 0)
    except ValueError:
        return False
    return True


def _parsed(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise RequestError(f"{where} is not JSON: {error}") from error
    except RecursionError as error:
        raise RequestError(f"{where} is not JSON of texts: it nests too deeply") from error


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    found = value.get(_KEY) if isinstance(value, dict) else None
    if not isinstance(found, str):
        raise RequestError(f"{where} has no string under 'text'; add one")
    return found
