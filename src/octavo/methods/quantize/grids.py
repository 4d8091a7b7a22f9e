"""The grid of round-to-nearest and GPTQ: scales and zero points fitted to groups of columns.

A group of a row with extremes ``low <= 0 <= high`` (zero is always included, so it stays exact) has

    scale = (high - low) / (2^bits - 1),    zero = round(-low / scale),    codes in 0 .. 2^bits - 1

or, symmetric, ``scale = max|w| / (2^(bits-1) - 1)`` without a zero point and codes of either sign.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.forms import Grid
from octavo.methods.base import Setting
from octavo.methods.knobs import choice, flag, whole

#: Bits and group sizes to try, from largest to smallest file.
SETTINGS: tuple[Setting, ...] = tuple({"bits": bits, "group": 64} for bits in (8, 6, 5, 4, 3, 2))

#: Group sizes of PyTorch's int4 kernel, and the column multiple of its int8 kernel.
_KERNEL_GROUPS, _KERNEL_COLUMNS = (32, 64, 128, 256), 16

_SMALLEST_NORMAL, _SMALLEST, _LARGEST = 2.0**-14, 2.0**-24, 65504.0


def kernel_settings(weight: Tensor) -> list[Setting]:
    """Settings that PyTorch's kernels run: scales in bfloat16, 8 bits without zero points."""
    columns = weight.shape[1]
    settings: list[Setting] = []
    if columns % _KERNEL_COLUMNS == 0:
        settings.append({"bits": 8, "group": "row", "symmetric": True, "scale": "bfloat16"})
    groups = [group for group in _KERNEL_GROUPS if columns % group == 0]
    return settings + [{"bits": 4, "group": group, "scale": "bfloat16"} for group in groups]


def compact(values: Tensor) -> Tensor:
    """Positive values as float16 if their range allows it, else float32; none becomes zero.

    A few values below the range of float16 do not force float32: their error is negligible next to the others.
    """
    values = values.float().clamp_min(torch.finfo(torch.float32).tiny)
    if values.numel() == 0 or (float(values.max()) <= _LARGEST and float(values.median()) >= _SMALLEST_NORMAL):
        return values.clamp_min(_SMALLEST).half()
    return values


def _bfloat16(values: Tensor) -> Tensor:
    """Positive values as bfloat16; none becomes zero or Inf."""
    return values.float().clamp(torch.finfo(torch.float32).tiny, torch.finfo(torch.bfloat16).max).bfloat16()


@dataclass(frozen=True)
class Fitted:
    """Steps and zero points of all groups of a matrix.

    Parameters
    ----------
    scale
        (rows, groups), all positive.
    zero
        (rows, groups) uint8, or None if symmetric.
    width
        Group size in columns; the last group may be shorter.
    low, high
        Smallest and largest code.
    """

    scale: Tensor
    zero: Tensor | None
    width: int
    low: int
    high: int

    def spread(self, rows: slice) -> tuple[Tensor, Tensor | float]:
        """Scales and zero points of some rows, transposed to (groups, rows) floats."""
        zero = 0.0 if self.zero is None else self.zero[rows].t().float().contiguous()
        return self.scale[rows].t().float().contiguous(), zero

    def grid(self, codes: Tensor) -> Grid:
        """The form of codes on this grid."""
        return Grid(codes, self.scale, self.zero)

    @property
    def dtype(self) -> torch.dtype:
        """The integer type of the codes."""
        return torch.int8 if self.zero is None else torch.uint8


def fit(method: str, weight: Tensor, setting: Setting, symmetric: bool) -> Fitted:
    """Fit the groups of ``weight`` to their extremes.

    The setting has ``bits``; ``group``, columns or ``"row"``; and, where kernels want them so, ``symmetric`` and
    ``scale: bfloat16``.
    """
    bits = whole(method, setting, "bits", 2, 8)
    symmetric = flag(method, setting, "symmetric", symmetric)
    narrow = _bfloat16 if "scale" in setting and choice(method, setting, "scale", ("bfloat16",)) else compact
    rows, columns = weight.shape
    by_row = setting.get("group") == "row"
    groups = 1 if by_row else -(-columns // min(whole(method, setting, "group", 1), columns))
    # The form spreads the columns evenly: 100 columns in groups of 64 are two groups of 50.
    width = -(-columns // groups)
    padded = torch.nn.functional.pad(weight.float(), (0, groups * width - columns)).view(rows, groups, width)
    if symmetric:
        high = 2 ** (bits - 1) - 1
        scale = narrow(padded.abs().amax(2) / high)
        return Fitted(scale, None, width, -high - 1, high)
    levels = 2**bits - 1
    # Divided before subtracting, which could overflow.
    low, top = padded.amin(2).clamp_max(0) / levels, padded.amax(2).clamp_min(0) / levels
    scale = narrow(top - low)
    zero = (low / scale.float() * -levels).round_().clamp_(0, levels).to(torch.uint8)
    return Fitted(scale, zero, width, 0, levels)


def nearest(weight: Tensor, fitted: Fitted) -> Tensor:
    """Nearest codes (rows, columns)."""
    codes = torch.empty(weight.shape, dtype=fitted.dtype)
    scale = fitted.scale.float()
    for group in range(scale.shape[1]):
        span = slice(group * fitted.width, (group + 1) * fitted.width)
        values = (weight[:, span] / scale[:, group, None]).round_()
        if fitted.zero is not None:
            values += fitted.zero[:, group, None]
        codes[:, span] = values.clamp_(fitted.low, fitted.high).to(fitted.dtype)
    return codes
