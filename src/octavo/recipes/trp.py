"""Trained rank pruning: low rank learned in training, against an SVD after training, with and without fine-tuning."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping

import torch
from torch import nn

from octavo.forms import Dense, Form
from octavo.recipes import Arm, Check, Difference, Finding, Trial, data, difference, recipe
from octavo.recipes.models import ResNet, classifier, flipped, in_batches, momentum, shuffled, trained
from octavo.recipes.stored import quantized, through_file
from octavo.training import accuracy, cross_entropy, fit, formed, settle
from octavo.training.regimens.trp import SOURCE, TrainedRankPruning, decomposed, kernels

#: The share of energy that a projection keeps. That of the paper, 0.9, leaves rank 5 to 7 in every layer of so short a
#: training; this one leaves about a third of the weights.
ENERGY = 0.95
#: Weights of the nuclear norm that both arms with one may choose from; 3e-4 is the paper's.
PRESSURES = (3e-6, 3e-5, 3e-4, 3e-3)
#: Epochs of every training from scratch.
EPOCHS = 4
#: Learning rates that fine-tuning may choose from.
RATES = (0.01, 0.03, 0.1)

PLAIN, TUNED = "SVD after training", "SVD after training, fine-tuned"
NUCLEAR, OURS, BOTH = "nuclear norm only, then SVD", "TRP", "TRP with nuclear norm"


@recipe(
    "trp",
    system="Trained Rank Pruning",
    source=SOURCE,
    claim="A network that is projected onto low rank while it trains needs no fine-tuning: decomposed, it is as "
    "accurate as one that was trained freely, decomposed to the same size and fine-tuned, and far above that without "
    "fine-tuning.",
    metric="test accuracy (%, higher is better)",
    data=data.CIFAR10,
)
def run(trial: Trial) -> Finding:
    """A ResNet-8; kernels are folded as (n, c h w), and all arms have the size of the smaller of the two TRP nets."""
    split = data.images(trial)
    test = in_batches(split.test)
    pressure = {name: _chosen_pressure(trial, split, energy) for name, energy in ((NUCLEAR, 1.0), (BOTH, ENERGY))}
    regimens = {
        NUCLEAR: TrainedRankPruning(energy=1.0, nuclear=pressure[NUCLEAR]),
        OURS: TrainedRankPruning(energy=ENERGY, nuclear=0.0),
        BOTH: TrainedRankPruning(energy=ENERGY, nuclear=pressure[BOTH]),
    }
    values: dict[str, list[float]] = {}
    sizes: dict[str, list[int]] = {}
    rate = 0.0

    def measured(name: str, model: nn.Module, forms: Mapping[str, Form] | None = None) -> None:
        stored = through_file(model, forms)
        values.setdefault(name, []).append(100 * accuracy(stored.load(copy.deepcopy(model)), test))
        sizes.setdefault(name, []).append(stored.bytes)

    for seed in trial.seeds:
        models = {name: _trained(trial, split, seed, regimen=regimen) for name, regimen in regimens.items()}
        dense = classifier(trial, seed, epochs=EPOCHS)
        measured("dense, 16 bits", dense)
        budget = min(_elements(models[name], _within(models[name], None)) for name in (OURS, BOTH))
        forms = _within(dense, budget)
        rate = rate or _chosen_rate(trial, split, seed, dense, forms)
        trial.step(f"fine-tuning, seed {seed}")
        measured(TUNED, *_tuned(split, seed, dense, forms, rate))
        measured(PLAIN, dense, forms)
        for name, model in models.items():
            measured(name, model, _within(model, budget))
        measured("quantization alone", dense, _codes(dense, sizes[BOTH][-1], budget))
        measured("thinner net", _trained(trial, split, seed, widths=_widths(sizes[OURS][-1])))
    also = {NUCLEAR: {"nuclear norm": pressure[NUCLEAR]}, BOTH: {"nuclear norm": pressure[BOTH]}}
    also |= {TUNED: {"learning rate": rate}}
    arms = {
        name: Arm(name, round(statistics.fmean(sizes[name])), tuple(found), also.get(name, {}))
        for name, found in values.items()
    }
    return _judged(arms)


class _Net(ResNet):
    """A ResNet-8 whose last stage may have any number of channels.

    Parameters
    ----------
    widths
        Channels of the first and of the last stage; 16 and 64 are those of :func:`classifier`.
    """

    def __init__(self, classes: int, widths: tuple[int, int]) -> None:
        first, last = widths
        super().__init__(classes=classes, width=first)
        if last != 4 * first:  # Otherwise nothing more is drawn, so that the start is that of a ResNet.
            self.blocks[-1] = type(self.blocks[-1])(2 * first, last, 2)
            self.head = nn.Linear(last, classes)


def _trained(
    trial: Trial,
    split: data.Split,
    seed: int,
    *,
    widths: tuple[int, int] = (16, 64),
    regimen: TrainedRankPruning | None = None,
    epochs: int = EPOCHS,
) -> nn.Module:
    """A net from the same start and batches as that of :func:`classifier`, under a regimen or thinner."""
    epochs = min(epochs, 2) if trial.quick else epochs

    def make() -> nn.Module:
        torch.manual_seed(seed)
        return _Net(split.classes, widths)

    def train(model: nn.Module) -> None:
        batches = flipped(shuffled(*split.train, size=64, seed=seed))
        fit(model, batches, cross_entropy, epochs=epochs, optimizer=momentum(0.1), regimen=regimen, seed=seed)

    kind = f"trp-{regimen.energy:g}-{regimen.nuclear:g}-{regimen.every}" if regimen else f"w{widths[0]}-{widths[1]}"
    return trained(trial, f"resnet8-{kind}-e{epochs}-s{seed}", make, train)


def _chosen_pressure(trial: Trial, split: data.Split, energy: float) -> float:
    """The weight of best development accuracy after one epoch, cut to a third of the weights."""

    def score(nuclear: float) -> float:
        seed = trial.seeds[0]
        regimen = TrainedRankPruning(energy=energy, nuclear=nuclear)
        model = _trained(trial, split, seed, regimen=regimen, epochs=1)
        stored = through_file(model, _within(model, _elements(model, {}) // 3))
        return accuracy(stored.load(model), in_batches(split.development))

    return max(PRESSURES, key=score)


def _chosen_rate(trial: Trial, split: data.Split, seed: int, model: nn.Module, forms: Mapping[str, Form]) -> float:
    """The learning rate of best development accuracy after fine-tuning."""

    def score(rate: float) -> float:
        trial.step(f"fine-tuning at {rate:g}")
        return accuracy(_tuned(split, seed, model, forms, rate)[0], in_batches(split.development))

    return max(RATES, key=score)


def _tuned(
    split: data.Split, seed: int, model: nn.Module, forms: Mapping[str, Form], rate: float
) -> tuple[nn.Module, dict[str, Form]]:
    """The net after one epoch on the factors, and those."""
    model = copy.deepcopy(model)
    formed(model, forms)
    batches = flipped(shuffled(*split.train, size=64, seed=100 + seed))
    fit(model, batches, cross_entropy, optimizer=momentum(rate), seed=seed)
    return model, settle(model)


def _elements(model: nn.Module, forms: Mapping[str, Form]) -> int:
    """Coefficients of all kernels that can be decomposed."""
    return sum(
        sum(part.numel() for part in forms[name].tensors().values()) if name in forms else weight.numel()
        for name, weight in kernels(model).items()
    )


def _within(model: nn.Module, budget: int | None) -> dict[str, Form]:
    """Factors with the largest share of energy, equal in all layers, within the budget; all energy without one."""

    def at(energy: float) -> dict[str, Form]:
        found = {name: decomposed(weight, "channel", energy) for name, weight in kernels(model).items()}
        return {name: form for name, form in found.items() if form is not None}

    best = at(1 - 1e-6)
    if budget is None or _elements(model, best) <= budget:
        return best
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        forms = at(middle)
        low, high, best = (middle, high, forms) if _elements(model, forms) <= budget else (low, middle, best)
    return at(low)


def _codes(model: nn.Module, size: int, budget: int) -> dict[str, Form]:
    """All kernels quantized to a file of the given size; bits per weight are first guessed from the budget."""
    weights = _elements(model, {})
    bits = 16 * budget / weights
    for _ in range(3):
        codes: dict[str, Form] = {
            name: quantized(Dense(weight.detach().flatten(1)), bits) for name, weight in kernels(model).items()
        }
        bits += 8 * (size - through_file(model, codes).bytes) / weights
    return codes


def _widths(size: int) -> tuple[int, int]:
    """Channels of the thinner net: the widest usual ones that fit the file, with a wider last stage to fill it."""
    first = max(
        width for width in range(2, 17) if width == 2 or through_file(_Net(10, (width, 4 * width))).bytes <= size
    )
    lasts = range(4 * first, 8 * first)
    return first, min(lasts, key=lambda last: abs(through_file(_Net(10, (first, last))).bytes - size))


def _judged(arms: Mapping[str, Arm]) -> Finding:
    def gain(ours: str, theirs: str) -> Difference:
        return difference(arms[ours].values, arms[theirs].values)

    checks = []
    for name in (OURS, BOTH):
        tuned, plain = gain(name, TUNED), gain(name, PLAIN)
        checks += [
            Check(
                f"{name}, not fine-tuned, is as good as the fine-tuned SVD, within 1 point.",
                tuned.surely >= -1,
                f"{tuned} points.",
            ),
            Check(
                f"{name} is above the SVD without fine-tuning by more than 5 points.",
                plain.surely > 5,
                f"{plain} points.",
            ),
        ]
    alone = gain(OURS, NUCLEAR)
    checks.append(
        Check(
            "It is the projection that does it: TRP is above the nuclear norm alone.",
            alone.surely > 0,
            f"{alone} points.",
        )
    )
    dense = arms["dense, 16 bits"]
    reason = (
        f"From the dense accuracy of {dense.shown} %, at {arms[OURS].bytes / dense.bytes:.0%} of the dense file, TRP "
        f"is {gain(OURS, dense.name)} points away, an SVD after training {gain(PLAIN, dense.name)}, and with one epoch "
        f"of fine-tuning {gain(TUNED, dense.name)}. The nuclear norm beside the projection changes TRP by "
        f"{gain(BOTH, OURS)}. A thinner net of {arms['thinner net'].bytes:,} bytes, trained as long, has "
        f"{arms['thinner net'].shown} %, quantization alone {arms['quantization alone'].shown} %, TRP "
        f"{arms[OURS].shown} % in {arms[OURS].bytes:,} bytes."
    )
    return Finding(list(arms.values()), checks, reason)
