"""Dense-sparse factorization: every row is a sparse combination of the atoms of small dictionaries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence, require_finite
from octavo.forms import DenseSparse, Form
from octavo.methods.base import Method, Setting, method
from octavo.methods.factorize.dictionaries import DictionaryFactors, Shape, learn, narrow, pursue, split
from octavo.methods.knobs import real, whole
from octavo.methods.quantize.entropy import Entropy

#: Width, atoms, non-zeros and bits per coefficient: the hull of the best choices for MiniLM's matrices.
_CHOICES = (
    (16, 32, 8, 6), (16, 32, 8, 4), (16, 32, 6, 4), (16, 32, 4, 4), (16, 32, 4, 3), (16, 32, 3, 3), (16, 16, 2, 3.5),
    (16, 32, 1, 3), (32, 64, 2, 3), (64, 64, 4, 3), (32, 32, 2, 3), (64, 64, 2, 3), (64, 64, 1, 3), (64, 128, 1, 3),
)  # fmt: skip


@method("dense-sparse", family="factorize", preset="best", source="DSFormer (Chand et al., 2023, arXiv 2312.13211)")
@dataclass(frozen=True)
class DenseSparseFactors(Method):
    """Blocks of ``b`` columns ``W_j ~ S_j D_j``: ``D_j`` (m, b) dense, ``S_j`` (rows, m) with ``k`` non-zeros per row.

    Dictionary learning: every row is coded by orthogonal matching pursuit in ``k`` steps, then ``D = (S^T R S + eps
    I)^-1 S^T R W_j`` with the weights of the outputs ``R``, repeatedly. The error is measured at the outputs: with the
    column moment ``C = U U^T``, ``U`` upper triangular, the loss is ``sum_j |R^(1/2) (E_j U_jj + sum_{i<j} E_i
    U_ij)|^2``. Dictionaries are learned for ``W_j U_jj``, and in the last round each block compensates the errors of
    the preceding blocks. Values and dictionary are quantized with one step in units of the loss.

    Parameters
    ----------
    rounds
        Rounds of coding all rows and fitting the dictionaries.
    """

    takes = ("width", "atoms", "nonzeros", "bits")

    rounds: int = 8

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Widths, atoms, non-zeros and bits that fit the matrix, from largest to smallest."""
        rows, columns = weight.shape
        found: dict[tuple[int, int, int, float], float] = {}
        for width, atoms, nonzeros, bits in _CHOICES:
            width, atoms = min(width, columns), min(atoms, rows)
            nonzeros = min(nonzeros, width, atoms)
            # Errors of an atom affect all rows that use it, so its coefficients are finer if there are many.
            finer = bits + math.log2(rows * nonzeros / (atoms * width)) / 2
            places = math.log2(math.comb(atoms, nonzeros))
            size = (nonzeros * bits + places) / width + atoms * max(finer, 0.5) / rows
            found[width, atoms, nonzeros, bits] = size
        ordered = sorted(found, key=lambda choice: -found[choice])
        return [dict(zip(("width", "atoms", "nonzeros", "bits"), choice, strict=True)) for choice in ordered]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        return next(self.encode_all(weight, [setting], evidence))

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """Settings that differ only in bits share the dictionaries."""
        rows, columns = weight.shape
        require_finite(evidence.rows)
        # Scaled so that no square overflows; the result does not depend on the unit.
        unit = float(weight.abs().max()) or 1.0
        weight = weight.float() / unit
        weights = evidence.rows.clamp_min(float(evidence.rows.max()) * 1e-9).clamp_min(1e-30).float()
        known: dict[Shape, tuple[Tensor | None, DictionaryFactors]] = {}
        for setting in settings:
            width = whole(self.name, setting, "width", 1, columns)
            # With more atoms than rows, the atoms would be the rows.
            atoms = whole(self.name, setting, "atoms", 1, rows)
            shape = Shape(width, atoms, whole(self.name, setting, "nonzeros", 1, min(atoms, width)))
            bits = real(self.name, setting, "bits", 1, 16)
            if shape not in known:
                root = _root(evidence.columns, -(-columns // width) * width)
                known[shape] = root, learn(split(weight, width) @ _diagonal(root, width), shape, self.rounds, weights)
            root, found = known[shape]
            yield _quantized(weight, unit, found, root, bits, weights)


def _quantized(
    weight: Tensor, unit: float, found: DictionaryFactors, root: Tensor | None, bits: float, weights: Tensor
) -> Form:
    """Dictionaries as stored, then codes for them."""
    blocks, atoms, width = found.dictionary.shape
    plain, nonzeros = Evidence(weights, None), found.index.shape[2]
    (step,) = Entropy(levels=(bits,)).settings(found.values.transpose(0, 1).flatten(1), plain)
    # An unused atom is stored as zeros.
    energy = torch.einsum("bnm,n->bm", found.sparse().square(), weights)
    kept = found.dictionary * (energy[..., None] > 0)
    moment = None
    if root is not None:
        diagonal = _diagonal(root, width)
        kept = torch.linalg.solve_triangular(diagonal.double(), kept.double(), upper=True, left=False).float()
        moment = (diagonal @ diagonal.mT).mean(0)
    implied = Evidence(energy.flatten().clamp_min(float(energy.max()) * 1e-9).clamp_min(1e-30), moment)
    dictionary = Entropy().encode(kept.flatten(0, 1), step, implied)
    stored = dictionary.dense().view(blocks, atoms, width)
    index, values = _coded(split(weight, width), stored, root, nonzeros)
    # Atoms keep unit length; coefficients carry the scale of the weights.
    coded = Entropy().encode(values * unit, {"step": step["step"] * unit}, plain)
    return DenseSparse(coded, narrow(index), dictionary, nonzeros, weight.shape[1])


def _coded(targets: Tensor, dictionary: Tensor, root: Tensor | None, nonzeros: int) -> tuple[Tensor, Tensor]:
    """Codes (rows, blocks * k) of blocks, each of which compensates the errors of the preceding blocks."""
    if root is None:
        index, values = pursue(targets, dictionary, nonzeros)
    else:
        blocks, rows, width = targets.shape
        parts, missed = [], targets.new_zeros(rows, blocks * width)
        for block in range(blocks):
            start, stop = block * width, (block + 1) * width
            own = root[start:stop, start:stop]
            wanted = targets[block] @ own + missed[:, :start] @ root[:start, start:stop]
            parts.append(pursue(wanted[None], (dictionary[block] @ own)[None], nonzeros))
            one, value = parts[-1]
            sparse = value.new_zeros(rows, dictionary.shape[1]).scatter_add_(1, one[0], value[0])
            missed[:, start:stop] = targets[block] - sparse @ dictionary[block]
        index, values = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return index.transpose(0, 1).flatten(1), values.transpose(0, 1).flatten(1)


def _root(columns: Tensor | None, size: int) -> Tensor | None:
    """``U`` upper triangular with ``U U^T`` the column moment, padded to ``size``; None for the identity."""
    if columns is None:
        return None
    require_finite(columns)
    moment = columns.double()
    mean = float(moment.diagonal().mean()) or 1.0
    eye = torch.eye(size).to(moment)
    full = eye.clone()
    full[: len(moment), : len(moment)] = moment / mean
    # Evidence is damped. Undamped evidence of low rank would leave codes unbounded in its null space.
    for ridge in (0.0, 0.01, 0.1):
        found, failed = torch.linalg.cholesky_ex((full + ridge * eye).flip(0, 1))
        if not int(failed) and float(found.diagonal().min()) > 1e-4 * float(found.diagonal().max()):
            break
    return (found.flip(0, 1) * mean**0.5).float()


def _diagonal(root: Tensor | None, width: int) -> Tensor:
    """The blocks (blocks, width, width) on the diagonal of ``U``, or one identity."""
    if root is None:
        return torch.eye(width)[None]
    blocks = len(root) // width
    return root.view(blocks, width, blocks, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
