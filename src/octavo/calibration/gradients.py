"""Curvature of weights from their own gradients, for every use in a model.

Modules that multiply their input by their weight are watched (:mod:`octavo.calibration.watches`), since inputs and
output gradients give most information. Others use their weights in different ways: recurrent layers through time,
attention with one matrix for three projections, experts in one tensor, a table that is also a head. For every such use
the gradient ``G`` (rows, columns) of the weight itself is taken, batch by batch. Labels are drawn independently for
every example (:mod:`octavo.calibration.objective`), so the mean of ``vec(G) vec(G)^T`` over batches is the Fisher
matrix. The product of row weights and a column moment with the same marginals is nearest to it in relative entropy:

    rows[i] = E[sum_j G[i, j]^2],    columns = E[G^T G] / sum_i rows[i]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from octavo.sources.conversions import Conversion
from octavo.sources.sites import Site
from octavo.sources.source import Source
from octavo.system.matmul import gram

#: Sites with more columns only have row weights.
_WIDEST = 8192
#: Sites of one conversion share their column moment if separate ones would take more bytes.
_MOMENTS_BYTES = 1 << 28


@dataclass
class _Use:
    """A parameter that gives gradients, and the sites they belong to."""

    names: tuple[str, ...]
    places: dict[str, tuple[nn.Module, str]]
    conversion: Conversion | None = None


class _Moment:
    """A column moment of one site or several."""

    def __init__(self, rows: int, columns: int) -> None:
        # That of a vector would say nothing of other rows, and take the square of its size.
        useful = rows > 1 and columns <= _WIDEST
        self.sum = torch.zeros(columns, columns, dtype=torch.float64) if useful else None
        self.weight = 0.0

    def add(self, matrix: Tensor) -> None:
        if self.sum is not None:
            self.sum += gram(matrix).double().cpu()
            self.weight += float(matrix.square().sum(dtype=torch.float64))


@dataclass
class Seen:
    """Statistics of the gradients of one site's weight, summed over batches.

    Parameters
    ----------
    rows
        Squared gradients (rows,).
    columns
        Column moment (columns, columns) with trace one; None for very wide sites.
    passes
        Number of gradients.
    """

    rows: Tensor
    columns: Tensor | None
    passes: int


class Gradients:
    """Accumulates the moments of weight gradients while batches pass through the model.

    Parameters
    ----------
    sites
        Sites to observe.
    source
        The source, which knows where the module holds them.
    only
        Modules to observe.
    """

    def __init__(self, sites: Sequence[Site], source: Source, only: Callable[[nn.Module], bool]) -> None:
        self._sites = {site.name: site for site in sites}
        self._shapes = source.shapes
        self._stored = source.aliases
        uses = _uses(source, self._sites)
        self._uses = [use for use in uses if all(only(module) for module, _ in use.places.values())]
        self.rows: dict[str, Tensor] = {}
        self.passes: dict[str, int] = {}
        self._moments: dict[str, _Moment] = {}
        self._waiting: dict[int, dict[str, Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context in which gradients are processed as they arrive and not kept."""
        handles, before = [], []
        done: set[int] = set()
        try:
            for number, use in enumerate(self._uses):
                for target, (module, leaf) in use.places.items():
                    tensor = getattr(module, leaf)
                    if id(tensor) in done or not tensor.is_leaf:
                        continue
                    done.add(id(tensor))
                    before.append((tensor, tensor.requires_grad, tensor.grad))
                    tensor.grad = None
                    tensor.requires_grad_(True)
                    handles.append(tensor.register_post_accumulate_grad_hook(self._taking(number, target)))
            yield
            self.finish()
        finally:
            for handle in handles:
                handle.remove()
            for tensor, wanted, gradient in before:
                tensor.requires_grad_(wanted)
                tensor.grad = gradient

    def finish(self) -> None:
        """Process uses whose remaining gradients did not arrive with this batch."""
        for number, gradients in self._waiting.items():
            self._convert(self._uses[number], gradients)
        self._waiting.clear()

    def seen(self) -> dict[str, Seen]:
        """The statistics of every site; sites without gradients are left out."""
        result = {}
        for name, rows in self.rows.items():
            if bool(rows.any()):
                moment = self._moments[name]
                columns = None if moment.sum is None or not moment.weight else moment.sum / moment.weight
                result[name] = Seen(rows, columns, self.passes[name])
        return result

    def _taking(self, number: int, target: str) -> Callable[[Tensor], None]:
        use = self._uses[number]

        def take(tensor: Tensor) -> None:
            gradient, tensor.grad = tensor.grad, None
            if gradient is None:
                return
            gradient = gradient.detach()
            if use.conversion is None:
                self._add(use.names[0], gradient)
            elif len(use.places) == 1:
                self._convert(use, {target: gradient})
            else:
                self._waiting.setdefault(number, {})[target] = gradient

        return take

    def _convert(self, use: _Use, gradients: Mapping[str, Tensor]) -> None:
        assert use.conversion is not None
        names = [self._stored.get(name, name) for name in use.names]
        found = use.conversion.back(gradients, [self._shapes[name] for name in names])
        sites = [self._sites[name] for name in names if name in self._sites]
        # The experts of a layer read the same states: if separate moments are too large, they share one.
        bytes_of_moments = sum(8 * site.columns**2 for site in sites)
        shared = bytes_of_moments > _MOMENTS_BYTES and len({site.columns for site in sites}) == 1
        for name, gradient in zip(names, found, strict=True):
            if name in self._sites:
                self._add(name, gradient, sites[0].name if shared else name)

    def _add(self, name: str, gradient: Tensor, moment: str | None = None) -> None:
        site = self._sites.get(self._stored.get(name, name))
        if site is None or not bool(torch.isfinite(gradient).all()):
            return
        # The gradient of the matrix is the gradient of the weight times the scale between them.
        matrix = replace(site.layout, exponent=-site.layout.exponent).to_matrix(gradient.float())
        squares = matrix.square().sum(1).double().cpu()
        self.rows[site.name] = self.rows[site.name] + squares if site.name in self.rows else squares
        self.passes[site.name] = self.passes.get(site.name, 0) + 1
        key = moment or site.name
        self._moments.setdefault(key, _Moment(site.rows, site.columns)).add(matrix)
        self._moments[site.name] = self._moments[key]


def _uses(source: Source, sites: Mapping[str, Site]) -> Iterator[_Use]:
    if source.module is None:
        return
    for name, places in source.places().items():
        if name in sites:
            distinct = {id(getattr(module, leaf)): (module, leaf) for module, leaf in places}
            for place in distinct.values():
                yield _Use((name,), {name: place})
    for conversion in source.conversions:
        if any(source.aliases.get(name, name) in sites for name in conversion.names):
            owners = {target: _place(source.module, target) for target in conversion.targets}
            yield _Use(conversion.names, owners, conversion)


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return module.get_submodule(owner), leaf
