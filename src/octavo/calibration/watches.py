"""Watches on the modules of a model: moments of inputs and of output gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibration.curvature import Curvature, eigen
from octavo.calibration.evidence import Evidence
from octavo.calibration.gradients import Gradients, Seen
from octavo.calibration.layers import columns_of, is_layer, scale_of_table
from octavo.calibration.sides import Masks, sides_of
from octavo.sources.batches import Batch, sequences_in
from octavo.sources.sites import Site
from octavo.sources.source import Source
from octavo.system.matmul import exact_matmul, gram
from octavo.system.raw import raw_bytes

#: Calibration moments overfit, so a share of their mean is added to every direction. Measured on MiniLM with 256
#: sentences, 0.1 was the best of 0.01, 0.03, 0.1, 0.3 and 1 on held-out text, from 2 to 4 bits (docs/decisions.md).
DAMPING = 0.1
#: Importance of rows that no example reached, by that of the others: an error of three times the size is allowed there.
_UNREACHED = 0.1
#: Token frequencies are raised to this power. The quadratic model underestimates errors of rare tokens: one garbled
#: word ruins its sentence. 1/2 beat 0 and 1 on held-out text (docs/decisions.md).
FREQUENCY_POWER = 0.5
#: Positions of a convolution read per batch; more would be redundant neighbours.
_PATCHES = 8192
#: Sites with more rows or columns get no measured curvature: their bases would be larger than the model.
_WIDEST = 8192
#: Elements of per-example gradients held at once.
_GRADIENTS = 1 << 23


class _Watch:
    """Accumulates the moments of one site while batches pass through a layer that holds it.

    While the layer runs it uses a copy of its weight that shares the memory and requires no gradient. So the weight's
    own gradient only comes from other uses, and nothing is counted twice (:mod:`octavo.calibration.gradients`).
    """

    def __init__(self, site: Site, module: nn.Module, leaf: str, shared: dict[Any, Any], side: str = "") -> None:
        self.site, self.module, self.leaf, self.shared, self.side = site, module, leaf, shared, side
        self.embedding = isinstance(module, nn.Embedding)
        #: The factor by which an embedding scales its rows; None if it is not a table of tokens.
        self.scale: float | None = 1.0
        self._checked = not self.embedding or type(module).forward is nn.Embedding.forward
        self._own: Tensor | None = None
        self.rows = torch.zeros(site.rows, dtype=torch.float64)
        self.columns: Tensor | None = None
        #: The full moment of the output gradients, if requested.
        self.outputs: Tensor | None = None
        self.samples = 0

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Install the copy, and start gradients here if they have not started."""
        if not self._checked:
            self.scale, self._checked = scale_of_table(module, args, kwargs), True
        if self.scale is None:
            return None
        held: dict[str, Any] = module._parameters if self.leaf in module._parameters else module._buffers
        self._own = held[self.leaf]
        assert self._own is not None
        copy = self._own.detach()
        held[self.leaf] = nn.Parameter(copy, requires_grad=False) if held is module._parameters else copy
        first = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(first, Tensor) and first.is_floating_point() and not first.requires_grad:
            first = first.detach().requires_grad_(True)
            return ((first, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): first})
        return None

    def restore(self) -> None:
        """Restore the weight."""
        if self._own is not None:
            held: dict[str, Any] = self.module._parameters
            (held if self.leaf in held else self.module._buffers)[self.leaf] = self._own
            self._own = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Tensor | None:
        self.restore()
        inputs = args[0] if args else next(iter(kwargs.values()), None)
        if self.scale is None or not isinstance(inputs, Tensor) or not isinstance(output, Tensor):
            return None
        mask = self.shared["masks"].of(self.side)
        if self.embedding:
            return self._embedding(inputs, output, mask)
        if not output.requires_grad:
            return None
        convolution = self.site.kind == "convolution"
        backward = self._layer(inputs, output, None if convolution else _live(inputs, mask))
        # Hooks of a view are lost under in-place operations such as ReLU(inplace=True); those of a copy are not.
        output = output.clone() if output._is_view() else output
        output.register_hook(backward)
        return output

    def _layer(self, inputs: Tensor, output: Tensor, keep: Tensor | None) -> Callable[[Tensor], None]:
        """Observe the inputs of a layer; returns the function that observes the gradient of its outputs."""
        moment, count = self._input_moment(inputs, keep)
        self._add(moment)
        if self.site.layout.kind == "transposed":
            # Each kernel element is applied to every input once: the mean is over outputs, of which there are more.
            count = output.numel() // self.site.rows * self.site.layout.groups
        self.samples += count

        def backward(gradient: Tensor) -> None:
            flat = gradient.movedim(self._axis, -1) if keep is None else gradient[keep]
            flat = self.site.layout.to_gradient(flat.reshape(-1, self.site.rows).float())
            # The squares themselves would take as much memory as the gradient.
            self.rows += torch.linalg.vector_norm(flat, dim=0).cpu().double().square()
            if self.outputs is not None:
                self.outputs += gram(flat).double().cpu()

        return backward

    @property
    def _axis(self) -> int:
        """The dimension of the outputs that counts the rows."""
        convolution = isinstance(self.module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        return 1 if convolution or self.site.layout.kind == "transposed" else -1

    def _add(self, moment: Tensor) -> None:
        # In place, since the moments of wide layers are large. The first is a copy, since sites share moments.
        if self.columns is None:
            self.columns = moment.to(torch.float64, copy=True)
        else:
            # Sums of two types would take new memory for each, which costs more than the sum.
            if moment.shape not in self.shared:
                self.shared[moment.shape] = torch.empty_like(self.columns)
            self.columns += self.shared[moment.shape].copy_(moment)

    def _embedding(self, tokens: Tensor, output: Tensor, mask: Tensor | None) -> Tensor:
        live = mask.bool() if mask is not None and mask.numel() % tokens.numel() == 0 else None
        if live is not None and live.numel() == tokens.numel():
            # Multiple-choice answers are separate sequences; some models put positions first.
            turned = live.ndim == 2 and live.shape != tokens.shape and live.shape == tokens.shape[::-1]
            live = live.t() if turned else live.reshape(tokens.shape)
        shown = tokens if live is None else tokens.expand(live.shape)[live]
        self.rows += torch.bincount(shown.flatten().cpu(), minlength=self.site.rows).double()
        self.samples += shown.numel()

        def backward(gradient: Tensor) -> None:
            flat = gradient[live] if live is not None and live.shape == gradient.shape[:-1] else gradient.flatten(0, -2)
            scale = 1.0 if self.scale is None else self.scale
            flat = self.site.layout.to_gradient(flat.float())
            self._add(gram(flat).double().cpu() * scale**2)

        if output.is_leaf:
            # A copy, since models may operate in place, which a leaf does not allow.
            output = output.detach().requires_grad_(True).clone()
        output.register_hook(backward)
        return output

    def _input_moment(self, inputs: Tensor, keep: Tensor | None) -> tuple[Tensor, int]:
        # Query, key and value read the same tensor: its moment is computed once, keyed by identity while it is alive.
        key = (id(inputs), inputs._version, self.site.columns, _geometry(self.module))
        if key not in self.shared:
            seen = inputs.detach() if keep is None else inputs.detach()[keep]
            flat = columns_of(self.module, self.site, seen.float())
            if len(flat) > _PATCHES and keep is None:
                flat = flat[:: -(-len(flat) // _PATCHES)]
            # The layers may multiply in bfloat16, but sums of squares must not.
            with exact_matmul(flat.device.type):
                moment = gram(flat).cpu()
            if self.site.layout.kind == "transposed":
                kernel = self.site.columns // len(moment)
                moment = torch.kron(moment, torch.eye(kernel))
            self.shared[key] = (inputs, moment, len(flat))
        _, moment, count = self.shared[key]
        return moment, count

    @property
    def seen(self) -> bool:
        """Whether any output was found to depend on the site."""
        return self.columns is not None and self.samples > 0 and bool(self.columns.any()) and bool(self.rows.any())

    def evidence(self, sequences: int, moments: dict[tuple, tuple[Tensor, dict[str, Any]]]) -> Evidence:
        """The moments, damped; equal ones of other sites are shared through ``moments``."""
        assert self.columns is not None
        columns = self.columns / self.samples
        self.columns = None
        # For an embedding, the mean squared gradient per token times the tokens per sequence is the loss per sequence.
        rows = _frequencies(self.rows) * self.samples if self.embedding else self.rows
        rows = rows / sequences
        rows = rows + DAMPING * rows.mean()
        # Sites that read the same inputs have equal moments: they share one copy and one factorisation.
        key = (self.embedding, columns.shape, hashlib.sha256(raw_bytes(columns)).digest())
        if key not in moments:
            columns.diagonal().add_(DAMPING * columns.diagonal().mean())
            moments[key] = (columns.float(), {})
        moment, cache = moments[key]
        found = Evidence(rows.float(), moment, self.samples, cache=cache)
        if self.outputs is not None:
            outputs = self.outputs / sequences
            outputs.diagonal().add_(DAMPING * outputs.diagonal().mean())
            (sigma, left), (alpha, right) = eigen(outputs.float()), _basis(found)
            found.curvature = Curvature(left, right, sigma, alpha, sigma[:, None] * alpha)
        return found


class _Correction(_Watch):
    """Accumulates squared per-example gradients in the basis of a site's curvature."""

    def __init__(
        self, site: Site, module: nn.Module, leaf: str, shared: dict[Any, Any], side: str, evidence: Evidence
    ) -> None:
        super().__init__(site, module, leaf, shared, side)
        assert evidence.curvature is not None
        self.found, self.curvature = evidence, evidence.curvature
        self.values = torch.zeros(site.rows, site.columns, dtype=torch.float64)

    def _layer(self, inputs: Tensor, output: Tensor, keep: Tensor | None) -> Callable[[Tensor], None]:
        flat = columns_of(self.module, self.site, inputs.detach().float())
        # Layers that receive tokens without a sequence dimension treat each as an example.
        examples = self.shared["sequences"] if len(flat) % self.shared["sequences"] == 0 else len(flat)
        columns = flat.view(examples, -1, self.site.columns)
        # If positions are few, they are rotated before the product, otherwise after.
        height, width = self.values.shape
        first = columns.shape[1] * (height**2 + width**2) < height * width * (height + width)

        def backward(gradient: Tensor) -> None:
            rows = self.site.layout.to_gradient(gradient.movedim(self._axis, -1).float())
            rows = rows if keep is None else rows * keep[..., None]
            rows = rows.reshape(examples, -1, self.site.rows)
            left, right = self.curvature.outputs.to(rows), self.curvature.inputs.to(rows)
            for some in torch.arange(examples).split(max(1, _GRADIENTS // self.values.numel())):
                own = columns[some].to(rows)
                if first:
                    gradients = (rows[some] @ left).mT @ (own @ right)
                else:
                    gradients = left.t() @ (rows[some].mT @ own) @ right
                self.values += gradients.square().sum(0).double().cpu()

        return backward

    def corrected(self, sequences: int) -> Evidence:
        """The evidence of the first pass with the new, damped eigenvalues and the product nearest to them."""
        values = self.values / sequences
        if not bool(values.any()):
            return replace(self.found, curvature=None)
        values += DAMPING * values.mean()
        curvature = replace(self.curvature, values=values.float())
        rows, columns = curvature.nearest()
        return Evidence(rows, columns, self.found.samples, curvature=curvature)


def _basis(found: Evidence) -> tuple[Tensor, Tensor]:
    """Eigenvalues and basis of a column moment, computed once for all sites that share it."""
    if "basis" not in found.cache:
        assert found.columns is not None
        found.cache["basis"] = eigen(found.columns)
    return found.cache["basis"]


def _live(inputs: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask as bools if it fits the leading dimensions of the inputs."""
    return mask.bool() if mask is not None and inputs.ndim == 3 and inputs.shape[:2] == mask.shape else None


def _geometry(module: nn.Module) -> str:
    """Settings that determine the patches of a convolution; empty for other layers."""
    parts = ("kernel_size", "stride", "padding", "dilation", "padding_mode", "groups")
    return " ".join(str(getattr(module, part, "")) for part in parts)


class Watches:
    """The watches of sites: one for every layer that holds a site's tensor, and one for all other uses.

    Parameters
    ----------
    source
        The source, which knows the modules that hold a site.
    curvature
        Whether the evidence of layers gets a curvature: that of K-FAC until it is corrected. Embeddings, grouped and
        transposed convolutions, tensors with several roles and very wide ones get none.
    only
        Layers to watch.
    uses
        Modules whose weight gradients are watched; those of ``only`` by default.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        source: Source,
        *,
        curvature: bool = False,
        only: Callable[[nn.Module], bool] = lambda module: True,
        uses: Callable[[nn.Module], bool] | None = None,
    ) -> None:
        self._shared: dict[Any, Any] = {"masks": Masks()}
        sides, places = sides_of(source.module), source.places()
        self.watches = {
            site.name: [
                _Watch(site, module, leaf, self._shared, sides.get(module, ""))
                for module, leaf in places.get(site.name, ())
                if only(module) and is_layer(module, leaf)
            ]
            for site in sites
        }
        self.gradients = Gradients(sites, source, uses or only)
        for watches in self.watches.values() if curvature else ():
            if len(watches) == 1 and _is_plain(watches[0]):
                site = watches[0].site
                watches[0].outputs = torch.zeros(site.rows, site.rows, dtype=torch.float64)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context in which the modules are watched."""
        handles = []
        every = [watch for watches in self.watches.values() for watch in watches]
        try:
            with self.gradients.watching():
                for watch in every:
                    handles.append(watch.module.register_forward_pre_hook(watch.before, with_kwargs=True))
                    handles.append(watch.module.register_forward_hook(watch, with_kwargs=True))
                yield
        finally:
            for handle in handles:
                handle.remove()
            for watch in every:
                watch.restore()

    def begin(self, batch: Batch) -> None:
        """Announce the next batch and release the state of the last one."""
        self.gradients.finish()
        self._shared.clear()
        self._shared["masks"], self._shared["sequences"] = Masks.of_batch(batch), sequences_in(batch)

    @property
    def positions(self) -> int:
        """The largest number of positions that any layer has seen."""
        return max((watch.samples for watches in self.watches.values() for watch in watches), default=0)

    def evidence(self, sequences: int) -> dict[str, list[Evidence]]:
        """The evidence of every site whose watches saw anything; this consumes the moments."""
        self.gradients.finish()
        self._shared.clear()
        moments: dict[tuple, tuple[Tensor, dict[str, Any]]] = {}
        found = {
            name: [watch.evidence(sequences, moments) for watch in watches if watch.seen]
            for name, watches in self.watches.items()
        }
        for name, seen in self.gradients.seen().items():
            found[name].append(_of_gradients(seen, sequences))
        return {name: roles for name, roles in found.items() if roles}


def _of_gradients(seen: Seen, sequences: int) -> Evidence:
    """Damped evidence of the uses of a site outside of layers.

    Rows that no example reached, such as those of later positions, are rarely used, but must not be lost.
    """
    rows = seen.rows / sequences
    reached = rows > 0
    if bool(reached.any()):
        rows = torch.where(reached, rows, _UNREACHED * rows[reached].mean())
    rows = rows + DAMPING * rows.mean()
    columns = seen.columns
    if columns is not None:
        columns = columns.clone()
        columns.diagonal().add_(DAMPING * columns.diagonal().mean())
        columns = columns.float()
    # Each row of each gradient is a sample of the column moment.
    return Evidence(rows.float(), columns, seen.passes * len(rows))


class Corrections(Watches):
    """The second pass of EK-FAC: eigenvalues of curvatures measured on single examples.

    Parameters
    ----------
    evidence
        The evidence of the first pass.
    """

    def __init__(self, sites: Sequence[Site], source: Source, evidence: Mapping[str, Evidence]) -> None:
        super().__init__([], source)
        sides, places = sides_of(source.module), source.places()
        self.corrections: dict[str, _Correction] = {}
        for site in sites:
            if site.name in evidence and evidence[site.name].curvature is not None:
                module, leaf = next(place for place in places[site.name] if is_layer(*place))
                side = sides.get(module, "")
                self.corrections[site.name] = _Correction(site, module, leaf, self._shared, side, evidence[site.name])
        self.watches = {name: [watch] for name, watch in self.corrections.items()}

    def corrected(self, sequences: int) -> dict[str, Evidence]:
        """Evidence of the sites that have a curvature."""
        self._shared.clear()
        return {name: watch.corrected(sequences) for name, watch in self.corrections.items()}


def _is_plain(watch: _Watch) -> bool:
    """Whether one weight of the matrix connects every input of a layer to every output."""
    site, groups = watch.site, getattr(watch.module, "groups", 1)
    return (
        not watch.embedding
        and groups == 1
        and site.layout.kind != "transposed"
        and max(site.rows, site.columns) <= _WIDEST
    )


def _frequencies(counts: Tensor) -> Tensor:
    """Smoothed token frequencies that sum to one.

    Tokens never seen share the Good-Turing mass (the share of tokens seen once), spread evenly.
    """
    total, unseen = counts.sum(), counts == 0
    missing = (counts == 1).sum().clamp_min(1) / total if bool(unseen.any()) else torch.zeros((), dtype=counts.dtype)
    frequencies = counts / total * (1 - missing)
    frequencies[unseen] = missing / unseen.sum().clamp_min(1)
    powered = frequencies.clamp_min(1e-12) ** FREQUENCY_POWER
    return powered / powered.sum()
