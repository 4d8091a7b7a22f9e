"""What was tried of a cut: its levels, what each loses, and the section of the report that shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from octavo.encoding.section import Section


@dataclass(frozen=True)
class CutLevel:
    """One level of a cut.

    Parameters
    ----------
    share
        The share of units removed at every place.
    weights
        Weights that went with them.
    alone
        Mean divergence from the source before anything is encoded; None where there is no data to measure it on.
    quality
        Mean divergence at the budget; None if nothing was encoded, as the level loses too much or cannot reach it, or
        nothing could be measured.
    gone
        Units removed and those of the source, by kind.
    """

    share: float
    weights: int
    alone: float | None
    quality: float | None = None
    gone: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class CutTrials:
    """The levels of a cut that were tried at one budget.

    Parameters
    ----------
    name, source
        The cut, and where it was published.
    total
        Weights of the source.
    levels
        Those tried, by rising share. A share of 0 is the source as it is.
    kept
        The share of the level that was kept.
    """

    name: str
    source: str
    total: int
    levels: tuple[CutLevel, ...]
    kept: float

    def section(self) -> Section:
        """The section of the report."""
        chosen = next(level for level in self.levels if level.share == self.kept)
        text = (
            f"{self.name} removed {_listed(chosen.gone)}, and with them {chosen.weights:,} of {self.total:,} weights."
            if chosen.share
            else f"{self.name} removed nothing: at these bytes the source as it is loses less than the levels tried."
        )
        rows = tuple(
            (f"{level.share:.1%}", level.weights, level.alone, level.quality, "yes" if level is chosen else "")
            for level in self.levels
        )
        columns = ("units removed", "weights removed", "divergence of the cut alone", "at the budget", "kept")
        return Section("cut", "Cut", text, columns, rows, (f"Source of the cut: {self.source}.",), asdict(self))


def _listed(gone: Mapping[str, tuple[int, int]]) -> str:
    """Numbers of units by kind, in words."""
    return " and ".join(f"{went:,} of {total:,} units of the kind {kind!r}" for kind, (went, total) in gone.items())
