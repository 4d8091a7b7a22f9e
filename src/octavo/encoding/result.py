"""What a finished compression is, before it is saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from octavo.allocation.budget import Budget
from octavo.allocation.opened import Opened, Run
from octavo.allocation.profiles import Profile
from octavo.encoding.finish import Built
from octavo.system.notes import Note, by_kind


@dataclass(frozen=True)
class Result:
    """A finished compression.

    Parameters
    ----------
    run
        What was opened, and the run on it.
    profile
        The curves of all sites.
    budget
        What was asked for.
    built
        The best of the plans that were measured.
    rival
        The best uniform plan at the same bytes; the same object as ``built`` if it won, None if none was built.
    own
        What the target found beside them, such as the kernels of a plan for speed.
    timings
        Seconds by step.
    """

    run: Run
    profile: Profile
    budget: Budget
    built: Built
    rival: Built | None = None
    own: Any = None
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def opened(self) -> Opened:
        """What the request came to."""
        return self.run.opened

    @property
    def ratio(self) -> float:
        """Original bytes over what the budget counts: artifact bytes, or bytes in memory."""
        return self.opened.source.original_bytes / self.built.counted

    @property
    def notes(self) -> list[Note]:
        """What there is to know about the run, grouped by kind."""
        told = [*self.opened.notes, *self.run.workspace.damaged, *self.run.calibration.warnings]
        return by_kind(told, [site.name for site in self.opened.sites])
