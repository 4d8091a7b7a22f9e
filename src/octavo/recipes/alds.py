"""ALDS: groups and ranks of all layers at once, against plain SVD under the same and simpler allocations."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from octavo.forms import Dense, Form
from octavo.methods.factorize.alds import SOURCE, decomposed
from octavo.methods.factorize.minimax import RankChoice as Choice
from octavo.methods.factorize.minimax import RankedLayer as Layer
from octavo.methods.factorize.minimax import allocate_ranks as allocate
from octavo.recipes import Arm, Check, Difference, Finding, Trial, data, difference, recipe
from octavo.recipes.models import classifier, flipped, in_batches, momentum, shuffled
from octavo.recipes.stored import Stored, quantized, through_file
from octavo.training import accuracy, cross_entropy, fit, formed, settle

#: Sizes of all weights together, as shares of the dense ones.
SIZES = (0.3, 0.5)
#: Learning rates to choose from, for every arm.
RATES = (0.003, 0.01, 0.03, 0.1)
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
    """Results of one allocator at one size, one value per seed."""

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
    sizes = SIZES[1:] if trial.quick else SIZES
    models = [classifier(trial, seed) for seed in trial.seeds]
    rates = _chosen_rates(trial, split, models[0])
    test = in_batches(split.test)
    figures = {(name, size): _Figures() for name in ALLOCATORS for size in sizes}
    dense: list[float] = []
    codes: dict[float, list[tuple[int, float]]] = {size: [] for size in sizes}
    for seed, model in zip(trial.seeds, models, strict=True):
        layers = _layers(model)
        whole = sum(layer.dense for layer in layers.values())
        stored = through_file(model)
        dense.append(_percent(stored, model, test))
        for size in sizes:
            for name, allocator in ALLOCATORS.items():
                trial.step(f"seed {seed}, {size:.0%}: {name}")
                choices = allocator(layers, int(size * whole))
                _measure(figures[name, size], trial, seed, model, choices, layers, split, rates[name])
            coded = _codes(model, layers, figures[OURS, size].bytes[-1])
            codes[size].append((coded.bytes, _percent(coded, model, test)))
    arms = [Arm("dense, 16 bits", stored.bytes, tuple(dense))]
    for size in sizes:
        arms += [found.arm(f"{name}, {size:.0%}", rates[name]) for (name, at), found in figures.items() if at == size]
        taken, values = zip(*codes[size], strict=True)
        arms.append(Arm(f"quantization alone, as {OURS} {size:.0%}", round(statistics.fmean(taken)), values))
    return _judged(arms, figures, sizes)


def _percent(stored: Stored, model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Accuracy of the stored weights, in a net of this shape."""
    return 100 * accuracy(stored.load(copy.deepcopy(model)), batches)


def _codes(model: nn.Module, layers: Mapping[str, Layer], size: int) -> Stored:
    """All weights quantized, with the most bits at which the file is no larger than that."""
    low, high = 0.0, 16.0
    best = None
    for _ in range(10):
        bits = (low + high) / 2
        stored = through_file(model, {name: quantized(Dense(layer.matrix), bits) for name, layer in layers.items()})
        if stored.bytes <= size:
            low, best = bits, stored
        else:
            high = bits
    assert best is not None
    return best


def _layers(model: nn.Module) -> dict[str, Layer]:
    """All matrices: convolutions as (f, c h w), whose groups split channels."""
    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.ndim > 1}
    return {name: Layer(weight.flatten(1), weight.shape[1], bound=True) for name, weight in weights.items()}


def _forms(layers: Mapping[str, Layer], choices: Choices) -> dict[str, Form]:
    return {
        name: decomposed(layers[name].matrix, choice.groups, choice.rank)
        for name, choice in choices.items()
        if choice is not None
    }


def _tuned(
    trial: Trial, seed: int, model: nn.Module, forms: Mapping[str, Form], split: data.Split, rate: float
) -> tuple[nn.Module, dict[str, Form]]:
    """The net with its weights in these forms after one epoch, and the forms."""
    model = copy.deepcopy(model)
    formed(model, forms)
    count = 128 if trial.quick else TUNED_ON
    batches = flipped(shuffled(*(tensor[:count] for tensor in split.train), size=64, seed=seed))
    fit(model, batches, cross_entropy, optimizer=momentum(rate), seed=seed)
    return model, settle(model)


def _chosen_rates(trial: Trial, split: data.Split, model: nn.Module) -> dict[str, float]:
    """For every allocator the rate of the best development accuracy, at the larger size and the first seed."""
    seed, development, layers = trial.seeds[0], in_batches(split.development), _layers(model)
    budget = int(SIZES[1] * sum(layer.dense for layer in layers.values()))
    chosen = {}
    for name, allocator in ALLOCATORS.items():
        trial.step(f"learning rate of {name}")
        forms = _forms(layers, allocator(layers, budget))
        scores = {rate: accuracy(_tuned(trial, seed, model, forms, split, rate)[0], development) for rate in RATES}
        chosen[name] = max(scores, key=lambda rate: scores[rate])
    return chosen


def _measure(
    found: _Figures,
    trial: Trial,
    seed: int,
    model: nn.Module,
    choices: Choices,
    layers: Mapping[str, Layer],
    split: data.Split,
    rate: float,
) -> None:
    test, forms = in_batches(split.test), _forms(layers, choices)
    found.before.append(_percent(through_file(model, forms), model, test))
    after = through_file(*_tuned(trial, seed, model, forms, split, rate))
    found.after.append(_percent(after, model, test))
    found.bytes.append(after.bytes)
    found.bound.append(max(layers[name].error(choice) for name, choice in choices.items()))
    found.groups.append(statistics.fmean(choice.groups for choice in choices.values() if choice is not None))


def _judged(arms: list[Arm], figures: Mapping[tuple[str, float], _Figures], sizes: Sequence[float]) -> Finding:
    from scipy.stats import spearmanr

    def gain(ours: str, theirs: str, when: str) -> Difference:
        """The difference of accuracies averaged over the sizes."""

        def curve(name: str) -> list[float]:
            return [statistics.fmean(at) for at in zip(*(getattr(figures[name, s], when) for s in sizes), strict=True)]

        return difference(curve(ours), curve(theirs))

    checks = []
    for when in ("before", "after"):
        gains = {rival: gain(OURS, rival, when) for rival in ABLATIONS}
        told = ", ".join(f"{found} over {rival}" for rival, found in gains.items())
        checks.append(
            Check(
                f"{when.capitalize()} fine-tuning the mean accuracy of {OURS} over the sizes is above that of every "
                "ablation.",
                all(found.surely > 0 for found in gains.values()),
                f"Points: {told}.",
            )
        )
    free = {when: gain(RELEASED, ABLATIONS[0], when) for when in ("before", "after")}
    checks.append(
        Check(
            f"{RELEASED}, as released, is above one group with the same allocator, before and after fine-tuning.",
            all(found.surely > 0 for found in free.values()),
            f"Points: {free['before']} before, {free['after']} after.",
        )
    )
    pairs = [
        (bound, value) for found in figures.values() for bound, value in zip(found.bound, found.before, strict=True)
    ]
    groups = statistics.fmean(value for size in sizes for value in figures[OURS, size].groups)
    bounds = "; ".join(
        f"at {size:.0%} {statistics.fmean(figures[OURS, size].bound):.3f} against "
        + ", ".join(f"{statistics.fmean(figures[rival, size].bound):.3f}" for rival in ABLATIONS)
        for size in sizes
    )
    coded = next(arm for arm in arms if arm.name.startswith("quantization"))
    reason = (
        f"{OURS}, which takes {groups:.1f} groups on average, has by construction the least largest error bound: "
        f"{bounds} ({', '.join(ABLATIONS)}). Over all arms that bound and the accuracy before fine-tuning have a rank "
        f"correlation of {spearmanr(*zip(*pairs, strict=True)).statistic:.2f}; a measure of use would have one near "
        f"-1. Quantization alone has {coded.shown} % at {coded.bytes:,} bytes, the dense net "
        f"{arms[0].shown} %."
    )
    return Finding(arms, checks, reason)
