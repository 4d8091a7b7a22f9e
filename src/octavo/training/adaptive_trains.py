"""Tensor trains with a diagonal on every bond, as parametrizations of trained weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from octavo.forms import Dense, TensorTrain
from octavo.forms.tensor_train import full_ranks
from octavo.training.formed import unparametrized


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
    """Compute weights, by parameter name, from trains, with diagonals of 1 between the cores."""
    for name, form in forms.items():
        parametrize.register_parametrization(model.get_submodule(name.rpartition(".")[0]), "weight", Train(form))


def trains(model: nn.Module) -> dict[str, Train]:
    """All trains by parameter name."""
    found = {}
    for prefix, owner in model.named_modules():
        if isinstance(owner, parametrize.ParametrizationList) and isinstance(owner[0], Train):
            train = owner[0]
            train.held = [getattr(owner, f"original{k}") for k in range(2 * train.count - 1)]
            found[prefix.replace("parametrizations.", "")] = train
    return found


def fold(model: nn.Module) -> dict[str, TensorTrain]:
    """Replace every train by its current dense matrix; returns the trains."""
    found = {name: train.form() for name, train in trains(model).items()}
    for name in found:
        unparametrized(model.get_submodule(name.rpartition(".")[0]), "weight")
    return found


class Train(nn.Module):
    """The parametrization: cores and diagonals are its originals, and it returns the matrix."""

    def __init__(self, form: TensorTrain) -> None:
        super().__init__()
        self.start, self.count = [core.dense() for core in form.cores], len(form.cores)
        self.modes, self.matrix = (form.row_modes, form.column_modes), form.shape
        #: Parameters of the enclosing list, where they are registered.
        self.held: list[Tensor] = []
        for bond, rank in enumerate(form.ranks[1:-1]):
            self.register_buffer(f"kept{bond}", torch.ones(rank, dtype=torch.bool))

    def right_inverse(self, weight: Tensor) -> list[Tensor]:
        """Cores, then diagonals; the weight's values are not used."""
        ones = [torch.ones(core.shape[1]).to(weight) for core in self.start[:-1]]
        return [*(core.to(weight) for core in self.start), *ones]

    def forward(self, *parts: Tensor) -> Tensor:
        """The matrix of cores and diagonals."""
        return self._form(parts[: self.count], [d * self.kept(k) for k, d in enumerate(parts[self.count :])]).dense()

    def form(self) -> TensorTrain:
        """The train without the cut ranks."""
        parts = [part.detach() for part in self.held]
        ones = torch.ones(1, dtype=torch.bool)
        kept = [ones, *(self.kept(bond) for bond in range(self.count - 1)), ones]
        cores = []
        for k, core in enumerate(parts[: self.count]):
            wide = core.unflatten(0, (len(kept[k]), -1))[kept[k]]
            wide = wide * parts[self.count + k] if k < self.count - 1 else wide
            cores.append(Dense(wide[..., kept[k + 1]].flatten(0, 1).clone()))
        return TensorTrain(tuple(cores), *self.modes, *self.matrix)

    def _form(self, cores: tuple[Tensor, ...], diagonals: list[Tensor]) -> TensorTrain:
        scaled = [Dense(core * d) for core, d in zip(cores, diagonals, strict=False)]
        return TensorTrain((*scaled, Dense(cores[-1])), *self.modes, *self.matrix)

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
        one = torch.ones(())
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
