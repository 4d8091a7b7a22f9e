"""The optimal brain surgeon under the curvature of a layer: which weights are pruned, and how the others compensate."""

from __future__ import annotations

from torch import Tensor

from octavo.calibration.curvature import Curvature
from octavo.errors import RequestError
from octavo.forms import Dense, Sparse
from octavo.methods.prune import masks


def pruned(weight: Tensor, curvature: Curvature, zeros: float, *, steps: int = 100) -> Sparse:
    """A matrix without the weights of least ``w^2 / (2 [F^-1]_ww)``; the others move to the least loss.

    Parameters
    ----------
    weight
        (rows, columns).
    curvature
        ``F``. Its eigenvalues are damped for the inverse only.
    zeros
        Share of weights that are pruned.
    steps
        The most steps of conjugate gradients on ``mask F mask`` that the survivors take.

    Raises
    ------
    RequestError
        If the share is not from 0 to below 1.

    Source: Hassibi and Stork (1993), with EK-FAC in place of the Hessian.
    """
    if not 0 <= zeros < 1:
        raise RequestError(f"zeros: is {zeros}; give a share from 0 to below 1, such as 0.5")
    mask = masks.largest(weight.square() / curvature.inverse_diagonal(), round((1 - zeros) * weight.numel()))
    return Sparse(mask, Dense(_surviving(weight, mask, curvature, steps)[mask][None]))


def _surviving(weight: Tensor, mask: Tensor, curvature: Curvature, steps: int) -> Tensor:
    """The weights under a mask of least loss."""
    target, stays = weight.double(), mask.double()
    weights = target * stays
    scale = (curvature.outputs.square() @ curvature.values @ curvature.inputs.square().t()).double()
    scale = scale.clamp_min(1e-12 * float(scale.max().clamp_min(1e-300)))
    residual = stays * curvature.times(target - weights)
    direction, energy = residual / scale, float((residual.square() / scale).sum())
    first = energy
    for _ in range(steps):
        if energy <= 1e-12 * first or not energy:
            break
        moved = stays * curvature.times(direction)
        length = energy / float((direction * moved).sum())
        weights, residual = weights + length * direction, residual - length * moved
        before, energy = energy, float((residual.square() / scale).sum())
        direction = residual / scale + energy / before * direction
    return weights.float()
