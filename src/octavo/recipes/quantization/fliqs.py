"""FLIQS: formats searched while a net trains, against uniform precision and against an exact allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from octavo.allocation.knapsack import knapsack
from octavo.recipes.frame import Lab, Stored, Study, gap
from octavo.recipes.frame.data import CIFAR10, Split, cifar10
from octavo.recipes.frame.nets import ResNet, augmented, in_batches, momentum
from octavo.sources.sites import Layout
from octavo.training import FormatSearch, accuracy, cross_entropy
from octavo.training.masks import maskable
from octavo.training.number_formats import NumberFormat
from octavo.training.regimens.fliqs import SOURCE

WIDTH, STEPS, RATE = 8, 400, 0.1
FORMATS, FLOATS = ("int3", "int4", "int5", "int6", "int8"), ("e2m1", "e2m3", "e4m3")
#: Mean bits of a weight, and the one at which single questions are asked.
SIZES, MIDDLE, OF_FLOATS = (3.25, 3.5, 4.0, 4.5, 5.5), 4.0, 5.0
#: Draws of formats, of which the one nearest to the cost is taken.
DRAWS = 2000

DENSE, LINEAR, RANDOM, UNPRICED = "dense", "linear classifier", "random formats", "FLIQS, no price on entropy"
SEARCHED, EXACT, FLOAT = "FLIQS", "exact allocation", "FLIQS, floats"
LINE, CERTAIN = "uniform precision at these bytes", "certainty"


@Study(
    "fliqs",
    system="FLIQS",
    source=SOURCE,
    metric="test accuracy (%)",
    higher=True,
    data=CIFAR10,
    claims={
        "line": "Searched formats lie above the line of uniform integers, without retraining",
        "entropy": "The rising price on entropy raises accuracy",
    },
    extras={
        "floats": "Searched floats lie above the line of uniform floats",
        "random": "Searched formats beat random ones of the same cost",
        "allocation": "FLIQS beats an exact allocation by measured losses, trained as long",
        "exact line": "The exact allocation lies above the line of uniform integers",
    },
)
def run(lab: Lab) -> None:
    """A ResNet-8 of width 8 on CIFAR-10; all arms train as long, and bytes are those of files."""
    sizes = (MIDDLE,) if lab.quick else SIZES
    for seed in lab.each_seed():
        lab.step(f"seed {seed}")
        Comparison(lab, cifar10(lab), seed).all(sizes)
    arms = lab.arms
    coarsest = FORMATS[0]
    lab.gate("the dense net beats a linear classifier by over 10 points", lab.ahead(DENSE, LINEAR, 10.0))
    lab.gate(f"there is room: {coarsest} everywhere loses over a point", lab.ahead(DENSE, coarsest, 1.0))
    sure = arms[named(SEARCHED, MIDDLE)].also[CERTAIN]
    lab.gate("the policy decides: its first choices have over 90%", gap("certainty over 0.9", sure, [0.9]))

    def over(name: str) -> list[float]:
        """What an arm is above the line at its own bytes, seed by seed."""
        return [value - line for value, line in zip(arms[name].values, arms[name].also[LINE], strict=True)]

    def mean(name: str, sizes: Sequence[float]) -> list[float]:
        """The mean of that over sizes."""
        return np.mean([over(named(name, size)) for size in sizes], 0).tolist()

    def shown(name: str) -> str:
        arm = arms[name]
        return f"{arm.shown} % in {arm.bytes:,} bytes (line {np.mean(arm.also[LINE]):.4g})"

    ours, many = named(SEARCHED, MIDDLE), f"mean of {len(sizes)} sizes"
    searched, exact = (mean(name, sizes) for name in (SEARCHED, EXACT))
    lab.judge("line", gap(f"{SEARCHED} over the line, {many}", searched, [0.0]))
    lab.judge("entropy", gap(f"{ours} over {UNPRICED}, both from the line", over(ours), over(UNPRICED)))
    lab.judge("floats", gap(f"{FLOAT} over the line", mean(FLOAT, (OF_FLOATS,)), [0.0]))
    lab.judge("random", gap(f"{ours} over {RANDOM}, both from the line", over(ours), over(RANDOM)))
    lab.judge("allocation", gap(f"{SEARCHED} over {EXACT}, both from the line, {many}", searched, exact))
    lab.judge("exact line", gap(f"{EXACT} over the line, {many}", exact, [0.0]))
    for size in sizes:
        lab.say(
            f"At {size:g} bits FLIQS has {shown(named(SEARCHED, size))}, the exact allocation "
            f"{shown(named(EXACT, size))}."
        )
    lab.say(
        f"With no price on entropy it has {shown(UNPRICED)}; random formats have {shown(RANDOM)}. The exact allocation "
        f"also used {arms[DENSE].steps} steps of a dense net and development data."
    )


def named(name: str, size: float) -> str:
    """The name of an arm of some mean bits."""
    return f"{name}, {size:g} bits"


@dataclass
class Comparison:
    """All arms of one seed, from the same start and on the same batches."""

    lab: Lab
    split: Split
    seed: int
    lines: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def net(self) -> nn.Module:
        """An untrained net."""
        torch.manual_seed(self.seed)
        return ResNet(1, self.split.classes, WIDTH, self.split.train[0].shape[1])

    def trained(self, arm: str, regimen: FormatSearch | None = None, model: nn.Module | None = None) -> nn.Module:
        """A net after all steps."""
        steps, rate = (12, RATE) if self.lab.quick else (STEPS, RATE if model is None else 1e-3)
        batches = augmented(*self.split.train, size=64, seed=self.seed)
        return self.lab.train(
            model or self.net(), batches, cross_entropy, steps=steps, seed=self.seed, arm=arm, optimizer=momentum(rate),
            regimen=regimen,
        )  # fmt: skip

    def all(self, sizes: Sequence[float]) -> None:
        """Every arm."""
        dense = self.trained(DENSE)
        self.add(DENSE, self.lab.stored(dense))
        pixels = nn.Sequential(nn.Flatten(), nn.Linear(self.split.train[0][0].numel(), self.split.classes))
        self.lab.add(LINEAR, self.quality(self.trained(LINEAR, model=pixels)))
        for space in (FORMATS, FLOATS):
            for name in space:
                self.searched(name, FormatSearch((name,)), space=space, on_line=True)
        losses = self.losses(dense)
        for size in sizes:
            self.searched(named(SEARCHED, size), FormatSearch(FORMATS, size))
            self.searched(named(EXACT, size), FormatSearch(FORMATS[:1], assigned=self.allocated(losses, size)))
        self.searched(UNPRICED, FormatSearch(FORMATS, MIDDLE, entropy=0.0))
        self.searched(RANDOM, FormatSearch(FORMATS[:1], assigned=self.drawn(MIDDLE)))
        self.searched(named(FLOAT, OF_FLOATS), FormatSearch(FLOATS, OF_FLOATS), space=FLOATS)

    def searched(
        self, arm: str, regimen: FormatSearch, *, space: Sequence[str] = FORMATS, on_line: bool = False
    ) -> None:
        """An arm in which all weights have formats, beside the line of uniform formats."""
        model = self.trained(arm, regimen)
        stored = self.lab.stored(self.settled(model), regimen.forms(model))
        line = self.lines.setdefault(space[0], [])
        quality = self.quality(stored.load(self.net()))
        if on_line:
            line.append((stored.bytes, quality))
        uniform = float(np.interp(stored.bytes, *np.array(sorted(line)).T))
        self.lab.add(arm, quality, stored, **{LINE: uniform, CERTAIN: regimen.certainty})

    def settled(self, model: nn.Module) -> nn.Module:
        """A plain net with what is not rounded: norms and biases."""
        plain, own = self.net(), model.state_dict()
        plain.load_state_dict({name: own.get(name, tensor) for name, tensor in plain.state_dict().items()})
        return plain

    def quality(self, model: nn.Module) -> float:
        """Accuracy on test data, in percent."""
        return 100 * accuracy(model, in_batches(self.split.test))

    def add(self, arm: str, stored: Stored) -> None:
        """The figures of what was read back."""
        self.lab.add(arm, self.quality(stored.load(self.net())), stored)

    @torch.no_grad()
    def losses(self, dense: nn.Module) -> dict[str, list[float]]:
        """By how much the loss on development data rises where one weight of a trained net has a format."""
        batches, layout = in_batches(self.split.development), Layout()

        def loss() -> float:
            return float(np.mean([float(cross_entropy(dense, batch)) for batch in batches]))

        dense.eval()
        before, found = loss(), dict[str, list[float]]()
        for name, weight in maskable(dense, None).items():
            kept = weight.detach().clone()
            found[name] = []
            for chosen in FORMATS:
                form = NumberFormat(chosen).form(layout.to_matrix(kept))
                weight.copy_(layout.from_matrix(form.dense(), tuple(kept.shape)))
                found[name].append(loss() - before)
            weight.copy_(kept)
        return found

    def allocated(self, losses: Mapping[str, Sequence[float]], size: float) -> dict[str, str]:
        """The formats of least summed loss whose bits are at most those of a mean size."""
        costs = self.costs()
        chosen = knapsack(costs, np.array(list(losses.values())), self.room(costs, size))
        return {name: FORMATS[index] for name, index in zip(losses, chosen, strict=True)}

    def drawn(self, size: float) -> dict[str, str]:
        """Random formats, of many draws the one whose cost is nearest to that of a mean size."""
        costs = self.costs()
        draws = np.random.default_rng(self.seed).integers(len(FORMATS), size=(DRAWS, len(costs)))
        totals = costs[np.arange(len(costs)), draws].sum(1)
        best = draws[np.abs(totals - self.room(costs, size)).argmin()]
        return {name: FORMATS[index] for name, index in zip(maskable(self.net(), None), best, strict=True)}

    def costs(self) -> np.ndarray:
        """Bits (weights, formats)."""
        weights: list[Tensor] = list(maskable(self.net(), None).values())
        shapes = [Layout().matrix_shape(tuple(weight.shape)) for weight in weights]
        return np.array([[NumberFormat(name).cost(shape) for name in FORMATS] for shape in shapes])

    def room(self, costs: np.ndarray, size: float) -> int:
        """Bits of all weights at a mean size, as the search aims at them."""
        low, high = (NumberFormat(FORMATS[index]).bits for index in (0, -1))
        ends = costs[:, 0].sum(), costs[:, -1].sum()
        return int(ends[0] + (size - low) / (high - low) * (ends[1] - ends[0]))
