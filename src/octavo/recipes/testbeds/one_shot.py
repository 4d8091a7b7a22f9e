"""A decoder compressed in one shot, layer by layer, as pruning and quantization without training are published."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from octavo.calibration.blocks import Blocks
from octavo.calibration.evidence import Evidence
from octavo.calibration.layerwise import change_layers
from octavo.calibration.objective import KL
from octavo.errors import OctavoError
from octavo.forms import Form
from octavo.methods import Setting, get_method
from octavo.sources.batches import Batch

#: What is added to the diagonal of every moment, as a share of its mean: that of SparseGPT and GPTQ.
DAMPING = 0.01


def one_shot(model: nn.Module, method: str, setting: Setting, batches: Sequence[Batch]) -> dict[str, Form]:
    """Forms of all matrices of the blocks, by parameter name.

    Every matrix is encoded with the moment of what it reads through the blocks encoded before it. All its rows count
    alike.
    """
    blocks, known = Blocks.find(model), get_method(method)
    if blocks is None:
        raise OctavoError(f"{type(model).__name__}: has no chain of blocks")
    prefix, forms = blocks.prefix, dict[str, Form]()

    def changed(name: str, layer: nn.Linear, moment: Tensor) -> Tensor:
        moment.diagonal().add_(DAMPING * moment.diagonal().mean())
        evidence = Evidence(torch.ones(len(layer.weight)), (moment / moment.diagonal().mean()).float())
        form = forms[f"{prefix}.{name}"] = known.encode(layer.weight.detach(), setting, evidence)
        return form.dense().to(layer.weight)

    change_layers(copy.deepcopy(model), KL(), batches, changed)
    return forms
