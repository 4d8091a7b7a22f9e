"""The view of a target for choosing and encoding: the cost of a setting, and the settings it can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from octavo.artifact import Contents, Packed
from octavo.calibration.evidence import Evidence
from octavo.forms import Form, row_scaled
from octavo.methods import Method, Setting
from octavo.sources.sites import Site

if TYPE_CHECKING:
    from octavo.allocation.budget import Budget
    from octavo.allocation.opened import Opened
    from octavo.allocation.plans import Plan
    from octavo.allocation.profiles import Profile

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
    free_gains
        Whether :meth:`scaled` takes no bytes, since its factors go into scales that are stored anyway.
    """

    name: str = ""
    margin: float = MARGIN
    exhaustive: bool = False
    tunable: bool = True
    unit: str = "bytes"
    foreign: bool = False
    free_gains: bool = False

    def offers(self, method: Method, weight: Tensor, evidence: Evidence) -> Sequence[Setting]:
        """The settings of a method that can be used here, from largest to smallest."""
        return method.settings(weight, evidence)

    def resident(self, form: Form, rows: int) -> int | None:
        """Bytes that a form of so many rows takes while it runs; None where they are not counted."""
        return None

    def joined(self, sites: Sequence[Site]) -> dict[str, str]:
        """Sites that need the same setting as others, by name, each with a word that these share."""
        return {}

    def considered(self, profile: Profile, asked: Budget) -> Profile:
        """The profile without points that no plan for this budget should have, for reasons beside bytes and loss."""
        return profile

    def admits(self, profile: Profile, plan: Plan, asked: Budget) -> bool:
        """Whether a plan may win, for reasons beside bytes and loss; one of :meth:`considered` points may."""
        return True

    def gains(self, form: Form) -> int:
        """Factors of a row, each for as many columns, that :meth:`scaled` takes."""
        return 1

    def scaled(self, form: Form, factors: Tensor) -> Form:
        """A form multiplied by factors (rows, :meth:`gains`); the form itself if none of them is worth it."""
        return row_scaled(form, factors.squeeze(1))

    def bytes(self, packed: Packed) -> int:
        """The counted bytes of one encoded site."""
        return packed.bytes

    def total(self, contents: Contents) -> int:
        """The counted bytes of a whole artifact."""
        return contents.bytes

    def described(self, contents: Contents, opened: Opened, packed: Mapping[str, Packed]) -> Contents:
        """The contents of an artifact, with the target's entries in the manifest."""
        return contents
