"""What a study is: a published system, its claims, and the experiment that can show them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING

from octavo.system.registry import Registry

if TYPE_CHECKING:
    from octavo.recipes.frame.lab import Lab

Run = Callable[["Lab"], None]
#: The most words of a claim.
LONGEST = 12


@dataclass(frozen=True)
class Study:
    """A published system and the experiment that checks its claims; as a decorator it registers the experiment.

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
    seeds
        How many seeds a full run has.
    coarse
        Whether :meth:`Lab.train` multiplies in bfloat16 where the device does so natively. Convolutions train twice as
        fast; weights and tests stay in float32.
    run
        The experiment: it fills the lab, and judges every claim.
    """

    name: str
    _: KW_ONLY
    system: str
    source: str
    metric: str
    higher: bool
    data: str
    claims: Mapping[str, str]
    extras: Mapping[str, str] = field(default_factory=dict)
    seeds: int = 5
    coarse: bool = False
    run: Run = field(default=lambda lab: None)

    def __post_init__(self) -> None:
        for text in (*self.claims.values(), *self.extras.values()):
            if len(text.split()) > LONGEST:
                raise ValueError(f"study {self.name!r}: {text!r} has more than {LONGEST} words; shorten it")
        if twice := set(self.claims) & set(self.extras):
            raise ValueError(f"study {self.name!r}: {twice} is both a claim and an extra; rename one")

    def __call__(self, run: Run) -> Run:
        """Register the study with this experiment."""
        STUDIES.add(self.name, replace(self, run=run))
        return run


STUDIES = Registry[Study]("study", "octavo.recipes", group="octavo.studies")


def studies() -> dict[str, Study]:
    """All studies by name."""
    return STUDIES.all()


def get_study(name: str) -> Study:
    """The study of that name."""
    return STUDIES.get(name)
