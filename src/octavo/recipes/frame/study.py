"""What a study is: a published system, its claims, and the experiment that can show them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from octavo.system.registry import Registry

if TYPE_CHECKING:
    from octavo.recipes.frame.lab import Lab

#: The most words of a claim.
LONGEST = 12


@dataclass(frozen=True)
class Study:
    """A published system and the experiment that checks its claims.

    Parameters
    ----------
    name
        What users write.
    system, source
        Its name and publication.
    metric
        What is measured, with its unit.
    higher
        Whether more of it is better.
    data
        The data of the full run, and where to get it.
    claims
        Published statements by a short key, at most 12 words each.
    extras
        Statements of our own.
    run
        The experiment: it fills the lab, and judges every claim.
    seeds
        How many seeds a full run has.
    """

    name: str
    system: str
    source: str
    metric: str
    higher: bool
    data: str
    claims: Mapping[str, str]
    run: Callable[[Lab], None]
    extras: Mapping[str, str] = field(default_factory=dict)
    seeds: int = 5

    def __post_init__(self) -> None:
        for text in (*self.claims.values(), *self.extras.values()):
            if len(text.split()) > LONGEST:
                raise ValueError(f"study {self.name!r}: {text!r} has more than {LONGEST} words; shorten it")
        if twice := set(self.claims) & set(self.extras):
            raise ValueError(f"study {self.name!r}: {twice} is both a claim and an extra; rename one")


STUDIES = Registry[Study]("study", "octavo.recipes", group="octavo.studies")


def study(
    name: str,
    *,
    system: str,
    source: str,
    metric: str,
    higher: bool,
    data: str,
    claims: Mapping[str, str],
    extras: Mapping[str, str] | None = None,
    seeds: int = 5,
) -> Callable[[Callable[[Lab], None]], Callable[[Lab], None]]:
    """Register an experiment under the name that users write; parameters as in :class:`Study`."""

    def register(run: Callable[[Lab], None]) -> Callable[[Lab], None]:
        STUDIES.add(name, Study(name, system, source, metric, higher, data, claims, run, extras or {}, seeds))
        return run

    return register


def studies() -> dict[str, Study]:
    """All studies by name."""
    return STUDIES.all()


def get_study(name: str) -> Study:
    """The study of that name."""
    return STUDIES.get(name)
