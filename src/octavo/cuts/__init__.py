"""Cuts: what can be removed from a model as one, what it is worth, and the model without it."""

from octavo.cuts.asked import split_cut
from octavo.cuts.base import CUTS, Cut, Slice, Units, check_kept, cut, left, removed, saved
from octavo.cuts.choosing import best
from octavo.cuts.surgery import resize, skeleton, trimmed, without

__all__ = [
    "CUTS", "Cut", "Slice", "Units", "best", "check_kept", "cut", "left", "removed", "resize", "saved", "skeleton",
    "split_cut", "trimmed", "without",
]  # fmt: skip
