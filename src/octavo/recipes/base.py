"""The base of recipes: a small experiment that checks one system's published claim."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.system.registry import Registry

#: The folder of trained models and downloaded data of recipes.
CACHE = Path(os.environ.get("OCTAVO_CACHE", Path.home() / ".cache" / "octavo")) / "recipes"


@dataclass(frozen=True)
class Arm:
    """One of the compared variants.

    Parameters
    ----------
    name
        The treatment and its size.
    bytes
        Bytes of the artifact's files, from :meth:`Trial.through_file`; 0 if nothing is stored.
    values
        The metric, one value per seed.
    also
        Other figures for table columns, by name.
    """

    name: str
    bytes: int
    values: tuple[float, ...]
    also: dict[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean over all seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds, None of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def shown(self) -> str:
        """Mean and spread, for texts."""
        return f"{self.mean:.4g}" if self.spread is None else f"{self.mean:.4g} ± {self.spread:.2g}"


@dataclass(frozen=True)
class Difference:
    """The difference of two arms, seed by seed.

    Parameters
    ----------
    mean
        Mean of the first minus the second.
    error
        Standard error of that mean, None of a single run.
    """

    mean: float
    error: float | None

    @property
    def surely(self) -> float:
        """A lower bound: the mean minus two standard errors."""
        return self.mean - 2 * (self.error or 0.0)

    def __str__(self) -> str:
        return f"{self.mean:+.3g}" if self.error is None else f"{self.mean:+.3g} ± {self.error:.2g}"


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """The difference of two arms: means of pairs with the same seed; a single value is compared with all others.

    One rule for all recipes: something is better if the difference is ``surely`` above zero, and as good if it is
    ``surely`` no lower than a margin, which its check states.
    """
    count = max(len(ours), len(theirs))
    if {len(ours), len(theirs)} - {1, count}:
        raise ValueError(f"{len(ours)} values cannot be paired with {len(theirs)}")
    left, right = (list(values) * (count if len(values) == 1 else 1) for values in (ours, theirs))
    gaps = [a - b for a, b in zip(left, right, strict=True)]
    return Difference(statistics.fmean(gaps), statistics.stdev(gaps) / count**0.5 if count > 1 else None)


@dataclass(frozen=True)
class Check:
    """One statement of the claim against the figures.

    Parameters
    ----------
    statement
        The statement in words.
    holds
        Whether it is.
    figures
        The numbers that say so.
    """

    statement: str
    holds: bool
    figures: str


@dataclass(frozen=True)
class Finding:
    """The result of a recipe.

    Parameters
    ----------
    checks
        All must hold for the claim to hold.
    reason
        Why it holds or does not at this scale, in a sentence or two; no more than the arms show.
    """

    arms: Sequence[Arm]
    checks: Sequence[Check]
    reason: str

    @property
    def holds(self) -> bool:
        """Whether the claim held."""
        return all(check.holds for check in self.checks)


@dataclass
class Trial:
    """One run of a recipe.

    Parameters
    ----------
    quick
        Whether to run a miniature in under a minute: the same code on tiny real data, whose figures prove nothing.
    step
        Called with a description of the current step.
    """

    quick: bool = False
    first_seed: int = 0
    step: Callable[[str], Any] = lambda text: None

    @property
    def seeds(self) -> tuple[int, ...]:
        """Three seeds, or one in a quick run."""
        return tuple(range(self.first_seed, self.first_seed + (1 if self.quick else 3)))

    def cached(self, name: str) -> Path:
        """A file kept between runs, for example for a trained model; quick runs use a separate folder."""
        folder = CACHE / ("quick" if self.quick else "full")
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name


@dataclass(frozen=True)
class Recipe:
    """A published system and the experiment that checks its claim.

    Parameters
    ----------
    name
        What users write.
    system, source
        Its name and publication.
    claim
        What was published, in one sentence.
    metric
        The metric of the arms' values, with its unit and direction.
    data
        The data of the full run, and where to get it.
    run
        The experiment.
    """

    name: str
    system: str
    source: str
    claim: str
    metric: str
    data: str
    run: Callable[[Trial], Finding]


RECIPES = Registry[Recipe]("recipe", "octavo.recipes", group="octavo.studies")


def recipe(
    name: str, *, system: str, source: str, claim: str, metric: str, data: str
) -> Callable[[Callable[[Trial], Finding]], Callable[[Trial], Finding]]:
    """Register an experiment under the name that users write."""

    def register(run: Callable[[Trial], Finding]) -> Callable[[Trial], Finding]:
        RECIPES.add(name, Recipe(name, system, source, claim, metric, data, run))
        return run

    return register


def recipes() -> dict[str, Recipe]:
    """All recipes by name."""
    return RECIPES.all()


def get_recipe(name: str) -> Recipe:
    """The recipe of that name."""
    return RECIPES.get(name)
