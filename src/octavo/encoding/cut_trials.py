"""What was tried of a cut: its levels, what each loses, and the section of the report that shows it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

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
    """

    share: float
    weights: int
    alone: float | None
    quality: float | None = None


@dataclass(frozen=True)
class CutTrials:
    """The levels of a cut that were tried at one budget.

    Parameters
    ----------
    name, source
        The cut, and where it was published.
    units
        What goes: ``neuron``.
    total
        Weights of the source.
    levels
        Those tried, by rising share. A share of 0 is the source as it is.
    kept
        The share of the level that was kept.
    """

    name: str
    source: str
    units: str
    total: int
    levels: tuple[CutLevel, ...]
    kept: float

    def section(self) -> Section:
        """The section of the report."""
        chosen = next(level for level in self.levels if level.share == self.kept)
        text = (
            f"{self.name} removed {chosen.share:.1%} of all units of the kind {self.units!r}, and with them "
            f"{chosen.weights:,} of {self.total:,} weights."
            if chosen.share
            else f"{self.name} removed nothing: at these bytes the source as it is loses less than the levels tried."
        )
        rows = tuple(
            (f"{level.share:.1%}", level.weights, level.alone, level.quality, "yes" if level is chosen else "")
            for level in self.levels
        )
        columns = ("units removed", "weights removed", "divergence of the cut alone", "at the budget", "kept")
        return Section("cut", "Cut", text, columns, rows, (f"Source of the cut: {self.source}.",), asdict(self))
