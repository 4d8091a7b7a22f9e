"""The view of a target for choosing and encoding: the cost of a setting, and the settings it can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from octavo.artifact import Contents, Packed
from octavo.calibration.evidence import Evidence
from octavo.forms import Form
from octavo.methods import Method, Setting

if TYPE_CHECKING:
    from octavo.allocation.opened import Opened

#: The bytes of interpolated points are slightly off: plans aim this share below the budget and are then adjusted.
MARGIN = 0.004


class Counting:
    """How a budget is counted. Every target implements this (:class:`octavo.targets.Target`).

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
        The unit of sizes in errors, such as ``bytes in memory``.
    foreign
        Whether the result is another runtime's file. Then the artifact serves only to verify what was written, and is
        not kept.
    """

    name: str = ""
    margin: float = MARGIN
    exhaustive: bool = False
    tunable: bool = True
    unit: str = "bytes"
    foreign: bool = False

    def offers(self, method: Method, weight: Tensor, evidence: Evidence) -> Sequence[Setting]:
        """The settings of a method that can be used here, from largest to smallest."""
        return method.settings(weight, evidence)

    def resident(self, form: Form, rows: int) -> int | None:
        """Bytes that a form of so many rows takes while it runs; None where they are not counted."""
        return None

    def bytes(self, packed: Packed) -> int:
        """The counted bytes of one encoded site."""
        return packed.bytes

    def total(self, contents: Contents) -> int:
        """The counted bytes of a whole artifact."""
        return contents.bytes

    def described(self, contents: Contents, opened: Opened, packed: Mapping[str, Packed]) -> Contents:
        """The contents of an artifact, with the target's entries in the manifest."""
        return contents
