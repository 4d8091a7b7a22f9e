"""Which methods a request takes: those of its preset, or those that it names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from octavo.errors import RequestError
from octavo.methods.base import METHODS, NAMED, PRESETS, Method
from octavo.methods.spelling import get_method

#: The methods of `default`, without data.
DATA_FREE = "data-free"


@dataclass(frozen=True)
class Usable:
    """Which methods can be used at all.

    Parameters
    ----------
    fits
        Whether a method can be used.
    why_not
        What is said of one that cannot: ``has no setting that runs from memory``.
    """

    fits: Callable[[type[Method]], bool] = lambda cls: True
    why_not: str = ""


_ALL = Usable()
#: Methods whose forms Octavo's own artifact holds.
ORDINARY = Usable(lambda cls: not cls.runtimes, "is for the formats of another runtime (octavo methods --kind targets)")


def of_runtime(target: str) -> Usable:
    """The methods whose forms are formats of another runtime."""
    return Usable(lambda cls: cls.dense or target in cls.runtimes, f"has no form in the formats of {target}")


def methods() -> dict[str, type[Method]]:
    """All registered methods by name."""
    return METHODS.all()


def dense_method() -> Method:
    """The method that keeps matrices as they are."""
    return next(cls() for cls in methods().values() if cls.dense)


def plain_method() -> Method:
    """The method of which one setting for all sites is what every plan must beat."""
    return next(cls() for cls in methods().values() if cls.plain)


def dense_names() -> frozenset[str]:
    """Names of the methods that keep matrices as they are."""
    return frozenset(name for name, cls in methods().items() if cls.dense)


def select_methods(
    chosen: Sequence[str | Method] | None, preset: str, usable: Usable = _ALL, *, changes: bool = False
) -> list[Method]:
    """The methods of a preset, or those chosen, of the usable ones.

    Parameters
    ----------
    chosen
        Names of methods, with knobs or without, names of families, and methods themselves.
    preset
        ``fast``, ``default``, ``best`` or ``data-free``.
    usable
        Which methods can be used at all.
    changes
        Whether what is compressed are differences to a base.

    Raises
    ------
    RequestError
        If the preset or a name is not known, or a method that is named cannot be used.
    """
    if preset not in (*PRESETS, DATA_FREE):
        raise RequestError(f"preset {preset!r} is not known; choose from {', '.join((*PRESETS, DATA_FREE))}")
    known = {name: cls for name, cls in methods().items() if usable.fits(cls)}
    if chosen is None:
        allowed = PRESETS[: PRESETS.index("default" if preset == DATA_FREE else preset) + 1]
        return [cls() for cls in known.values() if cls.preset in allowed and (changes or not cls.changes)]
    if not chosen:
        raise RequestError("methods: the list is empty; name a method, or leave it out to use those of the preset")
    found = {str(method): method for word in chosen for method in _of_word(word, known, usable, changes)}
    return list(found.values())


def _of_word(word: str | Method, known: dict[str, type[Method]], usable: Usable, changes: bool) -> list[Method]:
    """The one method that a word names, or those of a family."""
    if isinstance(word, Method):
        if METHODS.all().get(word.name) is not type(word):
            raise RequestError(f"{type(word).__qualname__} is not a registered method; put @method(...) on its class")
        _refuse_unfit(word.name, known, usable)
        return [word]
    name, colon, _ = word.partition(":")
    if colon and name in METHODS:
        _refuse_unfit(name, known, usable)
        return [get_method(word)]
    family = [
        cls for cls in known.values() if word == cls.family and cls.preset != NAMED and (changes or not cls.changes)
    ]
    matches = [cls() for cls in known.values() if word == cls.name or cls in family]
    if not matches:
        _refuse_unfit(word, known, usable)
        families = sorted({cls.family for cls in known.values()})
        raise RequestError(
            f"{word!r} is neither a method nor a family; choose from {', '.join(known)}, or from the families "
            f"{', '.join(families)}"
        )
    return matches


def _refuse_unfit(name: str, known: dict[str, type[Method]], usable: Usable) -> None:
    """Refuse a method, or a family, of which nothing can be used here."""

    def words(classes: Iterable[type[Method]]) -> set[str]:
        return {word for cls in classes for word in (cls.name, cls.family)}

    if name in words(methods().values()) - words(known.values()):
        raise RequestError(f"method {name!r} {usable.why_not}; choose from {', '.join(known)}")
