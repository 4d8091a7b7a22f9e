"""Cuts: what can be removed from a model as one, what it is worth, and the model without it."""

from octavo.cuts.asked import split_cut
from octavo.cuts.base import CUTS, Cut, Slice, Units, check_kept, cut, left, removed, saved
from octavo.cuts.choosing import best
from octavo.cuts.layers import renumbered
from octavo.cuts.scores.base import SCORES, Score, score
from octavo.cuts.surgery import skeleton, trimmed, without
from octavo.sources.resizing import resize

__all__ = [
    "CUTS", "SCORES", "Cut", "Score", "Slice", "Units", "best", "check_kept", "cut", "left", "removed", "renumbered",
    "resize", "saved", "score", "skeleton", "split_cut", "trimmed", "without",
]  # fmt: skip
