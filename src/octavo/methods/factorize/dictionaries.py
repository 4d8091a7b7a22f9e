"""Dictionary learning: blocks of columns as sparse combinations of the atoms of small dictionaries.

``W_j ~ S_j D_j`` for every block of ``b`` columns: the dictionary ``D_j`` is (m, b), the codes ``S_j`` are (rows, m)
with ``k`` non-zeros a row. Rows are coded by batch orthogonal matching pursuit (Rubinstein, Zibulevsky & Elad, 2008),
dictionaries are fitted to the codes by least squares (Engan, Aase & Husoy, 1999); all blocks at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.forms import Dense, DenseSparse

#: Correlations held at once, so that every step of the pursuit fits the cache.
_AT_ONCE = 1 << 18
#: An atom with a smaller share of its squared length outside the span of the chosen atoms is below float32 precision.
_DEPENDENT = 1e-5


@dataclass(frozen=True)
class Shape:
    """``b`` columns per block, ``m`` atoms in its dictionary, ``k`` of them used by every row."""

    width: int
    atoms: int
    nonzeros: int


@dataclass(frozen=True)
class DictionaryFactors:
    """``S D`` of every block.

    Parameters
    ----------
    index, values
        (blocks, rows, k): the atoms of every row in rising order, and their coefficients.
    dictionary
        (blocks, m, b): atoms of unit length.
    """

    index: Tensor
    values: Tensor
    dictionary: Tensor

    def sparse(self) -> Tensor:
        """``S`` as (blocks, rows, m)."""
        blocks, rows, _ = self.index.shape
        return self.values.new_zeros(blocks, rows, self.dictionary.shape[1]).scatter_add_(2, self.index, self.values)

    def form(self, columns: int) -> DenseSparse:
        """The form with the given number of columns and dense leaves."""
        index, values = (part.transpose(0, 1).flatten(1) for part in (self.index, self.values))
        dictionary = Dense(self.dictionary.flatten(0, 1))
        return DenseSparse(Dense(values), narrow(index), dictionary, self.index.shape[2], columns)


def split(weight: Tensor, width: int) -> Tensor:
    """Blocks of ``width`` columns, (blocks, rows, width); the last is padded with zeros."""
    padding = -weight.shape[1] % width
    return torch.nn.functional.pad(weight, (0, padding)).unflatten(1, (-1, width)).transpose(0, 1).contiguous()


def learn(targets: Tensor, shape: Shape, rounds: int, weights: Tensor | None = None) -> DictionaryFactors:
    """Dictionaries of blocks (blocks, rows, width), initialised with right singular vectors and random mixtures."""
    blocks, rows, width = targets.shape
    basis = torch.linalg.eigh((targets.mT @ targets).double()).eigenvectors.flip(-1).mT.to(targets)
    generator = torch.Generator().manual_seed(0)
    mixture = torch.randn(max(0, shape.atoms - width), rows, generator=generator).to(targets) @ targets
    start = _unit(torch.cat([basis, mixture.expand(blocks, -1, -1)], 1)[:, : shape.atoms])
    index, values = pursue(targets, start, shape.nonzeros)
    found = DictionaryFactors(index, values, start)
    for _ in range(rounds):
        found = again(targets, found, weights)
    return found


def again(targets: Tensor, factors: DictionaryFactors, weights: Tensor | None = None) -> DictionaryFactors:
    """One round: the best dictionaries for these codes, then new codes."""
    sparse = factors.sparse()
    heavy = sparse if weights is None else sparse * weights[:, None]
    normal, right = heavy.mT @ sparse, heavy.mT @ targets
    ridge = normal.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)[:, None, None] * 1e-6
    eye = torch.eye(normal.shape[1], dtype=torch.float64, device=normal.device)
    dictionary = torch.linalg.solve(normal.double() + ridge * eye, right.double()).to(targets)
    # Unused atoms are replaced by the rows with the largest error.
    missed = (targets - sparse @ dictionary).square().sum(2)
    worst = missed.topk(min(missed.shape[1], normal.shape[1]), dim=1).indices
    worst = worst[:, torch.arange(normal.shape[1], device=worst.device) % worst.shape[1]]
    instead = targets.gather(1, worst[..., None].expand(-1, -1, targets.shape[2]))
    unused = normal.diagonal(dim1=1, dim2=2)[..., None] == 0
    dictionary = _unit(torch.where(unused, instead, dictionary))
    return DictionaryFactors(*pursue(targets, dictionary, factors.index.shape[2]), dictionary)


def pursue(targets: Tensor, dictionary: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    """Batch orthogonal matching pursuit of all rows of all blocks at once.

    Parameters
    ----------
    targets, dictionary
        (blocks, rows, b) and (blocks, m, b); atoms may have any length.

    Returns
    -------
    index, values
        (blocks, rows, k): atoms in rising order, and the coefficients of least squares.
    """
    lengths = dictionary.norm(dim=2).clamp_min(1e-30)
    atoms = dictionary / lengths[..., None]
    gram = atoms @ atoms.mT
    height = max(1, _AT_ONCE // (gram.shape[0] * gram.shape[1]))
    parts = [_pursue(part @ atoms.mT, gram, nonzeros) for part in targets.split(height, 1)]
    index, values = (torch.cat(pieces, 1) for pieces in zip(*parts, strict=True))
    index, order = index.sort(2)
    return index, values.gather(2, order) / lengths[:, None].expand(-1, index.shape[1], -1).gather(2, index)


def _pursue(left: Tensor, gram: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    """Matching pursuit from correlations (blocks, rows, m) with unit atoms of Gram matrix (blocks, m, m).

    Chosen atoms are orthonormalized one by one. Of these directions only the products with all atoms are kept:
    ``products[s]`` (blocks, rows, m). ``lower[t][s]`` is the product of atom ``t`` with direction ``s``.
    """
    shape = left.shape
    products: list[Tensor] = []
    chosen: list[Tensor] = []
    amounts: list[Tensor] = []
    lower: list[list[Tensor]] = []
    for _ in range(nonzeros):
        scores = left.abs()
        if chosen:
            scores.scatter_(2, torch.cat(chosen, 2), -1.0)
        best = scores.argmax(2, keepdim=True)
        lower.append([product.gather(2, best) for product in products])
        product = gram.gather(1, best.expand(shape)).clone()
        for share, other in zip(lower[-1], products, strict=True):
            product.addcmul_(share, other, value=-1)
        squared = product.gather(2, best)
        outside = squared > _DEPENDENT
        length = torch.where(outside, squared, torch.ones_like(squared)).sqrt()
        product *= outside / length
        amount = left.gather(2, best) * outside / length
        left = torch.addcmul(left, amount, product, value=-1)
        lower[-1].append(length)
        products.append(product)
        chosen.append(best)
        amounts.append(amount)
    # Back substitution: coefficients of atoms from those of directions, last atom first.
    for t in reversed(range(nonzeros)):
        amounts[t] = amounts[t] / lower[t][t]
        for s in range(t):
            amounts[s] = amounts[s] - lower[t][s] * amounts[t]
    return torch.cat(chosen, 2), torch.cat(amounts, 2)


def narrow(index: Tensor) -> Tensor:
    """Atom numbers in an integer type that holds them."""
    return index.to(torch.uint8 if not index.numel() or int(index.max()) < 256 else torch.int32)


def _unit(atoms: Tensor) -> Tensor:
    return atoms / atoms.norm(dim=2, keepdim=True).clamp_min(1e-30)
