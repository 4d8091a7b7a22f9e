"""Which choices of a request mean something, for which target and beside which others.

A choice that has no meaning is refused by its name, never dropped. What depends on the source is checked where that is
open (:mod:`octavo.opening`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from octavo.allocation.budget import TARGETS
from octavo.errors import RequestError

SPEED = "speed"
#: What a budget of speed reads, and no other does.
_OF_SPEED = ("speedup", "latency", "shape")
#: What it does not read: its methods, preset and curvature are its own, and it runs here, on the whole model.
_NOT_OF_SPEED = ("ratio", "size", "bits", "methods", "preset", "plan", "curvature", "memory", "executor", "profile")
#: What a saved profile was made with.
OF_PROFILE = ("data", "objective", "curvature", "methods", "preset", "ignore", "keep", "seed", "target")


def named(choices: Mapping[str, Any], usual: Mapping[str, Any] | None = None) -> list[str]:
    """Names of the choices that were made: those that are neither None nor what is usual."""
    return [name for name, value in choices.items() if value is not None and value != (usual or {}).get(name)]


def check_target(target: str, made: Collection[str]) -> None:
    """Refuse a target that is not known, and choices that have no meaning for it.

    Parameters
    ----------
    made
        Names of the choices that were made.

    Raises
    ------
    RequestError
        Naming them.
    """
    if target not in (*TARGETS, SPEED):
        raise RequestError(f"target {target!r} is not known; choose from {', '.join((*TARGETS, SPEED))}")
    odd = [name for name in made if name in (_NOT_OF_SPEED if target == SPEED else _OF_SPEED)]
    if odd and target == SPEED:
        raise RequestError(
            f"for speed, {_listed(odd)} no meaning: leave that out, and give speedup or latency alone as the budget"
        )
    if odd:
        raise RequestError(
            f"for {target}, {_listed(odd)} no meaning: leave that out, or compress for speed (--for speed, "
            "target='speed')"
        )


def check_kinds(
    methods: Sequence[str] | None, ignore: Iterable[str], keep: Mapping[str, str] | None, seed: int
) -> None:
    """Refuse what is of another kind than it has to be, such as one string where several are meant.

    Raises
    ------
    RequestError
        Naming the choice.
    """
    for name, value in (("methods", methods), ("ignore", ignore)):
        if isinstance(value, str) or not (value is None or isinstance(value, Iterable)):
            raise RequestError(f"{name} is {value!r}; give a list of strings, such as [{str(value)!r}]")
    if keep is not None and not isinstance(keep, Mapping):
        raise RequestError(
            f"keep is {keep!r}; give a mapping of globs to choices, such as {{'embeddings.*': 'float16'}}"
        )
    for glob, spec in (keep or {}).items():
        if not isinstance(glob, str) or not isinstance(spec, str):
            raise RequestError(f"keep[{glob!r}] is {spec!r}; write both as strings, such as 'gptq:bits=4,group=64'")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise RequestError(f"seed {seed!r} is no integer; choose one, such as 0")
    if not -(2**63) <= seed < 2**63:
        raise RequestError(f"seed {seed} does not fit 64 bits; choose a smaller one")


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last} have" if first else f"{last} has"
