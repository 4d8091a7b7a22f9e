"""Targets whose settings are few, and whose sizes follow from shapes: kernels that run codes, other runtimes' types."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from octavo.allocation.budget import Budget
from octavo.allocation.opened import Opened
from octavo.artifact import Contents, Packed
from octavo.calibration.evidence import Evidence
from octavo.forms import Form
from octavo.methods import Method, Setting, dense_method, get_method, of_runtime, select_methods
from octavo.request import Request
from octavo.targets.sizes import Sizes

#: Rows of a site that tell what it takes: as many as the int4 kernel packs together.
_ROWS = 64
_WIDE: Setting = {"dtype": "float32"}


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

    def smallest(self, opened: Opened, asked: Budget) -> int | None:
        """What the coarsest settings count; sizes depend on shapes, so a few rows tell them."""
        smallest = self.beside(opened)
        for site in opened.sites:
            rows = opened.matrix(site)[:_ROWS]
            evidence = Evidence(torch.ones(len(rows)), None)
            if site.name in opened.pinned:
                name, setting = opened.pinned[site.name]
                choices = [(get_method(name), setting)]
            else:
                fitting = [method for method in opened.methods if method.accepts(site)]
                offered = ((method, self.offers(method, rows, evidence)) for method in fitting)
                choices = [(method, settings[-1]) for method, settings in offered if settings]
            forms = (method.encode(rows, setting, evidence) for method, setting in choices)
            smallest += min(self.resident(form, site.rows) for form in forms)
        return smallest if asked.bytes < smallest else None


class ForeignFile(FixedSizes):
    """A target whose result is another runtime's file, in the formats of that runtime and floats of 16 bits."""

    foreign = True
    folds = False
    # Tensors beside the sites are floats in any case, and gains of rows go into scales that are stored anyway.
    tunable = True
    free_gains = True

    def methods(self, request: Request) -> list[Method]:
        """The methods of the runtime's formats, and 16 bits for what has none."""
        chosen = select_methods(request.methods, request.preset, of_runtime(self.name))
        return chosen if any(method.dense for method in chosen) else [*chosen, dense_method()]

    def offers(self, method: Method, weight: Tensor, evidence: Evidence) -> Sequence[Setting]:
        """All settings of a method; of floats those of 16 bits, if they hold the weights."""
        settings = method.settings(weight, evidence)
        return [setting for setting in settings if setting != _WIDE] or settings if method.dense else settings
