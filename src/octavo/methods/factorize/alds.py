"""ALDS: low-rank products of groups of input channels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import Dense, GroupedLowRank
from octavo.methods.base import Method, Setting, method
from octavo.methods.factorize import factors
from octavo.methods.factorize.factors import Factors
from octavo.methods.knobs import real, whole
from octavo.sources.sites import Site

SOURCE = "ALDS (Liebenwein et al., 2021, arXiv 2107.11442)"


@method("alds", family="factorize", preset="best", source=SOURCE)
@dataclass(frozen=True)
class ALDS(Method):
    """``W = [U_1 V_1, ..., U_k V_k]``: columns in ``k`` groups of input channels, each of rank ``j``.

    ``W`` is (rows, columns), ``U_i`` (rows, j), ``V_i`` (j, columns / k); a unit of rank takes ``k rows + columns``
    coefficients. A convolution of (f, c, h, w) is read as (f, c h w), so equal groups of columns are groups of channels
    if ``k`` divides ``c``. As layers this is a convolution in ``k`` groups, then one of 1 x 1.

    Every group has a truncated SVD, which is optimal in the spectral norm: ``|W - W'|_2 <= sqrt(k) max_i
    sigma_{j+1}(W_i)``. Here the SVD is that of ``diag(sqrt r) W_i L_i`` with ``C_ii = L_i L_i^T``: the factors of
    ``activation-svd`` with the evidence of the group, which without evidence are those of the paper. The search ignores
    moments between groups, but the expected loss of a point includes them. The allocator chooses ``(k, j)`` of a layer;
    the paper's allocation over all layers of a network is :func:`octavo.methods.factorize.alds_network.alds_forms`.

    Parameters
    ----------
    groups
        Numbers of groups to try, if they divide the input channels.
    """

    takes = ("groups", "rank", "bits")

    groups: tuple[int, ...] = (1, 2, 4, 8)

    def accepts(self, site: Site) -> bool:
        """Linear layers, and convolutions with several input channels per group, so not depthwise ones."""
        return site.kind not in ("embedding", "vector") and (site.kind != "convolution" or _channels(site) > 1)

    def at_site(self, site: Site) -> ALDS:
        """For a convolution only the numbers of groups that divide its channels; 1 always does."""
        return replace(self, groups=tuple(k for k in self.groups if _channels(site) % k == 0))

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Ranks and bits of an SVD for one group, and every second of them for several groups."""
        rows, columns = weight.shape
        sized = []
        for groups in (k for k in self.groups if columns % k == 0):
            for setting in factors.settings(rows, columns // groups)[:: 1 if groups == 1 else 2]:
                taken = setting["rank"] * (groups * rows + columns) * setting["bits"]
                sized.append((taken, {"groups": groups, **setting}))
        return [setting for _, setting in sorted(sized, key=lambda pair: -pair[0])]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> GroupedLowRank:  # noqa: D102
        return next(self.encode_all(weight, [setting], evidence))

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[GroupedLowRank]:
        """Settings with the same number of groups share their decompositions."""
        rows, columns = weight.shape
        known: dict[int, tuple[list[Factors], Evidence]] = {}
        for setting in settings:
            groups = whole(self.name, setting, "groups", 1, columns)
            if columns % groups:
                divisors = ", ".join(str(k) for k in range(1, columns + 1) if columns % k == 0)
                raise RequestError(
                    f"{self.name}: groups is {groups} in the setting {setting}, which does not divide the {columns} "
                    f"columns of this matrix; choose from {divisors}"
                )
            rank = whole(self.name, setting, "rank", 1, min(rows, columns // groups))
            bits = real(self.name, setting, "bits", 1, 16)
            if groups not in known:
                known[groups] = _whitened(weight, groups, evidence)
            yield _quantized(*known[groups], rank, bits)


def _channels(site: Site) -> int:
    """Input channels of a layer."""
    return site.columns // math.prod(site.shape[2:])


def decomposed(weight: Tensor, groups: int, rank: int) -> GroupedLowRank:
    """The unquantized truncated SVD of every group of columns, for further training."""
    parts = [factors.whitened(part, most=rank) for part in weight.chunk(groups, 1)]
    left, right, _ = _joined(parts, rank)
    return GroupedLowRank(Dense(left), Dense(right.flatten(0, 1)), groups)


def _whitened(weight: Tensor, groups: int, evidence: Evidence) -> tuple[list[Factors], Evidence]:
    """Factors of every group, and the evidence that their right factors share."""
    parts = weight.chunk(groups, 1)
    if evidence.columns is None:
        return [factors.factors(part, evidence) for part in parts], evidence
    blocks = [block.chunk(groups, 1)[i] for i, block in enumerate(evidence.columns.chunk(groups, 0))]
    found = [factors.factors(part, Evidence(evidence.rows, block)) for part, block in zip(parts, blocks, strict=True)]
    # One grid stores all stacked right factors; it has steps for rows, but not for the columns of every group.
    return found, Evidence(evidence.rows, torch.stack(blocks).mean(0), evidence.samples)


def _joined(parts: Sequence[Factors], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Left (rows, k j), right (k, j, columns / k) and values (k, j); missing components of a group are zero."""
    first = [part.first(rank) for part in parts]
    rank = max(len(part.values) for part in first)
    missing = [rank - len(part.values) for part in first]
    left = torch.cat([pad(part.left, (0, lack)) for part, lack in zip(first, missing, strict=True)], 1)
    right = torch.stack([pad(part.right, (0, 0, 0, lack)) for part, lack in zip(first, missing, strict=True)])
    return left, right, torch.stack([pad(part.values, (0, lack)) for part, lack in zip(first, missing, strict=True)])


def _quantized(parts: list[Factors], evidence: Evidence, rank: int, bits: float) -> GroupedLowRank:
    """Like :func:`octavo.methods.factorize.factors.quantized`, but fits the right factor of each group separately."""
    left, right, values = _joined(parts, rank)
    groups, rank, _ = right.shape
    # Missing components, and the component of an all-zero group, do not affect the step.
    used = values[(left.unflatten(1, (groups, rank)) != 0).any(0)]
    used = used if len(used) else values.flatten()
    step = factors.step_for(Factors(left, right[0], used), bits)
    values = values.clamp_min(float(used.min()))
    weights = evidence.rows.clamp_min(float(evidence.rows.max()) * 1e-9).clamp_min(1e-30)
    first = factors.on_grid(left, step, Evidence(weights, torch.diag(values.flatten())))
    stored = first.dense().double().unflatten(1, (groups, rank)).transpose(0, 1)
    heavy = stored * weights.double()[:, None]
    normal = heavy.mT @ stored
    # Components rounded to zero stay zero through the ridge, which also avoids a division by zero.
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += diagonal.amax(1, keepdim=True).clamp_min(1e-200) * 1e-9
    exact = left.double().unflatten(1, (groups, rank)).transpose(0, 1) @ right.double()
    refitted = torch.linalg.solve(normal, heavy.mT @ exact).float()
    implied = Evidence(diagonal.flatten().float(), evidence.columns, cache=evidence.cache)
    return GroupedLowRank(first, factors.on_grid(refitted.flatten(0, 1), step, implied), groups)
