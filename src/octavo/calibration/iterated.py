"""Products with the Gauss-Newton matrix of a module, and its inverse by iteration.

The Gauss-Newton matrix ``F`` of a model's own divergence is the Hessian of ``KL(model || model')`` at ``model' =
model``. So ``F v`` takes two backward passes over the data and no matrix. Two iterations solve ``(F + damping) x = v``
with such products. They are exact in the limit, where :mod:`octavo.calibration.curvature` is a model, but every vector
costs many passes over the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from octavo.calibration.example_gradients import ExampleGradients
from octavo.calibration.objective import Objective
from octavo.errors import RequestError
from octavo.sources.batches import Batch, sequences_in

#: Maps vectors (vectors, weights) to their products.
Operator = Callable[[Tensor], Tensor]


class GaussNewton:
    """Products with the Gauss-Newton matrix ``F`` of some layers, a mean over examples.

    Parameters
    ----------
    gradients
        The layers; the products are taken inside its :meth:`~ExampleGradients.watching`.
    batches
        The examples.
    objective
        The divergence between outputs whose curvature is meant.
    """

    def __init__(self, gradients: ExampleGradients, batches: Sequence[Batch], objective: Objective) -> None:
        self.gradients, self.batches, self.objective = gradients, batches, objective

    def times(self, vectors: Tensor, batches: Sequence[Batch] | None = None) -> Tensor:
        """``F v`` of every vector (vectors, weights), over all batches or those given."""
        batches = self.batches if batches is None else batches
        layers = self.gradients.layers
        held = [parameter for layer in layers for parameter in layer.parameters]
        matrices = self.gradients.unflat(vectors)
        given = [part for layer in layers for part in layer.split(matrices[layer.name])]
        total = [torch.zeros_like(part) for part in given]
        for batch in batches:
            outputs = self.objective.outputs(self.gradients.module, batch)
            value = self.objective.divergence(outputs.detach(), outputs).sum()
            first = torch.autograd.grad(value, held, create_graph=True, allow_unused=True)
            pairs = [(one, part) for one, part in zip(first, given, strict=True) if one is not None]
            sides = zip(*pairs, strict=True)
            second = torch.autograd.grad(*(next(sides), held, next(sides)), allow_unused=True, is_grads_batched=True)
            for summed, product in zip(total, second, strict=True):
                if product is not None:
                    summed += product
        total = [part / sum(map(sequences_in, batches)) for part in total]
        coming = iter(total)
        parts = {layer.name: layer.joined([next(coming) for _ in layer.parameters]) for layer in layers}
        return self.gradients.flat(parts)


def conjugate_gradients(
    product: Operator, vectors: Tensor, damping: Tensor, *, tolerance: float = 1e-3, most: int = 200
) -> Tensor:
    """``(F + damping)^-1 v`` of every vector (vectors, weights).

    Parameters
    ----------
    damping
        (weights,) positive numbers.
    tolerance
        The largest residual, relative to its vector, at which the iteration ends; ``most`` steps are made.
    """
    found, residual = torch.zeros_like(vectors), vectors.clone()
    direction, energy = residual.clone(), residual.square().sum(1)
    first = energy.clamp_min(1e-300)
    for _ in range(most):
        if bool((energy <= tolerance**2 * first).all()):
            break
        moved = product(direction) + damping * direction
        length = (energy / (direction * moved).sum(1).clamp_min(1e-300))[:, None]
        found, residual = found + length * direction, residual - length * moved
        before, energy = energy, residual.square().sum(1)
        direction = residual + (energy / before.clamp_min(1e-300))[:, None] * direction
    return found


def lissa(
    matrix: GaussNewton, vectors: Tensor, damping: Tensor, *, tolerance: float = 1e-3, most: int = 200, seed: int = 0
) -> Tensor:
    """``(F + damping)^-1 v`` of every vector (vectors, weights) by stochastic Neumann series.

    One batch is read in each step: ``x <- v / s + (1 - (F_batch + damping) / s) x``, where ``s`` is above the largest
    eigenvalue of the whole. The iteration ends when an epoch changes less than ``tolerance`` of the norm, and after
    ``most`` epochs at the latest.

    Source: Agarwal et al. (2017), arXiv 1602.03943, as used by Koh and Liang (2017), arXiv 1703.04730.
    """
    generator = torch.Generator().manual_seed(seed)
    top = torch.randn(1, vectors.shape[1], generator=generator).to(vectors)
    for _ in range(10):
        top = matrix.times(top / top.norm())
    # Batches differ, so that one of them may be steeper than all together.
    scale = 2 * float(top.norm()) + float(damping.max())
    found = vectors / scale
    for _ in range(most):
        before = found
        for number in torch.randperm(len(matrix.batches), generator=generator).tolist():
            moved = matrix.times(found, [matrix.batches[number]]) + damping * found
            found = found + (vectors - moved) / scale
        if not bool(torch.isfinite(found).all()):
            raise RequestError("lissa: the iteration diverges, as batches differ too much; give larger batches")
        if bool(((found - before).norm(dim=1) <= tolerance * found.norm(dim=1)).all()):
            break
    return found
