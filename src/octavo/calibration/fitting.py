"""The objective that fits what a module returns, for modules of a class that says nothing of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from octavo.calibration.objective import KL, Cosine, Objective, Squared, are_probabilities
from octavo.sources.batches import Batch, tensors_in

#: The norm of unit vectors in 16 bits misses one by less than this.
_ROUNDING = 1e-2


def fitting(result: Any, module: nn.Module, batch: Batch) -> Objective:
    """The objective that fits a module's result on a batch.

    KL for logits and probabilities, cosine for unit vectors and for named states and embeddings, squared error for
    images, single numbers and all else.
    """
    if isinstance(result, Tensor):
        return _of_tensor(result, batch)
    return next((kind() for kind in (KL, Cosine, Squared) if kind().read(result, module, batch) is not None), KL())


def _of_tensor(result: Tensor, batch: Batch) -> Objective:
    """The objective of a tensor without a name, (examples, ..., features) if an example has several numbers."""
    if not 2 <= result.ndim <= 3 or result.shape[-1] < 2 or not result.numel():
        return Squared()
    values = result.detach().float()
    if are_probabilities(values):
        return KL()
    if result.ndim == 2 and float((values.norm(dim=1) - 1).abs().amax()) < _ROUNDING:
        return Cosine()
    # A reconstruction or a forecast has the shape of what was given, or of a target beside it. Logits have both signs.
    alike = any(given.is_floating_point() and given.shape == result.shape for given in tensors_in(batch))
    return Squared() if alike or float(values.amin()) >= 0 else KL()
