"""Cuts: what can be removed from a model as one, what it is worth, and the model without it."""

from octavo.cuts.base import CUTS, Cut, Slice, Units, check_kept, cut, left, saved
from octavo.cuts.choosing import best
from octavo.cuts.surgery import resize, skeleton, without

__all__ = [
    "CUTS", "Cut", "Slice", "Units", "best", "check_kept", "cut", "left", "resize", "saved", "skeleton", "without",
]  # fmt: skip
