"""An upper bound of the disk space of a run, checked before the work starts."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from octavo.allocation.curves import window_of
from octavo.allocation.opened import Opened
from octavo.allocation.sampling import MEDIUM
from octavo.allocation.site_curves import profile_site
from octavo.artifact import Packed
from octavo.artifact.packing import Sized
from octavo.calibration.blocks import Blocks
from octavo.calibration.calibrating import tokens_in
from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.methods import Method, Setting
from octavo.sources.memory import fits
from octavo.sources.sites import Layout, Site

#: The estimate is accurate within this factor; a disk with less free space is refused.
WITHIN = 1.5
#: Block size of a file system in bytes; every file takes whole blocks.
_BLOCK = 4096
#: Rows and columns of the part of a matrix used to estimate the size of its forms.
_PROBE = 128
#: Bytes of a point's head, and of a report and a card without their sites.
_HEAD, _REPORT = 600, 90_000
_PER_SITE = 1_000
#: Forms made in addition to those of the profile, in budgets: for matrices whose forms the profile keeps, and for the
#: others; each without and with a model to measure plans on.
_NEW = {(False, False): 0.2, (False, True): 1.25, (True, False): 1.5, (True, True): 5.0}
#: More bytes per weight than any profile keeps: with that much free space nothing is estimated.
_AMPLE = 200


def refuse_full_disk(opened: Opened, folder: Path, budget: int) -> None:
    """Refuse a folder whose disk is too small for the run, before any work is done.

    Parameters
    ----------
    budget
        Budget of the artifact in bytes; 0 for a profile, which has points of all sizes.

    Raises
    ------
    RequestError
        If the free space is certainly too small.
    """
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free > _AMPLE * opened.source.weights + (1 << 30):
        return
    needed = disk_use(opened, budget)
    if WITHIN * free < needed:
        raise RequestError(
            f"{existing}: the disk has {free} bytes free, but the run needs about {needed}; free some space, or choose "
            "a workspace (--out) on a larger disk"
        )
    if free < WITHIN * needed:
        opened.notes.append(
            f"the disk may become full: {free} bytes are free and the run needs about {needed}; if it does, finished "
            "work is kept and --resume continues it"
        )


def disk_use(opened: Opened, budget: int) -> int:
    """Largest disk use of a run in bytes: kept work, and temporary copies of files being written."""
    bits = budget * 8 / opened.source.elements if budget else None
    kept, new = _points(opened, bits), 0.0
    for site in opened.sites:
        share = _NEW[opened.measurable, site.parameters > MEDIUM] * site.parameters / opened.source.elements
        new += share * budget
    beside = opened.witness.beside if budget else 0
    output = budget + beside + _REPORT + _PER_SITE * len(opened.sites) if budget else 0
    # Hidden states are removed before points are kept.
    work = max(kept + int(new), _states(opened))
    return work + output + _evidence(opened) + _BLOCK * (12 + len(opened.sites))


def _points(opened: Opened, bits: float | None) -> int:
    """Bytes of the forms that a profile keeps, extrapolated from a part of one matrix of every kind."""
    by_kind: dict[str, list[Site]] = {}
    for site in opened.sites:
        if site.name not in opened.pinned:
            by_kind.setdefault(f"{site.kind} {site.parameters > MEDIUM}", []).append(site)
    total = 0
    for sites in by_kind.values():
        example = max(sites, key=lambda site: site.parameters)
        weights, sizes = _probed(opened, example, bits)
        for site in sites:
            # A form has the probe's bytes per weight, its head, and the rest of its last block.
            total += sum(_whole(size * site.parameters / weights + _HEAD) for size in sizes)
    return total


def _probed(opened: Opened, site: Site, bits: float | None) -> tuple[int, list[int]]:
    """Number of weights in a part of a site's matrix, and bytes of its forms that a profile would keep."""
    weight = opened.matrix(site)[:_PROBE, :_PROBE].contiguous()
    part = replace(site, shape=tuple(weight.shape), layout=Layout())
    sizes: list[int] = []

    def keep(method: Method, setting: Setting, packed: Packed) -> None:
        # For large matrices only sizes are kept, if rows are independent.
        sampled = site.parameters > MEDIUM and method.by_rows
        if not method.dense and not sampled and not isinstance(packed.content, Sized):
            sizes.append(packed.bytes)

    # Methods that use all rows try a matrix this large only if a sample promises a gain.
    methods = [method for method in opened.methods if site.parameters <= MEDIUM or method.by_rows]
    evidence = Evidence(torch.full((len(weight),), 2 / len(weight)), None)
    profile_site(
        part, weight, evidence, methods or opened.methods, window_of(bits, opened.request.preset), keep, opened.target
    )
    return weight.numel(), sizes


def _evidence(opened: Opened) -> int:
    """Bytes of the evidence of all sites; adjacent layers of the same width share their input."""
    total, seen = 0, set[tuple[str, int]]()
    for site in opened.sites:
        total += 4 * site.rows + _HEAD
        key = (site.name.rpartition(".")[0].rpartition(".")[0], site.columns)
        if opened.measurable and key not in seen:
            seen.add(key)
            total += 4 * site.columns**2
        if opened.request.curvature == "ekfac":
            total += 4 * (site.columns**2 + site.rows**2 + site.rows * site.columns)
    return total


def _states(opened: Opened) -> int:
    """Bytes of the hidden states at all block boundaries of a model run block by block."""
    module = opened.source.module
    if not opened.measurable or module is None or not opened.source.is_skeleton or fits(opened.source, opened.memory):
        return 0
    blocks = Blocks.find(module)
    if blocks is None:
        return 0
    width = min(site.columns for site in opened.sites)
    return (len(blocks.list) + 2) * 4 * width * sum(tokens_in(batch) for batch in opened.calibration_data)


def _whole(size: float) -> int:
    return math.ceil(size / _BLOCK) * _BLOCK
