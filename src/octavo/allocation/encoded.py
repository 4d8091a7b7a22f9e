"""Encoding chosen settings, and using encoded sites as tensors of the source or contents of an artifact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from octavo.allocation.opened import Opened, Run
from octavo.allocation.tasks import encoded
from octavo.artifact import Contents, Packed, unpack
from octavo.forms import Form
from octavo.sources.narrowing import Narrowing
from octavo.sources.sites import Site
from octavo.system.raw import Lazily, narrowed


def encode_all(run: Run, chosen: Mapping[str, Any]) -> Iterator[tuple[str, Packed]]:
    """Names and packed forms of sites, kept in the workspace; existing forms are reused.

    Parameters
    ----------
    chosen
        Maps site names to objects with a ``method`` and a ``setting``, such as points.
    """
    opened, room = run.opened, run.workspace
    found = {name: room.load_packed(name, point.method, point.setting) for name, point in chosen.items()}
    missing = [(opened.site(name), chosen[name]) for name, packed in found.items() if packed is None]
    evidence, target = run.calibration.evidence, opened.target
    results = run.executor.map(
        encoded,
        (
            (site, opened.matrix(site), evidence[site.name], point.method, point.setting, target)
            for site, point in missing
        ),
    )
    for name, packed in found.items():
        if packed is None:
            point = chosen[name]
            packed = room.save_packed(name, point.method, point.setting, next(results))
        yield name, packed


def form_of(site: Site, packed: Packed) -> Form:
    """The form of a packed site."""
    return unpack(memoryview(packed.blob), packed.parts, packed.meta, (site.rows, site.columns))


def as_weights(opened: Opened, packed: Mapping[str, Packed]) -> Lazily:
    """Packed sites as tensors of the source, each decoded on demand."""

    def decoded(site: Site, item: Packed) -> Tensor:
        return narrowed(site.layout.from_matrix(form_of(site, item).dense(), site.shape), site.dtype)

    return Lazily({name: partial(decoded, opened.site(name), item) for name, item in packed.items()})


def seal(opened: Opened, packed: Mapping[str, Packed], how: Narrowing) -> Contents:
    """The contents of an artifact with these sites, with the target's entries in the manifest."""
    return opened.target.described(opened.assembly.contents(packed, how), opened, packed)


def narrowing_of(run: Run) -> Narrowing:
    """How tensors that are not sites are narrowed: as far as has no measurable cost. ``fast`` does not measure it."""
    measured = run.opened.measurable and run.opened.request.preset != "fast"
    return run.opened.assembly.narrowing((lambda weights: run.measure(weights) - run.at_rest) if measured else None)
