"""Code shared by pruning methods: settings, exact masks from scores, and survivors on a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.errors import RequestError
from octavo.forms import Exact, Grid, Sparse
from octavo.methods.base import Setting
from octavo.methods.knobs import real, whole

_PATTERNS = ((2, 4), (4, 8))
#: More than 4 bits per survivor do not lower the loss once half of the weights are pruned.
_CHOICES = (
    (0.3, 6),
    (0.3, 5),
    (0.3, 4),
    (0.5, 4),
    (0.5, 3),
    (0.7, 4),
    (0.7, 3),
    (0.8, 3),
    (0.8, 2),
    (0.9, 3),
    (0.9, 2),
)
#: Codes stay below this, where float32 holds every integer.
_LARGEST_CODE = 2.0**23


@dataclass(frozen=True)
class MaskRequest:
    """A parsed setting: a share of zeros or an n:m pattern, and the bits of the survivors, None if not rounded."""

    bits: int | None
    sparsity: float
    pattern: tuple[int, int] | None

    def kept(self, total: int) -> int:
        """Number of survivors of ``total`` weights."""
        return total - round(self.sparsity * total)


def read(method: str, setting: Setting, columns: int) -> MaskRequest:
    """Check a setting ``{"sparsity": 0.5, "bits": 4}`` or ``{"pattern": "2:4"}``; without bits nothing is rounded."""
    bits = whole(method, setting, "bits", 2, 16) if "bits" in setting else None
    if "pattern" not in setting:
        return MaskRequest(bits, real(method, setting, "sparsity", 0.0, 1.0), None)
    parts = str(setting["pattern"]).split(":")
    if "sparsity" in setting or len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise RequestError(
            f"{method}: the setting {setting} needs either a sparsity or a pattern; add one, such as '2:4'"
        )
    keep, group = int(parts[0]), int(parts[1])
    if not 0 < keep <= group <= 8:
        raise RequestError(f"{method}: invalid n:m pattern {keep}:{group}; choose 1 ≤ n ≤ m ≤ 8")
    if columns % group:
        raise RequestError(
            f"{method}: pattern {keep}:{group} does not divide the {columns} columns of this matrix; choose a group "
            "that does, or a sparsity"
        )
    return MaskRequest(bits, 1 - keep / group, (keep, group))


def settings(columns: int) -> list[Setting]:
    """Sparsities, and the patterns that divide the columns, from largest to smallest file."""
    # The more weights are pruned, the more similar are the survivors.
    sized: list[tuple[float, Setting]] = [
        (_mask_bits(zeros) + (1 - zeros) * (bits + 0.8 - 2.2 * zeros), {"sparsity": zeros, "bits": bits})
        for zeros, bits in _CHOICES
    ]
    for keep, group in _PATTERNS:
        if columns % group == 0:
            for bits in (4, 3):
                place = math.log2(math.comb(group, keep)) / group
                sized.append((place + keep / group * (bits + 0.1), {"pattern": f"{keep}:{group}", "bits": bits}))
    return [setting for _, setting in sorted(sized, key=lambda pair: -pair[0])]


def _mask_bits(zeros: float) -> float:
    """Entropy of a mask in bits per weight."""
    return -zeros * math.log2(zeros) - (1 - zeros) * math.log2(1 - zeros)


def largest(scores: Tensor, kept: int) -> Tensor:
    """A mask of exactly ``kept`` scores of a whole matrix; ties keep the first."""
    return largest_by_row(scores.reshape(1, -1), kept).view(scores.shape)


def largest_by_row(scores: Tensor, kept: int) -> Tensor:
    """A mask of exactly ``kept`` scores of every row."""
    rows, columns = scores.shape
    if kept <= 0 or kept >= columns or rows == 0:
        return torch.full(scores.shape, kept > 0)
    threshold = scores.kthvalue(columns - kept + 1, dim=1, keepdim=True).values
    above, ties = scores > threshold, scores == threshold
    missing = kept - above.sum(1, keepdim=True)
    if bool((ties.sum(1, keepdim=True) > missing).any()):
        ties &= ties.cumsum(1) <= missing
    return above | ties


def largest_by_group(scores: Tensor, pattern: tuple[int, int]) -> Tensor:
    """A mask of exactly n scores of every m neighbours in a row."""
    keep, group = pattern
    parts = scores.reshape(-1, group).t()
    rank = torch.zeros(parts.shape, dtype=torch.uint8)
    # Count the neighbours that beat each score: for small groups this is faster than sorting.
    for i in range(group):
        for j in range(i):
            loses = parts[j] >= parts[i]
            rank[i] += loses
            rank[j] += ~loses
    return (rank < keep).t().reshape(scores.shape)


def choose(scores: Tensor, request: MaskRequest, by_row: bool) -> Tensor:
    """The mask of a request."""
    if request.pattern is not None:
        return largest_by_group(scores, request.pattern)
    if by_row:
        return largest_by_row(scores, request.kept(scores.shape[1]))
    return largest(scores, request.kept(scores.numel()))


def step_of(weight: Tensor, mask: Tensor, bits: int) -> float:
    """The step of the survivors: their median magnitude gets the code ``2^(bits - 2)``, nothing is clipped.

    That is the middle of the range of signed ``bits``-bit integers. Large weights are few, so they cost an entropy
    coder little. The median is robust to outliers.
    """
    size = weight[mask].abs()
    size = size[size > 0]
    if not size.numel():
        return 1.0
    step = max(float(size.median()) / 2 ** (bits - 2), float(size.max()) / _LARGEST_CODE)
    return max(step, torch.finfo(torch.float32).tiny)


def survivors(codes: Tensor, mask: Tensor, step: float, pattern: tuple[int, int] | None) -> Sparse:
    """The form of codes (rows, columns) under a mask.

    Survivors rounded to zero are removed from the mask, unless a pattern needs exactly n of every m.
    """
    if pattern is None:
        mask = mask & (codes != 0)
    kept = codes[mask].to(torch.int64)
    reach = int(kept.abs().max()) if kept.numel() else 0
    dtype = torch.int8 if reach < 128 else torch.int16 if reach < 32768 else torch.int32
    return Sparse(mask, Grid(kept.to(dtype)[None], torch.full((1, 1), step)), pattern)


def unrounded(weight: Tensor, mask: Tensor, pattern: tuple[int, int] | None) -> Sparse:
    """Survivors as they are, in the narrowest float type that holds them all."""
    return Sparse(mask, Exact.of(weight[mask][None]), pattern)


def quantized(weight: Tensor, mask: Tensor, bits: int | None, pattern: tuple[int, int] | None) -> Sparse:
    """Survivors rounded to nearest, or not at all without ``bits``."""
    if bits is None:
        return unrounded(weight, mask, pattern)
    step = step_of(weight, mask, bits)
    return survivors((weight / torch.tensor(step)).round_(), mask, step, pattern)
