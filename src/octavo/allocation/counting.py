"""What choosing and encoding must know of a target: what a setting costs there, and which settings it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from octavo.artifact import Contents, Packed
from octavo.calibration.evidence import Evidence
from octavo.methods import Method, Setting

if TYPE_CHECKING:
    from octavo.allocation.opened import Opened

#: The bytes of interpolated points are slightly off: plans aim this share below the budget and are then adjusted.
MARGIN = 0.004


class Counting:
    """What a budget counts. Every target is one of these (:class:`octavo.targets.Target`).

    Attributes
    ----------
    name
        The target's name.
    margin
        The share of the budget that plans leave free, since sizes between measured settings are estimates.
    exhaustive
        Whether settings are few and their sizes known exactly, so that all of them are tried.
    tunable
        Whether small learned corrections (norms, biases, row gains) may be added to the forms.
    unit
        What is counted, after a size in an error: ``bytes in memory``.
    """

    name: str = ""
    margin: float = MARGIN
    exhaustive: bool = False
    tunable: bool = True
    unit: str = "bytes"

    def offers(self, method: Method, weight: Tensor, evidence: Evidence) -> Sequence[Setting]:
        """The settings of a method that can be used here, from largest to smallest."""
        return method.settings(weight, evidence)

    def bytes(self, packed: Packed) -> int:
        """What one encoded site counts."""
        return packed.bytes

    def total(self, contents: Contents) -> int:
        """What everything in an artifact counts."""
        return contents.bytes

    def described(self, contents: Contents, opened: Opened, packed: Mapping[str, Packed]) -> Contents:
        """The contents of an artifact with what its manifest says of this target."""
        return contents
