"""Ternary differences: the largest changes of a tuned weight, as signs with one scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.forms import Form
from octavo.methods.base import Method, Setting, method
from octavo.methods.knobs import real
from octavo.methods.prune import masks

#: Shares of weights that are kept.
_DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)


@method("ternary", family="prune", preset="fast", source="Yadav et al. (2023), ComPEFT, arXiv 2311.13171")
@dataclass(frozen=True)
class TernaryDifference(Method):
    """Keep the share ``density`` of largest ``|D[i, j]|`` as ``scale * std(D) * sign(D[i, j])``; all others are zero.

    ``D`` is a difference of a tuned weight to its base, (rows, columns), and ``std`` that of the whole of it. A setting
    without ``scale`` takes the one of least squared error by the evidence of outputs and inputs. The paper keeps the
    largest of the whole model and tries a few scales on development data; here each site has its own share, and the
    allocator chooses it.
    """

    by_rows = True
    changes = True
    takes = ("density", "scale")

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Shares from a half to a hundredth."""
        return [{"density": density} for density in _DENSITIES]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        density = real(self.name, setting, "density", 0.0, math.nextafter(1.0, 2.0))
        weight = weight.float()
        mask = masks.largest(weight.abs(), round(density * weight.numel())) & (weight != 0)
        signs = weight.sign() * mask
        if "scale" in setting:
            step = real(self.name, setting, "scale", 0.0) * float(weight.std(correction=0))
        else:
            step = _fitted(weight, signs, evidence)
        # A scale of zero makes every weight zero, so none is kept.
        return masks.survivors(signs, mask & (step > 0), max(step, torch.finfo(torch.float32).tiny), None)


def _fitted(weight: Tensor, signs: Tensor, evidence: Evidence) -> float:
    """The scale of least expected loss: ``<D, S> / <S, S>`` in the norm of the evidence."""
    own = evidence.loss(signs)
    if not own > 0:
        return float(weight[signs != 0].abs().mean()) if bool(signs.any()) else 0.0
    # A quadratic form gives its inner product.
    both = (evidence.loss(weight + signs) - evidence.loss(weight - signs)) / 4
    return max(float(both / own), 0.0)
