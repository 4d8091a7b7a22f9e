"""Trained rank pruning: low rank that is trained in, against an SVD after training, with and without fine-tuning."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from octavo.forms import Dense, Form
from octavo.recipes import Arm, Check, Finding, Trial, data, recipe
from octavo.recipes.models import ResNet, classifier, flipped, in_batches, momentum, shuffled, trained
from octavo.recipes.stored import quantized, through_file
from octavo.train import accuracy, cross_entropy, fit, formed, settle
from octavo.train.trp import SOURCE, TrainedRankPruning, decomposed, kernels

#: The share of energy that a projection keeps. That of the paper, 0.9, leaves rank 5 to 7 in every layer of so short a
#: training; this one leaves about a third of the weights.
ENERGY = 0.95
#: Weights of the nuclear norm that both arms with one may choose from; the first is the paper's.
PRESSURES = (3e-4, 3e-3)
#: Epochs of every training from scratch.
EPOCHS = 4
#: Learning rates that fine-tuning may choose from.
RATES = (0.01, 0.03)

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
        values.setdefault(name, []).append(100 * accuracy(stored.load(model), test))
        sizes.setdefault(name, []).append(stored.bytes)

    for seed in trial.seeds:
        models = {name: _pruned(trial, split, seed, regimen) for name, regimen in regimens.items()}
        dense = classifier(trial, seed, epochs=EPOCHS)
        measured("dense, 16 bits", classifier(trial, seed, epochs=EPOCHS))
        budget = min(_elements(models[name], _within(models[name], None)) for name in (OURS, BOTH))
        forms = _within(dense, budget)
        rate = rate or _chosen_rate(trial, split, seed, forms)
        trial.step(f"fine-tuning, seed {seed}")
        tuned = classifier(trial, seed, epochs=EPOCHS)
        measured(TUNED, tuned, _tuned(trial, split, seed, tuned, forms, rate))
        measured(PLAIN, classifier(trial, seed, epochs=EPOCHS), forms)
        for name, model in models.items():
            measured(name, model, _within(model, budget))
        measured("quantization alone", dense, _codes(dense, sizes[BOTH][-1], budget))
        width = _width(budget)
        measured("thinner net", classifier(trial, seed, epochs=EPOCHS, width=width))
    also = {NUCLEAR: {"nuclear norm": pressure[NUCLEAR]}, BOTH: {"nuclear norm": pressure[BOTH]}}
    also |= {TUNED: {"learning rate": rate}, "thinner net": {"width": width}}
    arms = {
        name: Arm(name, round(statistics.fmean(sizes[name])), tuple(found), also.get(name, {}))
        for name, found in values.items()
    }
    return _judged(arms)


def _pruned(trial: Trial, split: data.Split, seed: int, regimen: TrainedRankPruning, epochs: int = EPOCHS) -> nn.Module:
    """The net of :func:`classifier`, from the same start and batches, under a regimen."""
    epochs = min(epochs, 2) if trial.quick else epochs

    def make() -> nn.Module:
        torch.manual_seed(seed)
        return ResNet(classes=split.classes)

    def train(model: nn.Module) -> None:
        batches = flipped(shuffled(*split.train, size=64, seed=seed))
        fit(model, batches, cross_entropy, epochs=epochs, optimizer=momentum(0.1), regimen=regimen, seed=seed)

    name = f"resnet8-trp-{regimen.energy:g}-{regimen.nuclear:g}-{regimen.every}-e{epochs}-s{seed}"
    return trained(trial, name, make, train)


def _chosen_pressure(trial: Trial, split: data.Split, energy: float) -> float:
    """The weight of best development accuracy after one epoch, cut to a third of the weights."""

    def score(nuclear: float) -> float:
        seed = trial.seeds[0]
        model = _pruned(trial, split, seed, TrainedRankPruning(energy=energy, nuclear=nuclear), epochs=1)
        stored = through_file(model, _within(model, _elements(model, {}) // 3))
        return accuracy(stored.load(model), in_batches(split.development))

    return max(PRESSURES, key=score)


def _chosen_rate(trial: Trial, split: data.Split, seed: int, forms: Mapping[str, Form]) -> float:
    """The learning rate of best development accuracy after fine-tuning."""

    def score(rate: float) -> float:
        model = classifier(trial, seed, epochs=EPOCHS)
        _tuned(trial, split, seed, model, forms, rate)
        return accuracy(model, in_batches(split.development))

    return max(RATES, key=score)


def _tuned(
    trial: Trial, split: data.Split, seed: int, model: nn.Module, forms: Mapping[str, Form], rate: float
) -> dict[str, Form]:
    """One epoch on the factors."""
    formed(model, forms)
    batches = flipped(shuffled(*split.train, size=64, seed=100 + seed))
    fit(model, batches, cross_entropy, optimizer=momentum(rate), seed=seed)
    return settle(model)


def _elements(model: nn.Module, forms: Mapping[str, Form]) -> int:
    """Coefficients of all kernels that could be decomposed, some of which are."""
    return sum(
        sum(part.numel() for part in forms[name].tensors().values()) if name in forms else weight.numel()
        for name, weight in kernels(model).items()
    )


def _within(model: nn.Module, budget: int | None) -> dict[str, Form]:
    """Factors of the largest share of energy, the same in every layer, that fit the budget; all there is without."""

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
    """All kernels quantized, to a file of that size; its bits a weight are first guessed from the budget."""
    weights = _elements(model, {})
    bits = 16 * budget / weights
    for _ in range(3):
        codes: dict[str, Form] = {
            name: quantized(Dense(weight.detach().flatten(1)), bits) for name, weight in kernels(model).items()
        }
        bits += 8 * (size - through_file(model, codes).bytes) / weights
    return codes


def _width(budget: int) -> int:
    """The width of the net whose kernels come nearest to so many weights."""
    return min(range(2, 17), key=lambda width: abs(_elements(ResNet(width=width), {}) - budget))


def _judged(arms: Mapping[str, Arm]) -> Finding:
    checks = []
    for name in (OURS, BOTH):
        gain, error = _difference(arms[name], arms[TUNED])
        checks.append(
            Check(
                f"{name}, not fine-tuned, is not below the fine-tuned SVD by more than two standard errors.",
                gain >= -2 * error,
                f"{gain:+.2f} ± {error:.2f} points.",
            )
        )
        gain, error = _difference(arms[name], arms[PLAIN])
        checks.append(
            Check(
                f"{name} is far above the SVD without fine-tuning: by 5 points and more than two standard errors.",
                gain > max(5.0, 2 * error),
                f"{gain:+.2f} ± {error:.2f} points.",
            )
        )
    gain, error = _difference(arms[OURS], arms[NUCLEAR])
    checks.append(
        Check(
            "It is the projection that does it: TRP is above the nuclear norm alone by more than two standard errors.",
            gain > 2 * error,
            f"{gain:+.2f} ± {error:.2f} points.",
        )
    )
    share = arms[OURS].bytes / arms["dense, 16 bits"].bytes
    pressure, spread = _difference(arms[BOTH], arms[OURS])
    reason = (
        f"At {share:.0%} of the dense file the nets that were projected while they trained lose "
        f"{arms['dense, 16 bits'].mean - arms[OURS].mean:.1f} points of the dense accuracy, one cut after training "
        f"{arms['dense, 16 bits'].mean - arms[PLAIN].mean:.1f}, of which one epoch of fine-tuning gives back "
        f"{arms[TUNED].mean - arms[PLAIN].mean:.1f}; the nuclear norm beside the projection changes "
        f"{pressure:+.2f} ± {spread:.2f}. A thinner net of {arms['thinner net'].bytes:,} bytes, trained as long, "
        f"has {arms['thinner net'].mean:.1f} %, quantization alone {arms['quantization alone'].mean:.1f} %."
    )
    return Finding(list(arms.values()), checks, reason)


def _difference(ours: Arm, theirs: Arm) -> tuple[float, float]:
    """Mean difference of the seeds and its standard error."""
    found: Tensor = torch.tensor(ours.values) - torch.tensor(theirs.values)
    return float(found.mean()), float(found.std()) / len(found) ** 0.5 if len(found) > 1 else 0.0
