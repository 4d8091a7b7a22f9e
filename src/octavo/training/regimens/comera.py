"""CoMERA: tensor trains trained from scratch that find their ranks, down to a requested size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.forms import Form, TensorTrain
from octavo.methods.factorize.mpo import modes
from octavo.sources.batches import Batch
from octavo.training.adaptive_trains import attach, random_train, trains
from octavo.training.computed import owners
from octavo.training.loop import Optimizers
from octavo.training.losses import LossFunction
from octavo.training.regimens.base import Regimen, regimen

PENALTIES = ("size", "mean")


@regimen("comera", source="CoMERA (Yang et al., 2024, arXiv 2405.14377)")
@dataclass
class CoMERA(Regimen):
    """Linear layers and embeddings as ``W = G_1 D_1 G_2 D_2 .. G_N`` with sparse diagonals ``D``.

    A linear layer is a tensor train over the modes of its inputs, then over those of its outputs. An embedding is a
    train whose cores each have a mode of the rows and one of the columns. Activations are multiplied with the cores,
    and embeddings compute the rows that they need, so training never holds the dense matrix.

    With ``r_k`` nonzero entries of ``D_k`` the size is ``S = sum_k r_(k-1) n_k r_k``, where ``n_k`` is the product of
    both modes of a core. Without ``target`` (the early stage) the regimen minimises

        loss + gamma * R

    where ``R`` is a surrogate of ``S``. With it (the late stage) every step minimises the one of two objectives that is
    further from its target, as achievement scalarisation asks for,

        R + 0.1 * loss + 0.01 * R       if  (loss - loss_target) / loss < (S - target) / S,
        loss + 0.1 * loss + 0.01 * R    otherwise,

    and the loss alone once the target is reached. Entries below ``threshold`` are cut permanently, smallest first; in
    the late stage only until the target is reached. A run on a model that already has such layers continues with their
    diagonals.

    A diagonal must fall from 1 to the threshold: its learning rate times the number of steps must be well above 1.
    Recommended are at least 1,000 steps, 1e-2 for diagonals and cores (the rate of :func:`octavo.training.fit`, or
    those of :func:`core_rates`), and a ``gamma`` from 0.3 to 3. Ranks stay if ``gamma`` is much below the first loss.

    Source: Yang et al. (2024), arXiv 2405.14377. There are differences, since stages last for tens of thousands of
    steps there. Cutting stops at the target, and diagonals are folded into the cores only by :meth:`forms`. If they
    were reset to 1 between the stages, all would have to shrink again, and within hundreds of steps they would do so
    together. The default of ``gamma`` is 1; the released code has 0.01.

    Parameters
    ----------
    rank
        Initial rank of all bonds, or their full rank if that is less.
    gamma
        Weight of the penalty in the early stage, in units of the loss: ``R`` is 1 at first. With 0 the ranks stay.
    penalty
        ``size``: ``S`` with ``|D_k|_1`` for ``r_k``, as a share of the size at the beginning. ``mean``: mean of the
        remaining entries, whatever they cost.
    target
        Elements of all cores to keep.
    loss_target
        The acceptable loss in the late stage.
    cores
        Number of cores for a linear layer's inputs, and as many for its outputs.
    sites
        Number of cores of an embedding.
    smallest
        A weight with fewer elements stays dense.
    """

    rank: int = 30
    gamma: float = 1.0
    penalty: str = "size"
    target: int | None = None
    loss_target: float = 0.0
    threshold: float = 1e-2
    cores: int = 2
    sites: int = 3
    smallest: int = 4096

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RequestError(f"comera: rank is {self.rank}; it must be at least 1")
        if self.penalty not in PENALTIES:
            raise RequestError(f"comera: penalty {self.penalty!r} is not known; choose from {', '.join(PENALTIES)}")
        if self.target is not None and self.target < 1:
            raise RequestError(f"comera: target is {self.target}; it must be at least 1 element")

    def begin(self, model: nn.Module, steps: int) -> None:
        """Replace weights by trains of random cores, unless they already are trains."""
        known = trains(model)
        new = {} if known else self._random(model)
        if not known and not new:
            what = f"no linear layer or embedding with {self.smallest} elements or more"
            raise RequestError(f"comera: {type(model).__name__} has {what}")
        splits = [train.modes for train in known.values()]
        splits += [(form.row_modes, form.column_modes) for form in new.values()]
        least = sum(o * i for split in splits for o, i in zip(*split, strict=True))
        if self.target is not None and self.target < least:
            raise RequestError(
                f"comera: target is {self.target} elements, but with every rank at 1 there are {least}; give at least "
                "that"
            )
        attach(model, new)
        self._trains = list(trains(model).values())
        self._start = self.size

    def penalty_of(self, model: nn.Module) -> Tensor | None:
        """That of the early stage."""
        return self.gamma * self._penalty() if self.gamma else None

    def loss(self, model: nn.Module, batch: Batch, loss: LossFunction) -> Tensor:
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
        """Cut entries below the threshold."""
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
        """Trains with the diagonals folded in and the remaining ranks."""
        return {name: train.form() for name, train in trains(model).items()}

    @property
    def size(self) -> int:
        """Elements of all cores with the remaining ranks, each with all of its modes."""
        return sum(train.size() for train in self._trains)

    def _penalty(self) -> Tensor:
        if self.penalty == "size":
            return torch.stack([train.surrogate() for train in self._trains]).sum() / self._start
        entries = torch.cat([diagonal.abs() for train in self._trains for diagonal in train.masked()])
        count = sum(int(train.kept(bond).sum()) for train in self._trains for bond in range(train.count - 1))
        return entries.sum() / count

    def _random(self, model: nn.Module) -> dict[str, TensorTrain]:
        found = {}
        # A weight shared by two modules is skipped.
        held = owners(model)
        for name, module in model.named_modules():
            if type(module) not in (nn.Linear, nn.Embedding) or module.weight.numel() < self.smallest:
                continue
            if held[id(module.weight)] > 1:
                continue
            # Such embeddings change or read their whole table.
            if isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq or module.sparse):
                continue
            (rows, columns), weight = module.weight.shape, module.weight
            if isinstance(module, nn.Embedding):
                split = modes(rows, self.sites), modes(columns, self.sites)[::-1]
            else:
                ones = (1,) * self.cores
                split = ones + modes(rows, self.cores), modes(columns, self.cores) + ones
            # The entries of the product have the standard deviation of the module's own initialisation.
            found[f"{name}.weight"] = random_train((rows, columns), *split, self.rank, float(weight.detach().std()))
        return found


def core_rates(cores: float, dense: float, ranks: float) -> Optimizers:
    """AdamW with separate learning rates for cores, dense weights, and diagonals, which do not decay."""

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
