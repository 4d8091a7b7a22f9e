"""The result of a finished compression, before it is saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from octavo.allocation.budget import Budget
from octavo.allocation.opened import Opened, Run
from octavo.allocation.profiles import Profile
from octavo.encoding.cut_trials import CutTrials
from octavo.encoding.finish import Built
from octavo.encoding.recovery import Recovery
from octavo.system.notes import Note, by_kind


@dataclass(frozen=True)
class Result:
    """A finished compression.

    Parameters
    ----------
    run
        The run, with its opened request.
    profile
        The curves of all sites.
    budget
        The requested budget.
    built
        The best measured plan.
    rival
        The best uniform plan at the same bytes; the same object as ``built`` if it won, None if none was built.
    own
        Further results of the target, such as the kernels of a plan for speed.
    timings
        Seconds by step.
    cut
        What was tried of a cut, and which of it was kept; None if no cut was asked for.
    recovery
        What distillation did; None if it was not asked for.
    """

    run: Run
    profile: Profile
    budget: Budget
    built: Built
    rival: Built | None = None
    own: Any = None
    timings: dict[str, float] = field(default_factory=dict)
    cut: CutTrials | None = None
    recovery: Recovery | None = None

    @property
    def opened(self) -> Opened:
        """The opened request."""
        return self.run.opened

    @property
    def ratio(self) -> float:
        """Original bytes divided by the bytes that the budget counts, of the artifact or in memory."""
        return self.opened.source.original_bytes / self.built.counted

    def size(self, built: Built) -> int:
        """Bytes of the files of a plan: another runtime's, which the budget counts, or those of its artifact."""
        return built.counted if self.opened.target.foreign else built.bytes

    @property
    def notes(self) -> list[Note]:
        """Notes for the user about the run, grouped by kind."""
        told = [*self.opened.notes, *self.run.workspace.damaged, *self.run.calibration.warnings]
        return by_kind(told, [site.name for site in self.opened.sites])
