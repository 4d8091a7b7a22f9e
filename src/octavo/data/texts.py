"""Calibration texts: the user's, or the one that comes with the package."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from octavo.errors import RequestError

#: Every fourth is held back; at least eight must be left to calibrate on.
MINIMUM_TEXTS = 10


def builtin_texts() -> list[str]:
    """384 English sentences on many topics, written for this package."""
    return (files("octavo.data") / "english.txt").read_text(encoding="utf-8").splitlines()


def read_texts(path: str | Path) -> list[str]:
    """Texts of a file: one a line, or the ``text`` (or first string) of every object of a ``.jsonl``.

    Raises
    ------
    RequestError
        If the file cannot be read or holds fewer than eight texts.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: calibration data cannot be read as UTF-8 text: {error}") from error
    texts = [_text(line, path, number) if path.suffix == ".jsonl" else line for number, line in enumerate(lines, 1)]
    texts = [text.strip() for text in texts if text.strip()]
    check_texts(texts, str(path))
    return texts


def check_texts(texts: list[str], where: str) -> None:
    """Raise :class:`RequestError` if there are too few texts to calibrate on."""
    if len(texts) < MINIMUM_TEXTS:
        raise RequestError(
            f"{where}: {len(texts)} calibration texts, at least {MINIMUM_TEXTS} are needed (one a line; 256 serve well)"
        )


def _text(line: str, path: Path, number: int) -> str:
    if not line.strip():
        return ""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{path}: line {number} is not JSON: {error}") from error
    if isinstance(value, str):
        return value
    found = value.get("text") if isinstance(value, dict) else None
    if not isinstance(found, str):
        raise RequestError(f"{path}: line {number} has no string under 'text'")
    return found
