"""Codebooks of groups of similar rows, whose values and codes are learned together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import Codebook, Form, RowBlocks
from octavo.methods.base import Method, Setting, method
from octavo.methods.knobs import whole
from octavo.methods.quantize.grids import compact
from octavo.methods.quantize.kmeans import KMeans

#: Quantiles that describe the distribution of a row.
_QUANTILES = 17
#: The distance at which the pull of a value stops growing, in mean distances of neighbouring values.
_NEAR = 0.25
#: Logits in memory at once, in elements.
_CHUNK = 1 << 22
_ADAM, _TINY = (0.9, 0.99), 1e-12


@method("jlcm", family="quantize", preset="named", source="JLCM (Yvinec et al., 2023, arXiv 2309.17361)")
@dataclass(frozen=True)
class JointCodebooks(Method):
    """``W[i, j] = scale[i] * values[g(i)][codes[i, j]]``: a codebook for each group of rows of similar distribution.

    Rows are grouped by their quantiles, and every book starts from k-means. Each weight has a logit for every value of
    its book. Logits move with the gradient ``g`` of ``sum_i r[i] (E C E^T)[i, i]``. The gradient of a softmax is
    largest for far values, so codes would jump to the ends of the book. Instead, the logit of value ``k`` moves by
    ``g * sign(c[k] - w) / (|c[k] - w| + near)``: the next value is always the first that a weight tries. Between rounds
    the values of a book are the least squares solution for its codes.

    Here books are solved instead of learned by gradients, and logits start again each round, so that those of few rows
    are in memory.

    Parameters
    ----------
    groups
        Books of a matrix, at most; matrices with fewer than 16 rows a book have fewer.
    mapping
        What moves the codes: ``proximal`` as above, ``softmax`` for the true gradient, or ``nearest`` for none.
    rounds, steps
        How often books are solved, and steps of the logits before each.
    rate
        Of the logits' Adam; the logits of neighbouring values differ by up to one at first.
    """

    takes = ("values",)

    groups: int = 4
    mapping: str = "proximal"
    rounds: int = 4
    steps: int = 100
    rate: float = 0.005

    def __post_init__(self) -> None:
        if self.mapping not in (*_PULLS, "nearest"):
            known = ", ".join((*_PULLS, "nearest"))
            raise RequestError(f"{self.name}: mapping is {self.mapping!r}; choose from {known}")
        if not 1 <= self.groups <= 64 or self.rounds < 0 or self.steps < 0:
            raise RequestError(
                f"{self.name}: groups is {self.groups!r}, rounds {self.rounds!r} and steps {self.steps!r}; give 1 to "
                "64 groups, and at least 0 of the others"
            )

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Books of 16 to 4 values."""
        return [{"values": size} for size in (16, 8, 4)]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:
        """Groups, then books and codes by turns."""
        size = whole(self.name, setting, "values", 1, 256)
        weight = weight.float()
        peak = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        scale = compact(peak * (weight / peak).square().mean(1, keepdim=True).sqrt())
        scaled = weight / scale.float()
        importance = evidence.rows.float() * (scale.float() / scale.float().max()).square().flatten()
        moment = evidence.moment(weight.shape[1]).float()
        member = _grouped(scaled, min(self.groups, max(1, len(weight) // 16)))
        blocks: list[Form] = []
        for number in range(int(member.max()) + 1):
            here = member == number
            part = Evidence(importance[here], evidence.columns, evidence.samples)
            start = KMeans(row_scale=False, feedback=False).encode(scaled[here], {"values": size}, part)
            assert isinstance(start, Codebook)
            codes, values = self._learned(scaled[here], importance[here], moment, start.codes, start.values)
            blocks.append(Codebook(codes, values, scale[here]))
        return blocks[0] if len(blocks) == 1 else RowBlocks(member.to(torch.uint8), tuple(blocks))

    def _learned(
        self, rows: Tensor, importance: Tensor, moment: Tensor, codes: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The codes and values of least loss among all rounds."""

        def loss(codes: Tensor, values: Tensor) -> float:
            error = rows - values.float()[codes.long()]
            return float(((error @ moment * error).sum(1) * importance).sum())

        best, least = (codes, values), loss(codes, values)
        for _ in range(self.rounds if len(values) > 1 else 0):
            if self.mapping in _PULLS:
                codes = self._moved(rows, moment, codes, values.float())
            values = _solved(rows, importance, moment, codes, values)
            if (found := loss(codes, values)) < least:
                best, least = (codes, values), found
            if self.mapping not in _PULLS:
                break
        return best

    def _moved(self, rows: Tensor, moment: Tensor, codes: Tensor, values: Tensor) -> Tensor:
        """Codes after all steps with these values, few rows at once: a row's loss does not depend on others."""
        height = max(1, _CHUNK // (rows.shape[1] * len(values)))
        parts = zip(rows.split(height), codes.split(height), strict=True)
        return torch.cat([self._stepped(part, moment, own, values) for part, own in parts])

    def _stepped(self, rows: Tensor, moment: Tensor, codes: Tensor, values: Tensor) -> Tensor:
        spacing = ((values.max() - values.min()) / (len(values) - 1)).clamp_min(_TINY)
        # Codes of the last round stay ahead, whatever the values are now.
        logits = -(rows[..., None] - values).abs() / spacing
        top = logits.amax(2, keepdim=True)
        logits.scatter_(2, codes.long()[..., None], top + 1e-3)
        first, second = torch.zeros_like(rows), torch.zeros_like(rows)
        best, least = codes, torch.full((len(rows),), torch.inf)
        for step in range(self.steps + 1):
            moved = logits.argmax(2)
            chosen = values[moved]
            gradient = (chosen - rows) @ moment
            # Rows do not depend on each other, so each keeps the best of its own codes.
            lost = ((chosen - rows) * gradient).sum(1)
            best, least = torch.where((lost < least)[:, None], moved, best), torch.minimum(lost, least)
            first.lerp_(gradient, 1 - _ADAM[0])
            second.lerp_(gradient.square_(), 1 - _ADAM[1])
            size = second.div(1 - _ADAM[1] ** (step + 1)).sqrt_().clamp_min_(torch.finfo(torch.float32).tiny)
            force = first.div(size).mul_(self.rate / (1 - _ADAM[0] ** (step + 1)))
            logits.addcmul_(_PULLS[self.mapping](values, chosen, logits, spacing), force[..., None], value=-1)
        return best.to(codes.dtype)


def _proximal(values: Tensor, chosen: Tensor, logits: Tensor, spacing: Tensor) -> Tensor:
    """Nearer values are pulled more; those at the usual distance by about one."""
    apart = (values - chosen[..., None]) / spacing
    return (1 + _NEAR) * apart.sign() / (apart.abs() + _NEAR)


def _softmax(values: Tensor, chosen: Tensor, logits: Tensor, spacing: Tensor) -> Tensor:
    """The true gradient of a mixture of all values: farther ones are pulled more."""
    shares = logits.softmax(2)
    return shares * (values - (shares * values).sum(2, keepdim=True)) / spacing


_PULLS: MappingProxyType[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = MappingProxyType(
    {"proximal": _proximal, "softmax": _softmax}
)


def _solved(rows: Tensor, importance: Tensor, moment: Tensor, codes: Tensor, values: Tensor) -> Tensor:
    """The values of least loss for given codes: one linear system for a book. Values without weights stay."""
    size, codes = len(values), codes.long()
    # The cost of using value k at a place, summed over the places that use value l.
    matrix, right = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    wanted = (rows @ moment) * importance[:, None]
    for k in range(size):
        seen = (codes == k).float() @ moment * importance[:, None]
        matrix[k] = torch.zeros(size, dtype=torch.float64).index_add_(0, codes.flatten(), seen.double().flatten())
        right[k] = wanted[codes == k].double().sum()
    ridge = 1e-6 * matrix.diagonal().mean().clamp_min(_TINY)
    matrix.diagonal().add_(ridge)
    found = torch.linalg.solve(matrix, right + ridge * values.double()).to(values.dtype)
    return torch.where(found.isfinite(), found, values)


def _grouped(scaled: Tensor, groups: int) -> Tensor:
    """The group (rows,) of every row, by k-means on quantiles; groups are numbered, and none is empty."""
    # Extremes are too noisy to tell distributions apart.
    places = (torch.arange(_QUANTILES) + 0.5) / _QUANTILES
    points = scaled.sort(1).values[:, (places * (scaled.shape[1] - 1)).round().long()]
    # Rows in the order of their widest quantiles give starts that differ.
    order = points[:, -1].sub(points[:, 0]).argsort(stable=True)
    centres = points[order[((torch.arange(groups) + 0.5) / groups * len(order)).long()]]
    member = torch.zeros(len(points), dtype=torch.long)
    for _ in range(25):
        member = torch.cdist(points, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, member, points)
        counts = member.bincount(minlength=len(centres))
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
    return member.unique(return_inverse=True)[1]
