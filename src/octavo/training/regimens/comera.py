"""CoMERA: tensor trains that are trained from scratch and find their own ranks, down to a size that is asked for."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.forms import Form, TensorTrain
from octavo.methods.factorize.mpo import modes
from octavo.training.adaptive_trains import attach, random_train, trains
from octavo.training.loop import Optimizers
from octavo.training.losses import Batch, Loss
from octavo.training.regimens.base import Regimen, regimen

PENALTIES = ("size", "mean")


@regimen("comera", source="CoMERA (Yang et al., 2024, arXiv 2405.14377)")
@dataclass
class CoMERA(Regimen):
    """Linear layers and embeddings as ``W = G_1 D_1 G_2 D_2 .. G_N``, whose diagonals ``D`` are made sparse.

    A linear layer is a tensor train over the modes of its inputs, then over those of its outputs; an embedding is a
    train whose every core has a mode of the rows and one of the columns. With ``r_k`` entries of ``D_k`` that are not
    zero the size is ``S = sum_k r_(k-1) n_k r_k``, ``n_k`` being the product of both modes of a core. Without
    ``target`` (the early stage) what is minimised is

        loss + gamma * R

    where ``R`` is a surrogate of ``S``; the decay of the cores (:func:`rates`) keeps them from growing as diagonals
    shrink. With it (the late stage) every step minimises the one of two objectives that is further from its target, as
    achievement scalarisation asks for,

        R + 0.1 * loss + 0.01 * R       if  (loss - loss_target) / loss < (S - target) / S,
        loss + 0.1 * loss + 0.01 * R    otherwise,

    and the loss alone once the target is reached. Entries below ``threshold`` are cut for good, the smallest first,
    and in the late stage no more of them than it takes to reach the target. A run that begins on a model that has such
    layers already goes on with their diagonals.

    Source: Yang et al. (2024), arXiv 2405.14377. Two things are other than there, where stages last for tens of
    thousands of steps: cutting stops at the target, and diagonals are folded into the cores only by :meth:`forms`. Set
    back to 1 between the stages they would all have to come down again, and within hundreds of steps do so together.

    Parameters
    ----------
    rank
        Of all bonds at first, or their full rank if that is less.
    gamma
        Weight of the penalty in the early stage; with 0 the ranks stay.
    penalty
        ``size``: ``S`` with ``|D_k|_1`` for ``r_k``, as a share of the size at the beginning. ``mean``: mean of the
        entries left, whatever they cost.
    target
        Elements of all cores that are to be left.
    loss_target
        The loss that one would be content with, in the late stage.
    cores
        Of a linear layer's inputs, and as many of its outputs.
    sites
        Of an embedding.
    smallest
        A weight with fewer elements stays dense.
    """

    rank: int = 30
    gamma: float = 0.01
    penalty: str = "size"
    target: int | None = None
    loss_target: float = 0.0
    threshold: float = 1e-2
    cores: int = 2
    sites: int = 3
    smallest: int = 4096

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RequestError(f"comera: rank is {self.rank}; bonds have a rank of 1 or more")
        if self.penalty not in PENALTIES:
            raise RequestError(f"comera: penalty {self.penalty!r} is not known; choose from {', '.join(PENALTIES)}")
        if self.target is not None and self.target < 1:
            raise RequestError(f"comera: target is {self.target}; it is a number of elements, 1 or more")

    def begin(self, model: nn.Module, steps: int) -> None:
        """Replace weights by trains of random cores, unless there are trains already."""
        if not trains(model):
            found = self._random(model)
            if not found:
                what = f"no linear layer or embedding with {self.smallest} elements or more"
                raise RequestError(f"comera: {type(model).__name__} has {what}")
            attach(model, found)
        self._trains = list(trains(model).values())
        self._start = self.size
        least = sum(math.prod((o, i)) for train in self._trains for o, i in zip(*train.modes, strict=True))
        if self.target is not None and self.target < least:
            raise RequestError(f"comera: a target of {self.target} elements; with every rank at 1 there are {least}")

    def penalty_of(self, model: nn.Module) -> Tensor | None:
        """That of the early stage."""
        return self.gamma * self._penalty() if self.gamma else None

    def loss(self, model: nn.Module, batch: Batch, loss: Loss) -> Tensor:
        """The task's loss with the penalties of the stage."""
        if self.target is None:
            return super().loss(model, batch, loss)
        task, now = loss(model, batch), self.size
        if now <= self.target:
            return task
        penalty = self._penalty()
        too_large = (task.item() - self.loss_target) / max(task.item(), 1e-12) < (now - self.target) / now
        return (penalty if too_large else task) + 0.1 * task + 0.01 * penalty

    def after_step(self, step: int) -> None:
        """Cut what fell below the threshold."""
        if not self.gamma and self.target is None:
            return
        low = [
            (float(entry), train, bond, place)
            for train in self._trains
            for bond, diagonal in enumerate(train.diagonals())
            for place, entry in enumerate(diagonal.detach().abs().tolist())
            if entry < self.threshold and train.kept(bond)[place]
        ]
        now = self.size
        for _, train, bond, place in sorted(low, key=lambda entry: entry[0]):
            if self.target is not None and now <= self.target:
                return
            now -= train.cut(bond, place)

    def forms(self, model: nn.Module) -> dict[str, Form]:
        """Trains with the diagonals folded in, of the ranks that are left."""
        return {name: train.form() for name, train in trains(model).items()}

    @property
    def size(self) -> int:
        """Elements of all cores, of the ranks that are left: every core with all of its modes."""
        return sum(train.size() for train in self._trains)

    def _penalty(self) -> Tensor:
        if self.penalty == "size":
            return torch.stack([train.surrogate() for train in self._trains]).sum() / self._start
        entries = torch.cat([diagonal.abs() for train in self._trains for diagonal in train.masked()])
        count = sum(int(train.kept(bond).sum()) for train in self._trains for bond in range(train.count - 1))
        return entries.sum() / count

    def _random(self, model: nn.Module) -> dict[str, TensorTrain]:
        found = {}
        # A weight that two modules share is left alone.
        owners = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
        for name, module in model.named_modules():
            if type(module) not in (nn.Linear, nn.Embedding) or module.weight.numel() < self.smallest:
                continue
            if owners[id(module.weight)] > 1:
                continue
            (rows, columns), weight = module.weight.shape, module.weight
            if isinstance(module, nn.Embedding):
                split = modes(rows, self.sites), modes(columns, self.sites)[::-1]
            else:
                ones = (1,) * self.cores
                split = ones + modes(rows, self.cores), modes(columns, self.cores) + ones
            # The entries of the product have the deviation that the module's own start has.
            found[f"{name}.weight"] = random_train((rows, columns), *split, self.rank, float(weight.detach().std()))
        return found


def rates(cores: float, dense: float, ranks: float) -> Optimizers:
    """AdamW with a learning rate for cores, one for what stayed dense, and one for diagonals, which do not decay."""

    def made(model: nn.Module) -> torch.optim.Optimizer:
        ours = [(list(train.cores()), list(train.diagonals())) for train in trains(model).values()]
        groups = [
            {"params": [core for pair in ours for core in pair[0]], "lr": cores, "weight_decay": 0.01},
            {"params": [diagonal for pair in ours for diagonal in pair[1]], "lr": ranks, "weight_decay": 0.0},
        ]
        known = {id(parameter) for group in groups for parameter in group["params"]}  # type: ignore[attr-defined]
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        groups.append({"params": rest, "lr": dense, "weight_decay": 0.01})
        return torch.optim.AdamW([group for group in groups if group["params"]])

    return made
