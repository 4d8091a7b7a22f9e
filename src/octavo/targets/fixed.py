"""Targets whose settings are few, and whose sizes follow from shapes: kernels that run codes, other runtimes' types."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import torch

from octavo.allocation.opened import Opened
from octavo.artifact import Contents, Packed
from octavo.calibration.evidence import Evidence
from octavo.forms import Form
from octavo.methods import get_method
from octavo.targets.sizes import Sizes

#: Rows of a site that tell what it takes: as many as the int4 kernel packs together.
_ROWS = 64


class FixedSizes(Sizes):
    """A target of few settings: all are tried, and nothing is left to interpolate."""

    margin = 0.0
    exhaustive = True
    # What runs the codes cannot apply gains.
    tunable = False

    @abstractmethod
    def resident(self, form: Form, rows: int) -> int:
        """Bytes that a form of so many rows counts."""

    @abstractmethod
    def beside(self, opened: Opened) -> int:
        """Bytes of everything beside the sites."""

    def bytes(self, packed: Packed) -> int:
        """The counted bytes of one encoded site."""
        assert packed.resident is not None
        return packed.resident

    def total(self, contents: Contents) -> int:
        """The counted bytes of all tensors, as the manifest states them."""
        assert contents.resident is not None
        return contents.resident

    def described(self, contents: Contents, opened: Opened, packed: Mapping[str, Packed]) -> Contents:
        """The contents with what they count."""
        return replace(contents, resident=self.beside(opened) + sum(map(self.bytes, packed.values())))

    def least(self, opened: Opened) -> int:
        """Counted bytes of the coarsest settings; they depend on shapes, so a few rows tell them."""
        smallest = self.beside(opened)
        for site in opened.sites:
            rows = opened.matrix(site)[:_ROWS]
            evidence = Evidence(torch.ones(len(rows)), None)
            if site.name in opened.pinned:
                name, setting = opened.pinned[site.name]
                choices = [(get_method(name), setting)]
            else:
                offered = ((method, self.offers(method, rows, evidence)) for method in opened.methods)
                choices = [(method, settings[-1]) for method, settings in offered if settings]
            forms = (method.encode(rows, setting, evidence) for method, setting in choices)
            smallest += min(self.resident(form, site.rows) for form in forms)
        return smallest
