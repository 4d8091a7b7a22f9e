"""What a run will take on the disk at most, told before the work starts."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from octavo.allocation.curves import window_of
from octavo.allocation.opened import Opened
from octavo.allocation.profiles import profile_site
from octavo.allocation.sampling import MEDIUM
from octavo.artifact import Packed
from octavo.artifact.packing import Sized
from octavo.calibration.blocks import Blocks
from octavo.calibration.calibrating import tokens_in
from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.methods import Method, Setting
from octavo.sources.memory import fits
from octavo.sources.sites import Layout, Site

#: The estimate is right within this factor: what has less room than the rest of it is refused.
WITHIN = 1.5
#: Bytes of a block of a file system, of which every file takes whole ones.
_BLOCK = 4096
#: Rows and columns of the part of a matrix that tells what its forms take.
_PROBE = 128
#: Bytes of a point's head, and of a report and a card without their sites.
_HEAD, _REPORT = 600, 90_000
_PER_SITE = 1_000
#: Forms that are made beside those of the profile, in budgets: of matrices of which the profile keeps forms, and of
#: those of which it keeps none; without and with a model that plans are measured on.
_NEW = {(False, False): 0.2, (False, True): 1.25, (True, False): 1.5, (True, True): 5.0}
#: More bytes for every weight than any profile keeps: with so much room nothing is worked out.
_AMPLE = 200


def refuse_full_disk(opened: Opened, folder: Path, budget: int) -> None:
    """Refuse a folder on whose disk a run will not fit, before any work is done.

    Parameters
    ----------
    budget
        Bytes of the artifact; 0 for a profile, which has points of all sizes.

    Raises
    ------
    RequestError
        If there is surely too little room.
    """
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free > _AMPLE * opened.source.weights + (1 << 30):
        return
    needed = disk_use(opened, budget)
    if WITHIN * free < needed:
        raise RequestError(
            f"{existing}: has {free} bytes free, the run will take about {needed} while it lasts; free some, or name a "
            "workspace (of the command: --out) on a larger disk"
        )
    if free < WITHIN * needed:
        opened.notes.append(
            f"the disk may become full: {free} bytes are free and about {needed} will be taken; should it come so, "
            "finished work is kept, and --resume goes on"
        )


def disk_use(opened: Opened, budget: int) -> int:
    """Bytes that a run takes on its disk at most: kept work, and beside it what is written aside."""
    bits = budget * 8 / opened.source.weights if budget else None
    kept, new = _points(opened, bits), 0.0
    for site in opened.sites:
        share = _NEW[opened.measurable, site.parameters > MEDIUM] * site.parameters / opened.source.weights
        new += share * budget
    beside = opened.witness.beside if budget else 0
    output = budget + beside + _REPORT + _PER_SITE * len(opened.sites) if budget else 0
    # Hidden states are gone when points are kept.
    work = max(kept + int(new), _states(opened))
    return work + output + _evidence(opened) + _BLOCK * (12 + len(opened.sites))


def _points(opened: Opened, bits: float | None) -> int:
    """Bytes of the forms that a profile keeps, from those of a part of one matrix of every kind."""
    by_kind: dict[str, list[Site]] = {}
    for site in opened.sites:
        if site.name not in opened.pinned:
            by_kind.setdefault(f"{site.kind} {site.parameters > MEDIUM}", []).append(site)
    total = 0
    for sites in by_kind.values():
        example = max(sites, key=lambda site: site.parameters)
        weights, sizes = _probed(opened, example, bits)
        for site in sites:
            # A form in the probe's bytes for every weight, its head, and the rest of its last block.
            total += sum(_whole(size * site.parameters / weights + _HEAD) for size in sizes)
    return total


def _probed(opened: Opened, site: Site, bits: float | None) -> tuple[int, list[int]]:
    """Weights of a part of a site's matrix, and bytes of the forms of it that a profile would keep."""
    weight = opened.matrix(site)[:_PROBE, :_PROBE].contiguous()
    part = replace(site, shape=tuple(weight.shape), layout=Layout())
    sizes: list[int] = []

    def keep(method: Method, setting: Setting, packed: Packed) -> None:
        # Of large matrices only sizes are kept, where rows stand for themselves.
        sampled = site.parameters > MEDIUM and method.by_rows
        if not method.dense and not sampled and not isinstance(packed.content, Sized):
            sizes.append(packed.bytes)

    # A matrix so large is tried by the methods that look at all its rows only where a sample says that it is worth it.
    methods = [method for method in opened.methods if site.parameters <= MEDIUM or method.by_rows]
    evidence = Evidence(torch.full((len(weight),), 2 / len(weight)), None)
    profile_site(
        part, weight, evidence, methods or opened.methods, window_of(bits, opened.request.preset), keep, opened.target
    )
    return weight.numel(), sizes


def _evidence(opened: Opened) -> int:
    """Bytes of the evidence of all sites; layers beside each other that take the same width share their input."""
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
    """Bytes of the hidden states at all boundaries of a model that is run block by block."""
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
