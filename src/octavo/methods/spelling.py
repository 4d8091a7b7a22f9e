"""Methods read from one word with their knobs, as in plans and on command lines: ``entropy:rate=0.2``."""

from __future__ import annotations

import math
from dataclasses import Field
from typing import Any, TypeVar

from octavo.errors import RequestError
from octavo.methods.base import METHODS, Method
from octavo.methods.words import BETWEEN, default_of, knobs_of, written

T = TypeVar("T")


def get_method(word: str) -> Method:
    """The method of that name, with the knobs that the word sets.

    Raises
    ------
    RequestError
        If the method or a knob is not known, or a value is not valid.
    """
    return made_of(word, METHODS.get(word.partition(":")[0]))


def made_of(word: str, cls: type[T]) -> T:
    """An instance of a dataclass, such as a method or a cut, with the knobs that a word sets after its name.

    Raises
    ------
    RequestError
        If a knob is not known, or a value is not valid.
    """
    name, colon, knobs = word.partition(":")
    if not colon:
        return cls()
    known, values = {knob.name: knob for knob in knobs_of(cls)}, dict[str, Any]()
    for part in knobs.split(","):
        key, equals, value = part.partition("=")
        if not equals or key not in known:
            choices = ", ".join(known) or "none"
            raise RequestError(f"{word!r}: {key!r} is no knob of {name}; its knobs are: {choices}")
        if key in values:
            raise RequestError(f"{word!r}: says {key} twice; leave one of them out")
        values[key] = _read(word, known[key], value)
    return cls(**values)


def _read(word: str, knob: Field[Any], text: str) -> Any:
    """A value of the kind that the knob's default has; integers if there is none."""
    default = default_of(knob)
    try:
        if default is None:
            return tuple(_value(int, part) for part in text.split(BETWEEN))
        if isinstance(default, tuple):
            kind = type(default[0]) if len({type(value) for value in default}) == 1 else float
            return tuple(_value(kind, part) for part in text.split(BETWEEN))
        return _value(type(default), text)
    except (KeyError, ValueError) as error:
        raise RequestError(f"{word!r}: {knob.name} cannot be {text!r}; its default is {written(default)}") from error


def _value(kind: type, text: str) -> Any:
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if kind is float:
        # Defaults such as (6, 4.5) mix both; 6 and 6.0 are spelled as they were given.
        value = int(text) if text.lstrip("-").isdigit() else float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text} is not finite")
        return value
    return kind(text)
