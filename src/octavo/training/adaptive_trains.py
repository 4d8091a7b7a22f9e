"""Tensor trains with a diagonal on every bond, trained in place of the weights of linear layers and embeddings.

A layer runs on the two halves of its train. Those of a linear layer are two thin matrices; an embedding multiplies one
row of each half. Neither a forward nor a backward pass makes the dense matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from octavo.errors import RequestError
from octavo.forms import Dense, Form, TensorTrain
from octavo.forms.tensor_train import full_ranks
from octavo.training.formed import unparametrized, with_zero_row, zero_row_of


def random_train(
    shape: tuple[int, int], row_modes: tuple[int, ...], column_modes: tuple[int, ...], rank: int, deviation: float
) -> TensorTrain:
    """A train of Gaussian cores whose product has entries of the given standard deviation.

    An entry is a sum over ``r_1 .. r_(N-1)`` of products of ``N`` elements, so core ``k`` has the deviation ``deviation
    ** (1 / N) / sqrt(r_k)``.
    """
    ranks = [min(rank, most) for most in full_ranks(row_modes, column_modes)]
    cores = [
        Dense(torch.randn(a * o * i, b) * (deviation ** (1 / len(row_modes)) / math.sqrt(b)))
        for a, o, i, b in zip(ranks, row_modes, column_modes, ranks[1:], strict=False)
    ]
    return TensorTrain(tuple(cores), row_modes, column_modes, *shape)


def attach(model: nn.Module, forms: Mapping[str, TensorTrain]) -> None:
    """Train weights, by parameter name, as trains, with diagonals of 1 between the cores.

    Embeddings, and linear layers whose train has cores of the inputs before those of the outputs, never make their
    matrix. Other layers compute it in every forward pass. The padding row of an embedding stays zero if it is zero.
    """
    for name, form in forms.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        kind, train = type(owner), Train(form, zero_row_of(owner))
        parametrize.register_parametrization(owner, "weight", train)
        # PyTorch made a class for this module alone; it is removed together with the train.
        if kind is nn.Linear and train.inputs:
            type(owner).forward = _linear
        elif kind is nn.Embedding and train.count > 1:
            type(owner).forward = _embedding


def trains(model: nn.Module) -> dict[str, Train]:
    """All trains by parameter name."""
    found = {}
    for prefix, owner in model.named_modules():
        if isinstance(owner, parametrize.ParametrizationList) and isinstance(owner[0], Train):
            train = owner[0]
            train.held = _parts(owner)
            found[prefix.replace("parametrizations.", "")] = train
    return found


def elements(model: nn.Module) -> int:
    """Elements of all trains with the remaining ranks."""
    return sum(train.size() for train in trains(model).values())


def fold(model: nn.Module) -> dict[str, Form]:
    """Replace every train by its current dense matrix; returns the trains."""
    found = {name: train.form() for name, train in trains(model).items()}
    for name in found:
        unparametrized(model.get_submodule(name.rpartition(".")[0]), "weight")
    return found


class Train(nn.Module):
    """The parametrization: cores and diagonals are its originals, and it returns the matrix."""

    def __init__(self, form: TensorTrain, zero_row: int | None = None) -> None:
        super().__init__()
        self.zero_row = zero_row
        #: Where cores start, until they are parameters.
        self.start, self.count = [core.dense() for core in form.cores], len(form.cores)
        self.modes, self.matrix = (form.row_modes, form.column_modes), form.shape
        #: Parameters of the enclosing list, where they are registered.
        self.held: list[Tensor] = []
        for bond, rank in enumerate(form.ranks[1:-1]):
            self.register_buffer(f"kept{bond}", torch.ones(rank, dtype=torch.bool))

    def right_inverse(self, weight: Tensor) -> list[Tensor]:
        """Cores, then diagonals, once; the weight's values are not used."""
        if not self.start:
            raise RequestError(
                f"weight of shape {self.matrix}: is computed from a tensor train, so it cannot be set; fold it first"
            )
        cores, self.start = [core.to(weight) for core in self.start], []
        self.to(weight.device)
        return [*cores, *(torch.ones_like(core[0]) for core in cores[:-1])]

    def forward(self, *parts: Tensor) -> Tensor:
        """The matrix of cores and diagonals, for code that reads the weight."""
        whole = multiplied(self.effective(parts))[0, ..., 0]
        rows = whole[: self.matrix[0], : self.matrix[1]]
        return self.with_zeros(torch.arange(len(rows), device=rows.device), rows)

    def with_zeros(self, index: Tensor, rows: Tensor) -> Tensor:
        """Rows by their numbers, with zeros where they must be."""
        return rows if self.zero_row is None else rows.masked_fill((index == self.zero_row)[:, None], 0.0)

    def effective(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Cores (r_(k-1), o_k, i_k, r_k) with the diagonals after them, without the cut ranks."""
        ones = torch.ones(1, dtype=torch.bool, device=parts[0].device)
        kept = [ones, *(self.kept(bond) for bond in range(self.count - 1)), ones]
        found = []
        for k, modes in enumerate(zip(*self.modes, strict=True)):
            core = parts[k] * parts[self.count + k] if k < self.count - 1 else parts[k]
            wide = core.unflatten(0, (len(kept[k]), *modes))
            found.append(_remaining(_remaining(wide, 0, kept[k]), 3, kept[k + 1]))
        return found

    def form(self) -> Form:
        """The train that is to be stored."""
        cores = self.effective([part.detach() for part in self.held])
        found = TensorTrain(tuple(Dense(core.flatten(0, 2)) for core in cores), *self.modes, *self.matrix)
        return found if self.zero_row is None else with_zero_row(found, self.zero_row)

    @property
    def inputs(self) -> int:
        """The number of cores of the inputs, if only those of the outputs follow; else 0."""
        rows, columns = self.modes
        return next((k for k in range(1, self.count) if math.prod(rows[:k]) == math.prod(columns[k:]) == 1), 0)

    def cores(self) -> list[Tensor]:
        """Parameters of shape (r_(k-1) * o_k * i_k, r_k), without the diagonals."""
        return self.held[: self.count]

    def diagonals(self) -> list[Tensor]:
        """Parameters of shape (r_k,), one for each bond."""
        return self.held[self.count :]

    def kept(self, bond: int) -> Tensor:
        """(r_k,) bools, False where a diagonal was cut."""
        return self.get_buffer(f"kept{bond}")

    def masked(self) -> list[Tensor]:
        """The effective diagonals: zero where they were cut."""
        return [diagonal * self.kept(bond) for bond, diagonal in enumerate(self.diagonals())]

    def size(self) -> int:
        """Elements of the cores with the remaining ranks."""
        ranks = [1, *(int(self.kept(bond).sum()) for bond in range(self.count - 1)), 1]
        return sum(ranks[k] * o * i * ranks[k + 1] for k, (o, i) in enumerate(zip(*self.modes, strict=True)))

    def surrogate(self) -> Tensor:
        """The size with every rank replaced by the sum of magnitudes."""
        one = self.held[0].new_ones(())
        ranks = [one, *(diagonal.abs().sum() for diagonal in self.masked()), one]
        return torch.stack(
            [ranks[k] * (o * i) * ranks[k + 1] for k, (o, i) in enumerate(zip(*self.modes, strict=True))]
        ).sum()

    def cut(self, bond: int, place: int) -> int:
        """Cut an entry unless it is the last of its bond; returns the number of elements saved."""
        before = self.size()
        if int(self.kept(bond).sum()) > 1:
            self.kept(bond)[place] = False
        return before - self.size()


def multiplied(cores: Sequence[Tensor]) -> Tensor:
    """Successive cores (a, o, i, b) multiplied out to one of all their modes."""
    whole = cores[0]
    for core in cores[1:]:
        whole = torch.einsum("aRCc,coib->aRoCib", whole, core).flatten(1, 2).flatten(2, 3)
    return whole


def _remaining(core: Tensor, axis: int, kept: Tensor) -> Tensor:
    """Select along an axis; indices are faster than masks, above all backward."""
    return core if bool(kept.all()) else core.index_select(axis, kept.nonzero()[:, 0])


def _parts(chain: Any) -> list[Tensor]:
    return [getattr(chain, f"original{k}") for k in range(2 * chain[0].count - 1)]


def _linear(layer: Any, x: Tensor) -> Tensor:
    """``x A B + bias`` with the products ``A`` of the inputs' cores and ``B`` of the outputs'."""
    chain = layer.parametrizations.weight
    cores, split = chain[0].effective(_parts(chain)), chain[0].inputs
    inputs, outputs = multiplied(cores[:split])[0, 0], multiplied(cores[split:])[:, :, 0, 0]
    thin = functional.linear(x, inputs[: layer.in_features].t())
    return functional.linear(thin, outputs[:, : layer.out_features].t(), layer.bias)


def _embedding(layer: Any, index: Tensor) -> Tensor:
    """The needed rows, each computed once."""
    chain = layer.parametrizations.weight
    cores = chain[0].effective(_parts(chain))
    split = _balanced(cores)
    first, second = multiplied(cores[:split]), multiplied(cores[split:])
    needed, places = index.unique(return_inverse=True)
    high, low = needed // second.shape[1], needed % second.shape[1]
    rows = torch.einsum("nCc,cni->nCi", first[0, high], second[:, low, :, 0]).flatten(1)[:, : layer.embedding_dim]
    if layer.padding_idx is not None:
        # As in PyTorch, uses of this row do not train it.
        rows = torch.where((needed == layer.padding_idx)[:, None], rows.detach(), rows)
    return functional.embedding(places, chain[0].with_zeros(needed, rows))


def _balanced(cores: Sequence[Tensor]) -> int:
    """Where to divide the cores so that both halves together have the fewest elements."""
    sizes = [core.shape[1] * core.shape[2] for core in cores]
    return min(
        range(1, len(cores)),
        key=lambda k: cores[k].shape[0] * (math.prod(sizes[:k]) + math.prod(sizes[k:])),
    )
