"""AdaRound: rounding up or down is learned for every weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence, require_finite
from octavo.errors import RequestError
from octavo.forms import Form
from octavo.methods.base import Method, Setting, method
from octavo.methods.quantize.grids import Fitted, fit, nearest

#: The sigmoid is stretched from 0 .. 1 to these ends and cut there, so that it reaches 0 and 1 (the paper's).
_LOW, _HIGH = -0.1, 1.1
#: The regularizer's exponent falls between these after a share of the steps without one (the paper's).
_SHARP, _FLAT, _FREE = 20.0, 2.0, 0.2
#: Rows are learned in independent chunks of so many weights.
_CHUNK = 1 << 21


@method(
    "adaptive-rounding", family="quantize", preset="named", source="AdaRound (Nagel et al., 2020, arXiv 2004.10568)"
)
@dataclass(frozen=True)
class AdaptiveRounding(Method):
    """The grid of ``rtn``, with ``codes = floor(W / scale) + zero + h`` and ``h`` learned to be 0 or 1.

    ``h = clip(1.2 sigmoid(v) - 0.1, 0, 1)`` starts where the grid is not rounded at all. Adam lowers

        tr(F C F^T) + price * sum (1 - |2 h - 1|^b)

    where ``F`` is the error (rows, columns) in steps and ``C`` (columns, columns) the second moment of the inputs,
    divided by its mean diagonal. ``b`` falls from 20 to 2: first only values near 0 and 1 are pulled there, at last
    all. A row that ends worse than rounded to nearest is rounded to nearest. Without a moment it is ``rtn``.

    A code is one of the two next to its weight. Error feedback (``gptq``) has no such limit. On Gaussian weights it
    leaves more loss where inputs are correlated and of one size, and less where their sizes differ tenfold.

    Parameters
    ----------
    steps, rate
        Of Adam. The paper has 10,000 steps on samples; the moment has no noise, so fewer do.
    price
        Of a value between 0 and 1. On Gaussian weights with correlated inputs 2, 5 and 20 are alike, and 0.05 leaves
        30% more loss.
    symmetric
        Grids around zero, without zero points.
    """

    by_rows = True
    takes = ("bits", "group", "symmetric", "scale")

    steps: int = 500
    rate: float = 0.05
    price: float = 2.0
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.rate > 0 or not self.price >= 0:
            raise RequestError(
                f"{self.name}: steps is {self.steps!r}, rate {self.rate!r} and price {self.price!r}; give at least one "
                "step, a rate above 0 and a price of 0 or more"
            )

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """4 to 2 bits in groups of 64; with more bits rounding hardly matters."""
        return [{"bits": bits, "group": 64} for bits in (4, 3, 2)]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        weight = weight.float()
        fitted = fit(self.name, weight, setting, self.symmetric)
        codes = nearest(weight, fitted)
        if evidence.columns is not None and weight.numel():
            require_finite(evidence.columns)
            moment = evidence.columns.float()
            moment = moment / moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
            height = max(1, _CHUNK // weight.shape[1])
            for start in range(0, len(weight), height):
                span = slice(start, start + height)
                codes[span] = self._learned(weight[span], codes[span], _rows(fitted, span), moment)
        return fitted.grid(codes)

    def _learned(self, weight: Tensor, near: Tensor, fitted: Fitted, moment: Tensor) -> Tensor:
        """Codes of some rows."""
        steps, zero = _spread(fitted, weight.shape[1])
        aimed = weight / steps + zero
        # Steps of a row differ by group: errors are in units of the row's mean step.
        units = steps / steps.mean(1, keepdim=True)
        floor = aimed.floor()
        latent = ((aimed - floor - _LOW) / (_HIGH - _LOW)).logit().requires_grad_(True)
        adam = torch.optim.Adam([latent], self.rate)

        def loss(codes: Tensor) -> Tensor:
            error = (aimed - codes.clamp(fitted.low, fitted.high)) * units
            return ((error @ moment) * error).sum(1)

        with torch.enable_grad():
            for step in range(self.steps):
                up = (latent.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)
                cost = loss(floor + up).sum()
                at = (step / self.steps - _FREE) / (1 - _FREE)
                if at >= 0:
                    sharpness = _SHARP + (_FLAT - _SHARP) * at
                    cost = cost + self.price * (1 - (2 * up - 1).abs().pow(sharpness)).sum()
                adam.zero_grad()
                cost.backward()
                adam.step()
        codes = (floor + (latent.detach() > 0)).clamp(fitted.low, fitted.high)
        better = loss(codes) < loss(near.float())
        return torch.where(better[:, None], codes.to(near.dtype), near)


def _rows(fitted: Fitted, span: slice) -> Fitted:
    zero = None if fitted.zero is None else fitted.zero[span]
    return Fitted(fitted.scale[span], zero, fitted.width, fitted.low, fitted.high)


def _spread(fitted: Fitted, columns: int) -> tuple[Tensor, Tensor | float]:
    """Steps and zero points of every weight."""
    scale, zero = fitted.spread(slice(None))
    steps = scale.t().repeat_interleave(fitted.width, 1)[:, :columns]
    if not isinstance(zero, Tensor):
        return steps, zero
    return steps, zero.t().repeat_interleave(fitted.width, 1)[:, :columns]
