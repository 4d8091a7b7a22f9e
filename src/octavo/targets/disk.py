"""The bytes of the artifact's files, as ``stat`` counts them."""

from __future__ import annotations

import math

from octavo.allocation.budget import Budget
from octavo.allocation.encoded import seal
from octavo.allocation.opened import Opened
from octavo.allocation.sampling import sample_of
from octavo.artifact import Packed, pack
from octavo.calibration.calibrating import data_free
from octavo.calibration.evidence import Evidence
from octavo.methods import get_method
from octavo.methods.selecting import dense_method
from octavo.sources.narrowing import Narrowing
from octavo.sources.sites import Site
from octavo.targets.base import target
from octavo.targets.sizes import Sizes

#: Budgets of fewer bits per weight are checked for being reachable before anything else.
_SUSPICIOUS = 0.6
#: Bytes of a tensor's entries in manifest and header, roughly.
_ENTRY = 256
#: Below this share of the smallest artifact found without data, a budget is refused at once.
_SURE = 0.9


@target("disk")
class Disk(Sizes):
    """Bytes of the artifact's files."""

    about = "bytes of the artifact's files, as stat counts them"
    cuts = True
    estimates = True
    unused = frozenset()

    def smallest(self, opened: Opened, asked: Budget) -> int | None:
        """The smallest artifact, if the budget is surely below it.

        It is found by encoding every site at its coarsest setting, without data: a second's work, and only done when so
        few bits are asked for that it may matter.
        """
        source, assembly = opened.source, opened.assembly
        beside = _ENTRY * len(source.shapes) + sum(2 * math.prod(source.shapes[name]) for name in opened.left)
        if (asked.bytes - beside) * 8 > _SUSPICIOUS * source.elements:
            return None
        evidence = data_free(source, opened.sites).evidence
        packed = {site.name: _coarsest(opened, site, evidence[site.name]) for site in opened.sites}
        if asked.bytes > _SURE * seal(opened, packed, Narrowing.SCALE).bytes:
            return None
        if not opened.measurable:
            return seal(opened, packed, assembly.narrowing(None)).bytes
        # With data, steps differ by row and column, up to a byte each, and other tensors may need more than 16 bits.
        steps = sum(site.rows + site.columns for site in opened.sites)
        return int(1.15 * (seal(opened, packed, Narrowing.EXACT).bytes + steps))


def _coarsest(opened: Opened, site: Site, evidence: Evidence) -> Packed:
    """About the smallest form of a site: what was pinned, or the coarsest setting of the methods that may be used."""
    weight = opened.matrix(site)
    if site.name in opened.pinned:
        name, setting = opened.pinned[site.name]
        return pack(get_method(name).encode(weight, setting, evidence))
    methods = [method for method in opened.methods if method.elastic] or list(opened.methods)
    sample, packing = sample_of(weight, evidence), pack
    if sample is not None:
        weight, evidence, packing = sample.weight, sample.evidence, sample.packed
        methods = [method for method in methods if method.by_rows] or methods
    settings = [(method, method.settings(weight, evidence)[-1:]) for method in methods]
    # A method may have nothing to offer here.
    forms = [form for method, last in settings if last for form in method.encode_all(weight, last, evidence)]
    if not forms:
        dense = dense_method()
        forms = [dense.encode(weight, dense.settings(weight, evidence)[-1], evidence)]
    return min(map(packing, forms), key=lambda packed: packed.bytes)
