"""Methods with their knobs in one word, as they stand in plans and on command lines: ``entropy:rate=0.2``."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any

from octavo.errors import RequestError
from octavo.methods.base import METHODS, Method

#: Between the values of a knob that has several.
_BETWEEN = "/"


def spelled(method: Method) -> str:
    """The method's name and those of its knobs that are not at their default.

    Equal methods have equal words, others have different ones, and :func:`get_method` reads them back.

    Examples
    --------
    >>> from octavo.methods.quantize.entropy import Entropy
    >>> spelled(Entropy()), spelled(Entropy(rate=0.2, levels=(4, 2.5)))
    ('entropy', 'entropy:rate=0.2,levels=4/2.5')
    """
    values = {knob.name: getattr(method, knob.name) for knob in _knobs(type(method))}
    changed = [f"{knob.name}={_written(values[knob.name])}" for knob in _knobs(type(method)) if _moved(knob, values)]
    return f"{method.name}:{','.join(changed)}" if changed else method.name


def get_method(word: str) -> Method:
    """The method of that name, with the knobs that the word sets.

    Raises
    ------
    RequestError
        If there is no such method, or it has no such knob or cannot take its value.
    """
    name, colon, knobs = word.partition(":")
    cls = METHODS.get(name)
    if not colon:
        return cls()
    known, values = {knob.name: knob for knob in _knobs(cls)}, dict[str, Any]()
    for part in knobs.split(","):
        key, equals, value = part.partition("=")
        if not equals or key not in known:
            choices = ", ".join(known) or "none"
            raise RequestError(f"{word!r}: {key!r} is no knob of {name}; its knobs are: {choices}")
        if key in values:
            raise RequestError(f"{word!r}: says {key} twice; leave one of them out")
        values[key] = _read(word, known[key], value)
    return cls(**values)


def listed(text: str) -> list[str]:
    """Methods and families in a line; commas stand between them, and between the knobs of each.

    Examples
    --------
    >>> listed("gptq:order=false,symmetric=true,alds")
    ['gptq:order=false,symmetric=true', 'alds']
    """
    words: list[str] = []
    for part in filter(None, map(str.strip, text.split(","))):
        if words and ":" in words[-1] and "=" in part and ":" not in part:
            words[-1] += f",{part}"
        else:
            words.append(part)
    return words


def _knobs(cls: type[Method]) -> list[Field[Any]]:
    # A method without knobs need not be a dataclass of its own.
    return [knob for knob in fields(cls) if knob.init] if hasattr(cls, "__dataclass_fields__") else []  # type: ignore[arg-type]


def _default(knob: Field[Any]) -> Any:
    return knob.default if knob.default_factory is MISSING else knob.default_factory()


def _moved(knob: Field[Any], values: dict[str, Any]) -> bool:
    return bool(values[knob.name] != _default(knob))


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return _BETWEEN.join(map(_written, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read(word: str, knob: Field[Any], text: str) -> Any:
    """A value of the kind that the knob's default has."""
    default = _default(knob)
    try:
        if isinstance(default, tuple):
            kind = type(default[0]) if len({type(value) for value in default}) == 1 else float
            return tuple(_value(kind, part) for part in text.split(_BETWEEN))
        return _value(type(default), text)
    except (KeyError, ValueError) as error:
        raise RequestError(f"{word!r}: {knob.name} cannot be {text!r}; its default is {_written(default)}") from error


def _value(kind: type, text: str) -> Any:
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if kind is float:
        # Defaults such as (6, 4.5) mix both; 6 and 6.0 are spelled as they were given.
        return int(text) if text.lstrip("-").isdigit() else float(text)
    return kind(text)
