"""GPTQ: round to nearest with error feedback."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.forms import Form
from octavo.methods.base import Method, Setting, method
from octavo.methods.feedback import factored, round_blocks, round_columns, swept
from octavo.methods.quantize.grids import SETTINGS, Fitted, fit, kernel_settings, nearest
from octavo.system.compiled import compiled

#: Columns a group of onnxruntime's blockwise kernel; the first that divides a matrix is taken.
_BLOCK_WIDTHS = (64, 128, 32, 16)


@method("gptq", family="quantize", source="GPTQ (Frantar et al., 2022, arXiv 2210.17323)")
@dataclass(frozen=True)
class GPTQ(Method):
    """The grid of ``rtn``, with every column rounded after adding the error feedback of preceding columns.

    Minimises ``tr(E C E^T)`` greedily, column after column: ``codes[:, j] = round(target[:, j] / scale) + zero`` with
    ``target = W - sum_k F[:, k] inverse(V)[k, j]`` (:mod:`octavo.methods.feedback`); ``W``, ``E`` are (rows, columns),
    ``C`` (columns, columns) is the second moment of the inputs. The grids are fitted to the groups of the original
    matrix before the first column is rounded ("static groups"). So columns can have any order and keep their groups.
    Without a moment it is ``rtn``.

    Parameters
    ----------
    order
        Round the columns of large inputs first ("activation order"), while most others can still compensate their
        errors.
    symmetric
        Grids around zero, without zero points.
    """

    by_rows = True
    takes = ("bits", "group", "symmetric", "scale")

    order: bool = True
    symmetric: bool = False

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """8 to 2 bits in groups of 64."""
        return [dict(setting) for setting in SETTINGS]

    def kernel_settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """8 bits with one scale per row, and 4 bits in every group size that the kernel supports."""
        return kernel_settings(weight)

    def speed_settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """8 bits in the groups that the blockwise kernel takes."""
        width = next((width for width in _BLOCK_WIDTHS if weight.shape[1] % width == 0), None)
        return [] if width is None else [{"bits": 8, "group": width}]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        return next(self.encode_all(weight, [setting], evidence))

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """All settings share the factorisation of the moment."""
        weight = weight.float()
        for setting in settings:
            fitted = fit(self.name, weight, setting, self.symmetric)
            if evidence.columns is None:
                yield fitted.grid(nearest(weight, fitted))
                continue
            order, _, feedback = factored(evidence, ordered=self.order)
            yield fitted.grid(_sweep(weight, fitted, order, feedback))


def _sweep(weight: Tensor, fitted: Fitted, order: Tensor, feedback: Tensor) -> Tensor:
    """Codes (rows, columns) of one pass over the columns in ``order``."""
    groups = order // fitted.width

    def codes(rows: slice, targets: Tensor) -> Tensor:
        scale, zero = fitted.spread(rows)
        # Codes without zero points lie between the two bounds.
        low, high = (torch.as_tensor(bound - zero).expand_as(scale) for bound in (fitted.low, fitted.high))
        rounded = _rounded(targets, feedback, groups, scale, low, high)
        # The values are exact multiples of their steps, so division restores their codes.
        return rounded.div_(scale[groups]).round_().add_(zero if isinstance(zero, float) else zero[groups])

    return swept(weight, order, codes, dtype=fitted.dtype)


def _rounded(targets: Tensor, feedback: Tensor, groups: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Values (columns, rows) on the grids of their groups: steps and bounds of codes are (groups, rows)."""
    quick = compiled(_round_block) if targets.device.type == "cpu" else None
    if quick is not None:
        tables = tuple(table.contiguous().numpy() for table in (scale, low, high))

        def sweep(start: int, *block: Tensor) -> None:
            quick(*(tensor.numpy() for tensor in block), groups[start : start + len(block[0])].numpy(), *tables)

        return round_blocks(targets, feedback, sweep)
    places = groups.tolist()

    def quantize(j: int, target: Tensor) -> Tensor:
        g = places[j]
        return (target / scale[g]).round_().clamp_(low[g], high[g]).mul_(scale[g])

    return round_columns(targets, feedback, quantize)


def _round_block(
    targets: np.ndarray,
    feedback: np.ndarray,
    rounded: np.ndarray,
    groups: np.ndarray,
    scale: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> None:
    """Round a block of columns (:func:`octavo.methods.feedback.round_blocks`), for numba."""
    width, height = targets.shape
    for j in range(width):
        target, g = targets[j], groups[j]
        for k in range(j):
            share, errors = feedback[k, j], targets[k]
            for i in range(height):
                target[i] += share * errors[i]
        for i in range(height):
            code = min(max(np.rint(target[i] / scale[g, i]), low[g, i]), high[g, i])
            rounded[j, i] = code * scale[g, i]
            target[i] -= rounded[j, i]
