"""ALDS: groups and ranks of all layers at once, against plain SVD under the same and simpler allocations."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from octavo.forms import Dense, Form
from octavo.methods.factorize.alds import SOURCE, decomposed
from octavo.methods.factorize.minimax import Choice, Layer, allocate
from octavo.recipes import Arm, Check, Finding, Trial, data, recipe
from octavo.recipes.models import classifier, flipped, in_batches, momentum, shuffled
from octavo.recipes.stored import quantized, through_file
from octavo.train import accuracy, cross_entropy, fit, formed, settle

#: Sizes of all weights together, as shares of the dense ones.
SIZES = (0.3, 0.5, 0.7)
#: Learning rates that every arm may choose from.
RATES = (0.01, 0.03)
#: Images of the one epoch of fine-tuning.
TUNED_ON = 5_000

Choices = Mapping[str, Choice | None]
OURS, RELEASED = "ALDS", "ALDS without sqrt(k)"
ABLATIONS = ("one group, same allocator", "constant relative rank", "energy threshold")


def minimax(layers: Mapping[str, Layer], budget: int) -> Choices:
    """The method itself."""
    return allocate(layers, budget).choices


def released(layers: Mapping[str, Layer], budget: int) -> Choices:
    """The error measure of the authors' program, without the factor of the bound."""
    without = {name: Layer(layer.matrix, layer.channels, bound=False) for name, layer in layers.items()}
    return allocate(without, budget).choices


def one_group(layers: Mapping[str, Layer], budget: int) -> Choices:
    """Plain SVD with the ranks of least largest error."""
    return allocate(layers, budget, groups=(1,)).choices


def constant(layers: Mapping[str, Layer], budget: int) -> Choices:
    """Plain SVD with the same share of the full rank in every layer."""

    def at(share: float) -> Choices:
        full = {name: len(layer.errors(1)) - 1 for name, layer in layers.items()}
        return {name: Choice(1, max(1, round(share * rank))) for name, rank in full.items()}

    return _largest(layers, budget, at)


def energy(layers: Mapping[str, Layer], budget: int) -> Choices:
    """Plain SVD with the smallest ranks that keep one share of every layer's energy."""
    squares = {name: layer.errors(1).square() for name, layer in layers.items()}
    kept = {name: values.cumsum(0) / values.sum() for name, values in squares.items()}

    def at(share: float) -> Choices:
        return {name: Choice(1, 1 + int((shares[:-2] < share).sum())) for name, shares in kept.items()}

    return _largest(layers, budget, at)


def _largest(layers: Mapping[str, Layer], budget: int, at: Callable[[float], Choices]) -> Choices:
    """The largest choices within the budget, by bisection over the share; layers that would not shrink stay dense."""
    low, high = 0.0, 1.0
    best = at(low)
    for _ in range(30):
        middle = (low + high) / 2
        choices = {
            name: None if layer.size(choice) >= layer.dense else choice
            for name, layer in layers.items()
            for choice in (at(middle)[name],)
        }
        if sum(layer.size(choices[name]) for name, layer in layers.items()) <= budget:
            low, best = middle, choices
        else:
            high = middle
    return best


ALLOCATORS = dict(zip((OURS, RELEASED, *ABLATIONS), (minimax, released, one_group, constant, energy), strict=True))


@dataclass
class _Figures:
    """What one allocator gave at one size, one value a seed."""

    bytes: list[int] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    bound: list[float] = field(default_factory=list)
    groups: list[float] = field(default_factory=list)

    def arm(self, name: str, rate: float) -> Arm:
        """A row of the table."""
        also = {
            "before fine-tuning": statistics.fmean(self.before),
            "largest error bound": statistics.fmean(self.bound),
        }
        also |= {"mean groups": statistics.fmean(self.groups), "learning rate": rate}
        return Arm(name, round(statistics.fmean(self.bytes)), tuple(self.after), also)


@recipe(
    "alds",
    system="ALDS",
    source=SOURCE,
    claim="Groups of channels and ranks chosen together, for the least largest error over all layers, keep more "
    "accuracy at the same size than an SVD under the same allocation, a constant relative rank or an energy threshold.",
    metric="test accuracy after fine-tuning (%, higher is better)",
    data=data.CIFAR10,
)
def run(trial: Trial) -> Finding:
    """A ResNet-8, all its weights decomposed, before and after one short epoch of fine-tuning."""
    split = data.images(trial)
    sizes = SIZES[1:2] if trial.quick else SIZES
    rates = _chosen_rates(trial, split)
    test = in_batches(split.test)
    figures = {(name, size): _Figures() for name in ALLOCATORS for size in sizes}
    dense: list[float] = []
    codes: dict[float, list[tuple[int, float]]] = {size: [] for size in sizes}
    for seed in trial.seeds:
        model = classifier(trial, seed)
        layers = _layers(model)
        whole = sum(layer.dense for layer in layers.values())
        stored = through_file(model)
        dense.append(100 * accuracy(stored.load(classifier(trial, seed)), test))
        for size in sizes:
            forms = {name: quantized(Dense(layer.matrix), 16 * size) for name, layer in layers.items()}
            loaded = through_file(model, forms)
            codes[size].append((loaded.bytes, 100 * accuracy(loaded.load(classifier(trial, seed)), test)))
            for name, allocator in ALLOCATORS.items():
                trial.step(f"seed {seed}, {size:.0%}: {name}")
                choices = allocator(layers, int(size * whole))
                _measure(figures[name, size], trial, seed, choices, layers, split, rates[name])
    arms = [Arm("dense, 16 bits", stored.bytes, tuple(dense))]
    for size in sizes:
        arms += [found.arm(f"{name}, {size:.0%}", rates[name]) for (name, at), found in figures.items() if at == size]
        taken, values = zip(*codes[size], strict=True)
        arms.append(Arm(f"quantization alone, {16 * size:.3g} bits", round(statistics.fmean(taken)), values))
    return _judged(arms, figures, sizes)


def _layers(model: nn.Module) -> dict[str, Layer]:
    """All matrices: convolutions as (f, c h w), whose groups split channels."""
    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.ndim > 1}
    return {name: Layer(weight.flatten(1), weight.shape[1]) for name, weight in weights.items()}


def _forms(layers: Mapping[str, Layer], choices: Choices) -> dict[str, Form]:
    return {
        name: decomposed(layers[name].matrix, choice.groups, choice.rank)
        for name, choice in choices.items()
        if choice is not None
    }


def _tuned(
    trial: Trial, seed: int, forms: Mapping[str, Form], split: data.Split, rate: float
) -> tuple[nn.Module, dict]:
    """The net of a seed with its weights in these forms, after one epoch, and the forms."""
    model = classifier(trial, seed)
    formed(model, forms)
    count = 128 if trial.quick else TUNED_ON
    batches = flipped(shuffled(*(tensor[:count] for tensor in split.train), size=64, seed=seed))
    fit(model, batches, cross_entropy, optimizer=momentum(rate), seed=seed)
    return model, settle(model)


def _chosen_rates(trial: Trial, split: data.Split) -> dict[str, float]:
    """For every allocator the rate of the best development accuracy, at the middle size and the first seed."""
    seed, development = trial.seeds[0], in_batches(split.development)
    layers = _layers(classifier(trial, seed))
    budget = int(SIZES[1] * sum(layer.dense for layer in layers.values()))
    chosen = {}
    for name, allocator in ALLOCATORS.items():
        trial.step(f"learning rate of {name}")
        forms = _forms(layers, allocator(layers, budget))
        scores = {rate: accuracy(_tuned(trial, seed, forms, split, rate)[0], development) for rate in RATES}
        chosen[name] = max(scores, key=lambda rate: scores[rate])
    return chosen


def _measure(
    found: _Figures,
    trial: Trial,
    seed: int,
    choices: Choices,
    layers: Mapping[str, Layer],
    split: data.Split,
    rate: float,
) -> None:
    test, forms = in_batches(split.test), _forms(layers, choices)
    before = through_file(classifier(trial, seed), forms)
    found.before.append(100 * accuracy(before.load(classifier(trial, seed)), test))
    model, trained = _tuned(trial, seed, forms, split, rate)
    after = through_file(model, trained)
    found.after.append(100 * accuracy(after.load(classifier(trial, seed)), test))
    found.bytes.append(after.bytes)
    found.bound.append(max(layers[name].error(choice) for name, choice in choices.items()))
    found.groups.append(statistics.fmean(choice.groups for choice in choices.values() if choice is not None))


def _judged(arms: list[Arm], figures: Mapping[tuple[str, float], _Figures], sizes: tuple[float, ...]) -> Finding:
    bounds = {key: found.bound for key, found in figures.items()}
    least = all(
        ours <= theirs + 1e-12
        for size in sizes
        for rival in ABLATIONS
        for ours, theirs in zip(bounds[OURS, size], bounds[rival, size], strict=True)
    )
    shown = "; ".join(
        f"{size:.0%}: {statistics.fmean(bounds[OURS, size]):.3f} against "
        + ", ".join(f"{statistics.fmean(bounds[rival, size]):.3f}" for rival in ABLATIONS)
        for size in sizes
    )
    checks = [Check("The largest error bound is at most that of every ablation, at every size and seed.", least, shown)]
    for when in ("before", "after"):
        gains = {rival: _gain(figures, sizes, OURS, rival, when) for rival in ABLATIONS}
        told = ", ".join(f"{mean:+.2f} ± {error:.2f} over {rival}" for rival, (mean, error) in gains.items())
        checks.append(
            Check(
                f"{when.capitalize()} fine-tuning the mean accuracy over the sizes is above that of every ablation by "
                "more than two standard errors of the differences between seeds.",
                all(mean > 2 * error for mean, error in gains.values()),
                f"Points: {told}.",
            )
        )
    pairs = [
        (bound, value) for found in figures.values() for bound, value in zip(found.bound, found.before, strict=True)
    ]
    ranks = [torch.tensor(column).argsort().argsort().double() for column in zip(*pairs, strict=True)]
    correlation = float(torch.corrcoef(torch.stack(ranks))[0, 1])
    groups = statistics.fmean(value for size in sizes for value in figures[OURS, size].groups)
    free, error = _gain(figures, sizes, RELEASED, ABLATIONS[0], "after")
    coded = next(arm for arm in arms if arm.name.startswith("quantization"))
    reason = (
        f"With the factor sqrt(k) of the bound, {groups:.1f} groups are chosen on average, so that the allocation is "
        f"nearly that of one group; without it, as released, accuracy after fine-tuning is {free:+.2f} ± {error:.2f} "
        f"points from one group's. The largest error orders accuracies before fine-tuning by a rank correlation of "
        f"{correlation:.2f}. Quantization alone has {coded.mean:.1f} % at {coded.bytes:,} bytes, the dense net "
        f"{arms[0].mean:.1f} %."
    )
    return Finding(arms, checks, reason)


def _gain(
    figures: Mapping[tuple[str, float], _Figures], sizes: tuple[float, ...], ours: str, theirs: str, when: str
) -> tuple[float, float]:
    """Mean and standard error over seeds of the difference of accuracies averaged over sizes."""

    def curve(name: str) -> Tensor:
        return torch.tensor([getattr(figures[name, size], when) for size in sizes]).mean(0)

    difference = curve(ours) - curve(theirs)
    error = float(difference.std()) / len(difference) ** 0.5 if len(difference) > 1 else 0.0
    return float(difference.mean()), error
