"""What a unit is worth: one score a class, whatever the cut."""

from octavo.cuts.scores.base import SCORES, Score, score, summed

__all__ = ["SCORES", "Score", "score", "summed"]
