"""Typed records and JSON: plain values of a record, and a record of plain values that anybody may have written."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")

_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
}


#: Characters of a wrong value that an error shows.
_SHOWN = 40


class FieldError(ValueError):
    """A value that a record cannot hold: ``quality.value is "x"; a number is needed``."""


def plain_json(value: Any) -> Any:
    """A value as JSON has it: records and mappings become objects, tuples lists, paths texts.

    Numbers that are not finite become None, since JSON has none of them.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def record_of(kind: type[Record], value: Any, where: str = "") -> Record:
    """Read a record from JSON values, each of which must have the type of its field.

    Keys that the record does not know are ignored; keys that are missing must have a default.

    Parameters
    ----------
    kind
        A dataclass whose fields are annotated with numbers, texts, enumerations of texts, other dataclasses, tuples,
        mappings with texts as keys, unions of these, or ``Any``.
    value
        What :func:`json.loads` gave.
    where
        The place of ``value`` in the file, for messages.

    Raises
    ------
    FieldError
        At the first value that is missing or of another type.
    """
    if not isinstance(value, dict):
        raise _unfit(value, "an object", where)
    hints, found = _hints(kind), dict[str, Any]()  # type: ignore[arg-type]
    for field in fields(kind):  # type: ignore[arg-type]
        place = f"{where}.{field.name}" if where else field.name
        if field.name in value:
            found[field.name] = _read(hints[field.name], value[field.name], place)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise FieldError(f"{place} is missing")
    try:
        return kind(**found)
    except FieldError:
        raise
    except ValueError as error:
        raise FieldError(f"{where}: {error}" if where else str(error)) from error


@lru_cache(maxsize=256)
def _hints(kind: Hashable) -> dict[str, Any]:
    return get_type_hints(kind)


def _read(hint: Any, value: Any, where: str) -> Any:
    """A value as a field of this type holds it."""
    origin = get_origin(hint)
    if hint is Any:
        return value
    if is_dataclass(hint):
        return record_of(hint, value, where)  # type: ignore[arg-type]
    if origin in (Union, UnionType):
        return _one_of(get_args(hint), value, where)
    if origin is tuple:
        return _tuple(get_args(hint), value, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise _unfit(value, "an object", where)
        return {key: _read(get_args(hint)[1], item, f"{where}[{key[:_SHOWN]!r}]") for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        if value not in list(hint):
            raise _unfit(value, f"one of {', '.join(hint)}", where)
        return hint(value)
    if not _is(hint, value):
        raise _unfit(value, _WORDS[hint], where)
    return value


def _one_of(options: Sequence[Any], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    plain = [option for option in options if option in _WORDS]
    if any(_is(option, value) for option in plain):
        return value
    rest = [option for option in options if option not in _WORDS]
    if not rest:
        raise _unfit(value, " or ".join(_WORDS[option] for option in options), where)
    return _read(rest[0], value, where)


def _tuple(items: Sequence[Any], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _unfit(value, "a list", where)
    hints = [items[0]] * len(value) if items[-1] is Ellipsis else items
    if len(hints) != len(value):
        raise _unfit(value, f"a list of {len(hints)}", where)
    return tuple(
        _read(hint, item, f"{where}[{place}]") for place, (hint, item) in enumerate(zip(hints, value, strict=True))
    )


def _is(kind: Any, value: Any) -> bool:
    """Whether a JSON value has a plain type; an integer is a number too, unless no number holds it."""
    if kind is not float:
        return type(value) is kind
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def _unfit(value: Any, wanted: str, where: str) -> FieldError:
    if isinstance(value, dict | list):
        shown = "an object" if isinstance(value, dict) else "a list"
    else:
        shown = json.dumps(value)[:_SHOWN]
    return FieldError(f"{where or 'the file'} is {shown}; {wanted} is needed")
