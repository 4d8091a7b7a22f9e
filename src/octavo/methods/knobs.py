"""Reading a setting's values, with errors that name the method and the invalid value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octavo.errors import RequestError
from octavo.methods.base import Setting

#: The limit of float32, in which weights are encoded.
_LARGEST = 3e38


def whole(method: str, setting: Setting, knob: str, low: int, high: int | None = None) -> int:
    """The integer at ``knob``, at least ``low`` and at most ``high``."""
    value = _given(method, setting, knob)
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise RequestError(f"{method}: {knob} is {value!r} in the setting {setting}; it must be an integer {limits}")
    return value


def real(method: str, setting: Setting, knob: str, low: float, high: float = _LARGEST) -> float:
    """The number at ``knob``, at least ``low`` and below ``high``."""
    value = _given(method, setting, knob)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < high:
        limits = f"at least {low:g} and below {high:g}"
        raise RequestError(f"{method}: {knob} is {value!r} in the setting {setting}; it must be a number {limits}")
    return float(value)


def flag(method: str, setting: Setting, knob: str, usual: bool = False) -> bool:
    """Whether ``knob`` is set (``true`` or ``1``); ``usual`` if the setting does not have it."""
    value = setting.get(knob, usual)
    known = {True: True, False: False, "true": True, "false": False}
    if not isinstance(value, bool | int | str) or value not in known:
        raise RequestError(f"{method}: {knob} is {value!r} in the setting {setting}; it must be true or false")
    return known[value]


def choice(method: str, setting: Setting, knob: str, known: Sequence[str]) -> str:
    """The word at ``knob``, one of ``known``."""
    value = _given(method, setting, knob)
    if value not in known:
        raise RequestError(f"{method}: {knob} is {value!r} in the setting {setting}; choose from {', '.join(known)}")
    return str(value)


def _given(method: str, setting: Setting, knob: str) -> Any:
    if knob not in setting:
        raise RequestError(f"{method}: the setting {setting} has no {knob!r}; add it")
    return setting[knob]
