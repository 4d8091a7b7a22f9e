"""The low-rank correction of a compressed matrix with the least expected loss, alone and block by block of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from octavo.calibration.evidence import Evidence
from octavo.calibration.layerwise import change_layers
from octavo.calibration.objective import Objective
from octavo.forms import Form, Sum
from octavo.methods.factorize import factors
from octavo.sources.batches import Batch


def lost(weight: Tensor, base: Form, evidence: Evidence, most: int | None = None) -> factors.Factors:
    """Factors of the error of a form of a matrix (rows, columns), most important first."""
    return factors.factors(weight.float() - base.dense(), evidence, most)


def compensated(weight: Tensor, base: Form, evidence: Evidence, rank: int, bits: float) -> Sum:
    """Add the best correction of given rank, with ``bits`` per coefficient, to any compressed form.

    It has the least expected loss among all corrections of that rank, up to its quantization.
    """
    return Sum(base, factors.quantized(lost(weight, base, evidence, rank).first(rank), bits, evidence))


def compensated_blocks(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    forms: Mapping[str, Form],
    rank: int,
    bits: float,
    *,
    known: Callable[[Tensor], Tensor | None] = lambda moment: moment,
    ridge: float = 1e-6,
    layers: int | None = None,
    in_order: bool = True,
) -> dict[str, Form]:
    """Correct the compressed linear layers of a model's blocks, first block to last; the model stays as it is.

    Parameters
    ----------
    objective, batches, layers, in_order
        As for :func:`octavo.calibration.layerwise.change_layers`. In order, what a layer reads has passed the layers
        corrected before it.
    forms
        What every layer was compressed to, by the name of its weight there.
    rank, bits
        Of each correction, and of its coefficients.
    known
        What a correction knows of the second moment of a layer's inputs, (inputs, inputs): all by default; None for a
        plain SVD of the error.
    ridge
        Added to the diagonal of each moment, as a share of its mean.
    """
    found: dict[str, Form] = {}

    def changed(name: str, layer: nn.Linear, moment: Tensor) -> Tensor:
        moment.diagonal().add_(ridge * moment.diagonal().mean())
        weight, evidence = layer.weight.detach(), Evidence(torch.ones(len(layer.weight)), known(moment))
        found[name] = compensated(weight, forms[name], evidence, rank, bits)
        return found[name].dense()

    change_layers(copy.deepcopy(model), objective, batches, changed, layers=layers, in_order=in_order)
    return found
