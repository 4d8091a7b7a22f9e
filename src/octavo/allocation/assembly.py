"""Assembling the contents of an artifact: packed sites, and the tensors that are not sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial

from torch import Tensor

from octavo.allocation.formed_source import FormedSource
from octavo.artifact import Contents, Entry, Kept, Packed, is_constant
from octavo.artifact.configuring import configurations
from octavo.artifact.deltas import Delta
from octavo.sources.differences import Difference
from octavo.sources.narrowing import Narrowing, stored_dtype
from octavo.sources.sites import Site
from octavo.sources.skeletons import tied_names, unfilled_names
from octavo.sources.source import Source

#: Norms, biases and other tensors are stored in 16 bits if this costs less than this in total, in the metric's units.
_FREE = 1e-7


class Assembly:
    """Assembles artifacts of one source.

    Parameters
    ----------
    left
        Tensors that are not sites, with the reason.
    """

    def __init__(self, source: Source, sites: Mapping[str, Site], left: Mapping[str, str]) -> None:
        self.source, self.sites, self.left = source, sites, left
        # Checksums of kept tensors are computed once for all contents.
        self._kept: dict[Narrowing, dict[str, Kept]] = {}

    def contents(self, packed: Mapping[str, Packed], how: Narrowing) -> Contents:
        """The contents of an artifact with these sites."""
        source = {
            "title": self.source.title,
            "fingerprint": self.source.fingerprint(),
            "bytes": self.source.original_bytes,
            "weights": self.source.weights,
        }
        entries = {
            name: Entry(item, self.sites[name].shape, self.sites[name].dtype, self.sites[name].layout)
            for name, item in packed.items()
        }
        kept = self.kept(how)
        if isinstance(self.source, FormedSource):
            entries, kept = self.source.gathered(entries, kept)
        made = Contents(
            source,
            entries,
            kept,
            self.source.aliases,
            None,
            self._named,
            self.source.extra,
            self._configurations,
            self._unfilled,
            self.source.reshaped,
            Delta.of(self.source) if isinstance(self.source, Difference) else None,
        )
        # A cut alone leaves an ordinary model.
        return replace(made, configurations=configurations(self.source, plain=True)) if made.is_plain else made

    def kept(self, how: Narrowing) -> dict[str, Kept]:
        """Tensors that are not sites, in 16 bits if ``how`` allows it."""
        if how not in self._kept:
            self._kept[how] = {name: self._kept_one(name, how) for name in self.left}
        return self._kept[how]

    def _kept_one(self, name: str, how: Narrowing) -> Kept:
        own = stored = self.source.dtypes[name]
        fixed = name in self.source.fixed
        # Tensors that the user ignores are unchanged.
        if not self.left[name].startswith("ignored"):
            stored = stored_dtype(self.source.read(name).detach(), Narrowing.EXACT if fixed else how)
        # Folding leaves constants. Reconstruction may fit other tensors, which are then not constant.
        constant = name in self.source.folded and is_constant(self.source.read(name))
        stored = own if constant else stored
        read = partial(self.source.read, name)
        return Kept(read, self.source.shapes[name], stored, own, coded=fixed or constant)

    def narrowing(self, measure: Callable[[Mapping[str, Tensor]], Tensor] | None) -> Narrowing:
        """How tensors that are not sites are narrowed: as far as this has no measurable cost.

        If nothing can be measured (``measure`` is None), each value keeps its relative precision.
        """
        if measure is None:
            return Narrowing.EACH
        for how in (Narrowing.SCALE, Narrowing.EACH):
            changed = {name: kept.tensor() for name, kept in self.kept(how).items() if kept.stored != kept.dtype}
            if float(measure(changed).mean()) < _FREE:
                return how
        return Narrowing.EXACT

    @cached_property
    def _configurations(self) -> dict[str, bytes]:
        source = self.source
        return configurations(source.tuned if isinstance(source, Difference) else source)

    @cached_property
    def _unfilled(self) -> list[str] | None:
        return unfilled_names(self.source) if self.source.is_transformers else None

    @cached_property
    def _named(self) -> frozenset[str]:
        """Aliases that must be in the files, since the loader of the source does not tie them."""
        if not self.source.is_transformers or not self.source.aliases:
            return frozenset()
        return frozenset(self.source.aliases) - tied_names(self.source)
