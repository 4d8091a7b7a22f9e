"""Integers of 4 and 8 bits with scales and no zero points, as compressed-tensors stores and vLLM runs them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import Form, Grid
from octavo.methods.base import Method, Setting, method
from octavo.methods.feedback import factored, round_columns
from octavo.methods.knobs import whole
from octavo.methods.quantize.descent import descended, fitted_scales
from octavo.sources.sites import Layout, Site

#: Group sizes of the kernels that run such weights.
GROUPS = (32, 64, 128)
#: Scales to try, as shares of the one that reaches a group's extreme.
_SHARES = (1.05, 1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.62, 0.56)
#: Times that scales are fitted to codes and codes descend again.
_ROUNDS = 2
#: Weights that are worked on together: their copies fit the cache.
_CHUNK = 1 << 19


@method(
    "wna16",
    family="quantize",
    preset="fast",
    source="GPTQ (Frantar et al., 2022, arXiv 2210.17323), then QuantEase (Behdin et al., 2023, arXiv 2309.01885)",
)
@dataclass(frozen=True)
class WeightOnlyIntegers(Method):
    """``W[i, j] = scale[i, g] * codes[i, j]`` with codes of 4 or 8 bits and bfloat16 scales of either sign.

    The loss is ``tr(E C E^T)``; ``W``, ``E`` are (rows, columns), ``C`` (columns, columns) is the second moment of the
    inputs. Each group's scale is first the best of a few, of both signs, for rounding to nearest; the error of a column
    counts with the share of its moment for which later columns cannot compensate. With a negative scale the lowest
    code, which has no counterpart, stands for the largest positive weight. Then columns are rounded with error feedback
    (:mod:`octavo.methods.feedback`). Then scales are fitted to codes, and codes are improved one at a time, in turn
    (:mod:`octavo.methods.quantize.descent`). Without a moment scales are searched and codes are the nearest.
    """

    by_rows = True
    takes = ("bits", "group")
    runtimes = ("compressed-tensors",)

    def accepts(self, site: Site) -> bool:
        """Weights of linear layers alone; what is tied is stored once, in 16 bits, since no loader ties codes."""
        return site.kind in ("linear", "head") and site.layout == Layout() and not site.tied

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """8 bits with one scale per row, then 4 bits with ever fewer scales."""
        columns = weight.shape[1]
        groups = [group for group in GROUPS if columns % group == 0 and group < columns]
        return [{"bits": 8, "group": "row"}, *({"bits": 4, "group": group} for group in [*groups, "row"])]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        return next(self.encode_all(weight, [setting], evidence))

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """All settings share the factorisation of the moment."""
        weight = weight.float()
        height = max(1, _CHUNK // max(weight.shape[1], 1))
        for setting in settings:
            bits, groups = self._read(setting, weight.shape[1])
            parts = [_rounded(part, bits, groups, evidence) for part in weight.split(height)]
            codes, scale = (torch.cat(found) for found in zip(*parts, strict=True))
            yield Grid(codes.to(torch.int8), scale.bfloat16())

    def _read(self, setting: Setting, columns: int) -> tuple[int, int]:
        """Bits and groups a row."""
        bits = whole(self.name, setting, "bits", 4, 8)
        if bits not in (4, 8):
            raise RequestError(f"{self.name}: bits is {bits} in the setting {setting}; choose 4 or 8")
        if setting.get("group") == "row":
            return bits, 1
        group = whole(self.name, setting, "group", 1)
        if columns % group:
            raise RequestError(
                f"{self.name}: groups of {group} do not divide the {columns} columns of this matrix; choose another "
                "group, or 'row'"
            )
        return bits, columns // group


def _rounded(weight: Tensor, bits: int, groups: int, evidence: Evidence) -> tuple[Tensor, Tensor]:
    """Codes (rows, columns) and scales (rows, groups) of some rows, float32."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if evidence.columns is None:
        scale = _searched(weight, torch.ones(weight.shape[1]), groups, low, high)
        return (weight / _spread(scale, weight)).round_().clamp_(low, high), scale
    order, importance, feedback = factored(evidence)
    weights = torch.empty_like(importance)
    weights[order] = importance
    scale = _searched(weight, weights, groups, low, high)
    steps = _spread(scale, weight).t()[order].contiguous()

    def nearest(j: int, target: Tensor) -> Tensor:
        return (target / steps[j]).round_().clamp_(low, high).mul_(steps[j])

    rounded = round_columns(weight.t()[order].contiguous(), feedback, nearest)
    codes = torch.empty_like(weight)
    codes[:, order] = (rounded / steps).round_().t()
    moment = evidence.columns
    levels = torch.arange(low, high + 1, dtype=torch.float32)

    def improved_codes(codes: Tensor, scale: Tensor) -> Tensor:
        return levels[descended(weight, (codes - low).int(), scale, None, levels, moment)]

    codes = improved_codes(codes, scale)
    least = _cost(weight, codes, scale, moment)
    for _ in range(_ROUNDS):
        fitted = _narrow(fitted_scales(weight, codes, scale, moment))
        improved = improved_codes(codes, fitted)
        cost = _cost(weight, improved, fitted, moment)
        # Scales are rounded, which may cost a row more than fitting gained.
        better = cost < least
        codes, scale = (torch.where(better[:, None], new, old) for new, old in ((improved, codes), (fitted, scale)))
        least = torch.minimum(cost, least)
    return codes, scale


def _searched(weight: Tensor, weights: Tensor, groups: int, low: int, high: int) -> Tensor:
    """The scale of every group, (rows, groups) bfloat16 values, of least weighted error of rounding to nearest."""
    grouped, weights = weight.view(len(weight), groups, -1), weights.view(1, groups, -1)
    top, bottom = grouped.amax(2), grouped.amin(2)
    # The extreme of larger magnitude gets the lowest code.
    reach = torch.where(top > -bottom, top, bottom) / low
    best, least = _narrow(reach), torch.full_like(reach, torch.inf)
    for sign in (1.0, -1.0):
        for share in _SHARES:
            scale = _narrow(sign * share * reach)
            steps = scale[..., None]
            error = (grouped / steps).round_().clamp_(low, high).mul_(steps).sub_(grouped).square_().mul_(weights)
            cost = error.sum(2)
            better = cost < least
            best, least = torch.where(better, scale, best), torch.minimum(cost, least)
    return best


def _narrow(scale: Tensor) -> Tensor:
    """Scales as bfloat16 values in float32; none is zero or Inf."""
    limits = torch.finfo(torch.bfloat16)
    size = scale.abs().clamp(limits.tiny, limits.max).bfloat16().float()
    return torch.where(scale < 0, -size, size)


def _spread(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)


def _cost(weight: Tensor, codes: Tensor, scale: Tensor, moment: Tensor) -> Tensor:
    """``E C E^T`` of every row, (rows,)."""
    error = weight - codes * _spread(scale, weight)
    return ((error @ moment) * error).sum(1)
