"""A method with its knobs in one word: ``entropy:rate=0.2``."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

#: Between the values of a knob that has several.
BETWEEN = "/"


def spelled(name: str, method: Any) -> str:
    """A method's name and those of its knobs that differ from their default."""
    values = [(knob, getattr(method, knob.name)) for knob in knobs_of(type(method))]
    changed = [f"{knob.name}={written(value)}" for knob, value in values if value != default_of(knob)]
    return f"{name}:{','.join(changed)}" if changed else name


def knobs_of(cls: type) -> list[Field[Any]]:
    """The knobs of a method: the fields of its dataclass."""
    return [knob for knob in fields(cls) if knob.init] if is_dataclass(cls) else []


def default_of(knob: Field[Any]) -> Any:
    """The default of a knob."""
    return knob.default if knob.default_factory is MISSING else knob.default_factory()


def written(value: Any) -> str:
    """A knob's value as it stands in a word."""
    if isinstance(value, tuple):
        return BETWEEN.join(map(written, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
