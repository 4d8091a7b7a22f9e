"""Gradients of single examples in the layers of a module, batch by batch.

A layer has inputs ``a`` and output gradients ``g`` at every position of an example. The gradient of its matrix is the
sum ``G = sum g a^T`` over the positions. A bias is one more column, whose input is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibration.calibrating import differentiating
from octavo.calibration.layers import columns_of, is_layer
from octavo.errors import RequestError
from octavo.sources.batches import Batch, sequences_in
from octavo.sources.sites import Layout, Site

#: Elements of gradients held at once.
_HELD = 1 << 23
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class TracedLayer:
    """A linear layer or a convolution, read as the matrix ``[weight | bias]``."""

    name: str
    module: nn.Module
    site: Site

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the bias if there is one."""
        return [held for held in (self.module._parameters[leaf] for leaf in ("weight", "bias")) if held is not None]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.site.rows, self.site.columns + len(self.parameters) - 1

    def inputs(self, inputs: Tensor) -> Tensor:
        """Input vectors (positions, columns)."""
        columns = columns_of(self.module, self.site, inputs)
        return columns if len(self.parameters) == 1 else nn.functional.pad(columns, (0, 1), value=1.0)

    def outputs(self, gradient: Tensor) -> Tensor:
        """Output gradients (positions, rows)."""
        axis = 1 if isinstance(self.module, _CONVOLUTIONS) else -1
        return gradient.movedim(axis, -1).reshape(-1, self.site.rows)

    def split(self, matrices: Tensor) -> list[Tensor]:
        """The parts of many matrices (..., rows, columns) that belong to the parameters."""
        weight = matrices[..., : self.site.columns]
        weight = weight.mT if self.site.layout.kind == "columns_first" else weight
        return [weight.reshape(*matrices.shape[:-2], *self.site.shape), matrices[..., -1]][: len(self.parameters)]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`split`, for parts with one leading dimension."""
        weight = parts[0].mT if self.site.layout.kind == "columns_first" else parts[0].flatten(2)
        return torch.cat([weight, *(bias[..., None] for bias in parts[1:])], -1)


@dataclass(frozen=True)
class Trace:
    """What passed a layer: ``inputs`` (examples, positions, columns) and ``gradients`` (examples, positions, rows)."""

    inputs: Tensor
    gradients: Tensor

    def matrices(self) -> Iterator[tuple[slice, Tensor]]:
        """Gradients (some, rows, columns) of some examples at a time, and which these are."""
        examples, _, columns = self.inputs.shape
        size = max(1, _HELD // (self.gradients.shape[2] * columns))
        for start in range(0, examples, size):
            some = slice(start, start + size)
            yield some, self.gradients[some].mT @ self.inputs[some]


class ExampleGradients:
    """The layers of a module, and the gradients of single examples in them.

    Linear layers and convolutions in one group take part. Embeddings, normalizations, grouped and transposed
    convolutions, and weights that are used in any other way do not.

    Parameters
    ----------
    module
        The module. It is not changed.

    Raises
    ------
    RequestError
        If no layer takes part.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layers = [
            TracedLayer(name, part, _site(name, part)) for name, part in module.named_modules() if _takes_part(part)
        ]
        if not self.layers:
            raise RequestError(
                f"{type(module).__name__}: has neither a linear layer nor a convolution in one group; give a module "
                "that has one"
            )
        traced = {id(held) for layer in self.layers for held in layer.parameters}
        #: Names of the parameters that take no part.
        self.left_out = tuple(name for name, held in module.named_parameters() if id(held) not in traced)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context in which the module is in evaluation mode, and only its layers require gradients."""
        with differentiating(self.module):
            for layer in self.layers:
                for held in layer.parameters:
                    held.requires_grad_(True)
            yield

    def traces(self, batch: Batch, total: Callable[[], Tensor]) -> dict[str, Trace]:
        """What passed every layer that is used.

        Parameters
        ----------
        batch
            The batch, whose number of examples is counted.
        total
            Runs the module on the batch, and returns the sum over examples whose gradients are wanted.

        Raises
        ------
        RequestError
            If the sum is not finite or has no gradient, or positions cannot be divided among examples.
        """
        seen: list[tuple[TracedLayer, Tensor, Tensor]] = []
        handles = [layer.module.register_forward_hook(_keeping(layer, seen), with_kwargs=True) for layer in self.layers]
        try:
            value = total()
        finally:
            for handle in handles:
                handle.remove()
        if not value.requires_grad or not bool(torch.isfinite(value)):
            problem = f"is {value.item()}" if value.requires_grad else "has no gradient, as under torch.no_grad"
            raise RequestError(f"the sum over a batch {problem}; check the model, the loss and the data")
        gradients = torch.autograd.grad(value, [output for _, _, output in seen], allow_unused=True)
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for (layer, inputs, _), gradient in zip(seen, gradients, strict=True):
            if gradient is not None:
                pair = layer.inputs(inputs), layer.outputs(gradient)
                parts.setdefault(layer.name, []).append(_divided(layer.name, pair, sequences_in(batch)))
        # A layer that is used twice has one gradient, the sum over all its positions.
        return {
            name: Trace(*(torch.cat(side, 1) for side in zip(*pairs, strict=True))) for name, pairs in parts.items()
        }

    def flat(self, matrices: dict[str, Tensor]) -> Tensor:
        """Matrices (vectors, rows, columns) by layer as (vectors, weights)."""
        return torch.cat([matrices[layer.name].flatten(1) for layer in self.layers], 1)

    def unflat(self, vectors: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`flat`."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        pieces = zip(self.layers, vectors.split(sizes, 1), strict=True)
        return {layer.name: piece.unflatten(1, layer.shape) for layer, piece in pieces}


def _takes_part(module: nn.Module) -> bool:
    kept = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or type(module).__name__ == "Conv1D"
    return kept and is_layer(module, "weight") and getattr(module, "groups", 1) == 1


def _site(name: str, module: Any) -> Site:
    kind = "convolution" if isinstance(module, _CONVOLUTIONS) else "linear"
    layout = Layout("columns_first") if type(module).__name__ == "Conv1D" else Layout()
    return Site(f"{name}.weight".lstrip("."), kind, tuple(module.weight.shape), module.weight.dtype, layout)


def _keeping(layer: TracedLayer, seen: list[tuple[TracedLayer, Tensor, Tensor]]) -> Callable[..., Tensor | None]:
    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Tensor | None:
        inputs = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(inputs, Tensor) or not isinstance(output, Tensor) or not output.requires_grad:
            return None
        seen.append((layer, inputs.detach(), output))
        # A copy goes on, since an operation in place would change what is kept.
        return output.clone()

    return keep


def _divided(name: str, sides: tuple[Tensor, Tensor], examples: int) -> tuple[Tensor, Tensor]:
    """Inputs and output gradients (examples, positions, ...)."""
    inputs, gradients = sides
    if not examples or len(inputs) % examples:
        raise RequestError(
            f"{name}: reads {len(inputs)} vectors of {examples} examples, which cannot be told apart; give batches "
            "whose tensors have one row for each example"
        )
    return inputs.unflatten(0, (examples, -1)), gradients.unflatten(0, (examples, -1))
