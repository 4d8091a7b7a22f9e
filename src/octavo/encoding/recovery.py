"""What recovery by distillation did, and the section of the report that shows it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from octavo.encoding.section import Section


@dataclass(frozen=True)
class Recovery:
    """What recovery did.

    Parameters
    ----------
    minutes
        Time that it took.
    steps, examples
        Optimizer steps, and different examples that were at hand.
    weights
        Number of weights that could change.
    before, after
        Mean divergence on held-out data.
    ended
        Why it ended.
    """

    minutes: float
    steps: int
    examples: int
    weights: int
    before: float
    after: float
    ended: str

    def section(self) -> Section:
        """The section of the report."""
        text = (
            f"The source taught the compressed model for {self.minutes:.1f} minutes, on {self.examples:,} unlabeled "
            f"examples in {self.steps:,} steps. The loss on held-out data went from {self.before:.4g} to "
            f"{self.after:.4g}, in the same bytes."
        )
        notes = (f"Training ended: {self.ended}.", f"{self.weights:,} weights could change.")
        return Section("recovery", "Recovery by distillation", text, notes=notes, figures=asdict(self))
