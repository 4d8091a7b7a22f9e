"""Training through rounding: the forward pass sees what will be stored, and gradients move what is rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from octavo.calibration.evidence import Evidence
from octavo.forms import Form
from octavo.methods import Method, get_method
from octavo.training.computed import Rounded, chains, refuse_shared, usual_layouts
from octavo.training.masks import maskable
from octavo.training.regimens.base import Regimen, regimen


@regimen("quantized-training", source="Polino et al. (2018), arXiv 1802.05668, with the straight-through estimator")
@dataclass
class QuantizedTraining(Regimen):
    """Every pass computes with ``Q(w)``; its gradient moves ``w``; what is stored in the end is ``Q(w)``.

    ``Q`` is any method at one setting, without calibration. A fast one should be chosen, since it encodes every weight
    at every step. With the loss of a teacher (:func:`octavo.training.distillation`) this is quantized distillation.

    Parameters
    ----------
    method
        A method, or its name.
    setting
        Its setting.
    names
        Globs of the weights; by default those of all linear layers, convolutions and embeddings.

    Examples
    --------
    >>> layer = nn.Linear(8, 4)
    >>> quantized = QuantizedTraining(setting={"bits": 2, "group": "row"})
    >>> quantized.begin(layer, steps=10)
    >>> max(len(row.unique()) for row in layer.weight) <= 4
    True
    """

    method: str | Method = "rtn"
    setting: Mapping[str, Any] = field(default_factory=lambda: {"bits": 4, "group": 64})
    names: tuple[str, ...] | None = None

    def begin(self, model: nn.Module, steps: int) -> None:
        """Compute weights from what they are rounded to."""
        method = get_method(self.method) if isinstance(self.method, str) else self.method
        method.refuse_unknown(dict(self.setting))
        found = maskable(model, self.names)
        refuse_shared(model, found)
        for name, layout in usual_layouts(model, found).items():
            prefix, _, leaf = name.rpartition(".")
            rounding = Rounded(_AtSetting(method, self.setting), layout)
            parametrize.register_parametrization(model.get_submodule(prefix), leaf, rounding)

    def forms(self, model: nn.Module) -> dict[str, Form]:
        """What the weights are rounded to."""
        found = chains(model, Rounded, self.name)
        return {name: chain[0].form(chain.original, chain[0].settled) for name, chain in found.items()}


@dataclass(frozen=True)
class _AtSetting:
    """A method at one setting, without calibration."""

    method: Method
    setting: Mapping[str, Any]

    def form(self, matrix: Tensor) -> Form:
        """The form of a matrix, on the CPU."""
        return self.method.encode(matrix.cpu(), dict(self.setting), Evidence(torch.ones(len(matrix)), None))
