"""The work on one site as pure functions, so that any executor can run them anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from octavo.allocation.counting import Counting
from octavo.allocation.profiles import Curve, Point
from octavo.allocation.site_curves import profile_site
from octavo.allocation.windows import Window
from octavo.artifact import Packed, Sized, pack, unpack
from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.methods import Method, Setting, get_method
from octavo.sources.sites import Site
from octavo.system.matmul import fast_matmul

#: A method, a setting and the form that they produced.
Made = tuple[str, Setting, Packed]


@fast_matmul()
def profiled(
    site: Site,
    weight: Tensor,
    evidence: Evidence,
    methods: Sequence[Method],
    window: Window,
    pinned: tuple[str, Setting] | None,
    target: Counting,
) -> tuple[Curve, list[Made], Packed]:
    """A site's curve, the forms to keep, and the smallest form without its content.

    Parameters
    ----------
    weight
        The site's matrix (rows, columns), float32.
    pinned
        The only method and setting, if the user chose them.
    target
        What the bytes of a point are.
    """
    made: list[Made] = []
    outlines: list[Packed] = []

    def keep(method: Method, setting: Setting, packed: Packed) -> None:
        # Dense forms are not kept on disk: making them again is as fast as reading them.
        if not method.dense and not isinstance(packed.content, Sized):
            made.append((str(method), setting, packed))
        outlines.append(replace(packed, content=Sized(packed.bytes, packed.crc)))

    if pinned is None:
        curve = profile_site(site, weight, evidence, methods, window, keep, target)
    else:
        packed = encoded(site, weight, evidence, *pinned, target)
        keep(get_method(pinned[0]), pinned[1], packed)
        curve = Curve(site.name, site.kind, site.shape, [Point(*pinned, target.bytes(packed), 0.0)])
    return curve, made, min(outlines, key=lambda packed: target.bytes(packed))


@fast_matmul()
def encoded(site: Site, weight: Tensor, evidence: Evidence, method: str, setting: Setting, target: Counting) -> Packed:
    """A site's form by one method and setting, as bytes."""
    try:
        return pack(get_method(method).at_site(site).encode(weight, setting, evidence), target.resident)
    except RequestError as error:
        raise RequestError(f"site {site.name!r}: {error}") from error


@fast_matmul()
def weighed(
    site: Site, weight: Tensor, evidence: Evidence, method: str, setting: Setting, target: Counting
) -> tuple[Packed, float] | None:
    """A site's form on disk by one method and setting, and its expected loss; None if the site does not offer it."""
    if setting not in get_method(method).at_site(site).settings(weight, evidence):
        return None
    packed = encoded(site, weight, evidence, method, setting, target)
    form = unpack(memoryview(packed.blob), packed.parts, packed.meta, (site.rows, site.columns))
    return packed, evidence.loss(form.dense() - weight)
