"""Maestro: one training with ordered dropout, cut to many sizes, against the SVD of a normally trained network."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from octavo.calibration.evidence import Evidence
from octavo.forms import Dense, Form, LowRank
from octavo.methods.factorize import factors
from octavo.recipes import Arm, Check, Difference, Finding, Trial, data, difference, recipe
from octavo.recipes.models import ResNet, flipped, in_batches, momentum, shuffled, trained
from octavo.recipes.stored import quantized, through_file
from octavo.training import Regimen, accuracy, cross_entropy, fit
from octavo.training.regimens.maestro import SOURCE, OrderedDropout
from octavo.training.widths import allocated, factorizable, ladder, recalibrate, truncated

#: Weights of the factorized layers, as shares of the dense ones.
SIZES = (0.1, 0.2, 0.3, 0.4)
#: Learning rates that every kind of network chooses from, by development accuracy of the first seed's after CHOOSING
#: epochs.
RATES, CHOOSING, EPOCHS = (0.03, 0.1, 0.3), 1, 4
#: Size at which the loss is chosen, and whose bytes quantization alone and a thinner network get.
_CHOICE = 0.3
#: Largest angle between subspaces, in degrees, that counts as the same one.
SAME = 5.0
#: Points below the other that still count as being as accurate, and as a graceful curve.
_MARGIN, _GRACE = 1.0, 2.0
#: Both losses of a step: the narrowed network's alone, or the whole one's, from which the narrowed one learns.
OURS, DISTILLED, PLAIN = "Maestro", "Maestro, distilled", "SVD of a trained network"
THIN, QUANTIZED = f"thinner dense, about the bytes of {_CHOICE:.0%}", f"quantization alone, bytes of {_CHOICE:.0%}"


@recipe(
    "maestro",
    system="Maestro",
    source=SOURCE,
    claim="Ordered dropout on factors finds the SVD of a linear map, and trains a VGG-19 on CIFAR-10 to 93.10% with "
    "2.2 million parameters, where the dense one has 92.94% with 20 million. Checked here, on a ResNet-8: the linear "
    "map, whether a smaller network is as accurate as the dense one, and whether one training, cut to any size, beats "
    "the SVD of a network that was trained as usual.",
    metric="test accuracy (%, higher is better)",
    data=data.CIFAR10,
)
def run(trial: Trial) -> Finding:
    """Principal angles of a linear map; then a ResNet-8, cut in both ways with the same choice of ranks."""
    angles = {name: _angles(spread) for name, spread in (("equal inputs", 0.0), ("unequal inputs", 0.5))}
    split, first = data.images(trial), trial.first_seed
    sizes = SIZES[2:] if trial.quick else SIZES
    values: dict[str, list[float]] = {}
    stored: dict[str, list[int]] = {}
    ranks: dict[str, list[float]] = {}
    development: dict[str, float] = {}

    def measured(name: str, bytes_and_accuracy: tuple[int, float]) -> None:
        stored.setdefault(name, []).append(bytes_and_accuracy[0])
        values.setdefault(name, []).append(bytes_and_accuracy[1])

    def chosen(name: str, train: Callable[[float], nn.Module]) -> float:
        """The learning rate that is best on development images."""

        def score(rate: float) -> float:
            trial.step(f"{name}: rate {rate:g}")
            return accuracy(recalibrate(train(rate), _inputs(split)), in_batches(split.development))

        return max(RATES, key=score)

    def ordered(name: str, rate: float) -> nn.Module:
        return _ordered(split, first, name, rate, CHOOSING)[0]

    rates = {"dense": chosen("dense", partial(_dense, trial, split, first, epochs=CHOOSING))}
    rates |= {name: chosen(name, partial(ordered, name)) for name in (OURS, DISTILLED)}
    for seed in trial.seeds:
        dense = _dense(trial, split, seed, rates["dense"], EPOCHS)
        measured("dense", _measured(split, dense, {}))
        nets = {PLAIN: (dense, _decomposed(dense))}
        for name in (OURS, DISTILLED):
            trial.step(f"{name}, seed {seed}")
            nets[name] = model, forms = _ordered(split, seed, name, rates[name], EPOCHS)
            ranks.setdefault(name, []).append(statistics.fmean(form.left.shape[1] for form in forms.values()))
            measured(f"{name}, all columns", _measured(split, recalibrate(model, _inputs(split)), {}))
        for name, (net, parts) in nets.items():
            trial.step(f"{name}, seed {seed}: what each rank costs")
            curves = _curves(split, net, parts)
            for size in sizes:
                cut = _cut(net, parts, _widths(net, curves, size))
                whole = _recalibrated(split, net, cut)
                measured(f"{name}, {size:.0%}", _measured(split, whole, cut))
                # Which of both losses it is, the first seed says.
                if size == _CHOICE and seed == first:
                    development[name] = accuracy(whole, in_batches(split.development))
        most = stored[f"{PLAIN}, {_CHOICE:.0%}"][-1]
        measured(QUANTIZED, _measured(split, dense, _quantized(dense, most)))
        if seed == first:
            counts = {w: through_file(ResNet(classes=split.classes, width=w)).bytes for w in range(4, 16)}
            width = min(counts, key=lambda w: abs(counts[w] - most))
            rates[THIN] = chosen(THIN, partial(_dense, trial, split, first, epochs=CHOOSING, width=width))
        measured(THIN, _measured(split, _dense(trial, split, seed, rates[THIN], EPOCHS, width), {}))
    also = {name: {"learning rate": rates[name]} for name in ("dense", THIN)}
    for name in (OURS, DISTILLED):
        also[f"{name}, all columns"] = {"learning rate": rates[name], "mean rank": statistics.fmean(ranks[name])}
    arms = {
        name: Arm(name, round(statistics.fmean(stored[name])), tuple(found), also.get(name, {}))
        for name, found in values.items()
    }
    return _finding(arms, sizes, angles, max((OURS, DISTILLED), key=lambda name: development[name]))


def _angles(spread: float) -> tuple[float, float]:
    """Largest principal angles of the leading columns with those of the SVD, plain and weighted by the data.

    A map of rank 5 from 16 inputs to 20 outputs is learned; deviations of the inputs go from ``10 ** spread`` to
    ``10 ** -spread``. The largest angle of all subspaces of the first 1 to 5 columns is given, in degrees.
    """
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = (torch.linalg.qr(torch.randn(n, 5, generator=generator))[0] for n in (20, 16))
    planted = outputs * torch.arange(5.0, 0.0, -1.0) @ inputs.t()
    x = torch.randn(4096, 16, generator=generator) * torch.logspace(spread, -spread, 16)
    pairs = list(zip(x.split(256), (x @ planted.t()).split(256), strict=True))
    torch.manual_seed(0)
    model, regimen = nn.Sequential(nn.Linear(16, 20, bias=False)), OrderedDropout(pressure=0.0, growth=1.0)

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (module(batch[0]) - batch[1]).square().sum(1).mean()

    def adam(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(module.parameters(), 0.02)

    fit(model, lambda epoch: pairs, loss, epochs=100, optimizer=adam, regimen=regimen)
    left = regimen.forms(model)["0.weight"].left.dense()
    found = factors.whitened(planted), factors.whitened(planted, right=x.t() @ x / len(x))
    plain, weighted = (max(_angle(left[:, :k], exact.left[:, :k]) for k in range(1, 6)) for exact in found)
    return plain, weighted


def _angle(a: Tensor, b: Tensor) -> float:
    """The largest principal angle of two spans, in degrees."""
    first, second = torch.linalg.qr(a)[0], torch.linalg.qr(b)[0]
    return float(torch.rad2deg(torch.linalg.svdvals(first.t() @ second).min().clamp(max=1).acos()))


def _dense(trial: Trial, split: data.Split, seed: int, rate: float, epochs: int, width: int = 16) -> nn.Module:
    def make() -> nn.Module:
        torch.manual_seed(seed)
        return ResNet(classes=split.classes, width=width)

    name = f"resnet8-w{width}-e{epochs}-lr{rate:g}-s{seed}"
    return trained(trial, name, make, lambda model: _fit(split, model, seed, rate, epochs))


def _ordered(split: data.Split, seed: int, name: str, rate: float, epochs: int) -> tuple[nn.Module, dict[str, LowRank]]:
    """Train from the start and with the batches of the dense network."""
    torch.manual_seed(seed)
    model, regimen = ResNet(classes=split.classes), OrderedDropout(distil=name == DISTILLED, seed=seed)
    _fit(split, model, seed, rate, epochs, regimen)
    return model.eval(), regimen.forms(model)


def _fit(
    split: data.Split, model: nn.Module, seed: int, rate: float, epochs: int, regimen: Regimen | None = None
) -> None:
    batches = flipped(shuffled(*split.train, size=64, seed=seed))
    fit(model, batches, cross_entropy, epochs=epochs, optimizer=momentum(rate), regimen=regimen, seed=seed)


def _quantized(model: nn.Module, most: int) -> dict[str, Form]:
    """Matrices by entropy-constrained quantization, as fine as the given bytes allow."""
    matrices = {name: Dense(model.get_parameter(name).detach().flatten(1)) for name in factorizable(model)}

    def forms(bits: float) -> dict[str, Form]:
        return {name: quantized(matrix, bits) for name, matrix in matrices.items()}

    low, high = 1.0, 8.0
    for _ in range(6):
        middle = (low + high) / 2
        low, high = (middle, high) if through_file(model, forms(middle)).bytes <= most else (low, middle)
    return forms(low)


def _decomposed(model: nn.Module) -> dict[str, LowRank]:
    found = {}
    for name in factorizable(model):
        matrix = model.get_parameter(name).detach().flatten(1)
        parts = factors.factors(matrix, Evidence(torch.ones(len(matrix)), None))
        found[name] = LowRank(Dense(parts.left), Dense(parts.right))
    return found


def _curves(split: data.Split, model: nn.Module, forms: Mapping[str, LowRank]) -> dict[str, dict[int, float]]:
    """Development loss of every layer at some ranks, every other layer being whole."""
    some = in_batches((split.development[0][:500], split.development[1][:500]))

    def loss(name: str, width: int) -> float:
        cut = _recalibrated(split, model, truncated(forms, {name: width}), 250)
        with torch.inference_mode():
            return statistics.fmean(float(cross_entropy(cut, batch)) for batch in some)

    return {
        name: {width: loss(name, width) for width in ladder(form.left.shape[1], 2.0)} for name, form in forms.items()
    }


def _widths(model: nn.Module, curves: Mapping[str, Mapping[int, float]], size: float) -> dict[str, int]:
    shapes = _shapes(model, curves)
    return allocated(curves, shapes, round(size * sum(rows * columns for rows, columns in shapes.values())))


def _shapes(model: nn.Module, names: Mapping[str, object]) -> dict[str, tuple[int, int]]:
    weights = {name: model.get_parameter(name) for name in names}
    return {name: (len(weight), weight[0].numel()) for name, weight in weights.items()}


def _cut(model: nn.Module, forms: Mapping[str, LowRank], widths: Mapping[str, int]) -> dict[str, LowRank]:
    """Factors of these widths, if they are smaller than the matrix."""
    shapes = _shapes(model, widths)
    smaller = {name: width for name, width in widths.items() for a, b in (shapes[name],) if width * (a + b) < a * b}
    return truncated(forms, smaller)


def _inputs(split: data.Split, count: int = 1000) -> tuple[Tensor, ...]:
    return split.train[0][:count].split(250)


def _recalibrated(split: data.Split, model: nn.Module, cut: Mapping[str, LowRank], count: int = 1000) -> nn.Module:
    """A copy with these weights and recomputed normalization statistics."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state.update((name, form.dense().view_as(state[name])) for name, form in cut.items())
    changed = ResNet(classes=split.classes)
    changed.load_state_dict(state)
    return recalibrate(changed.eval(), _inputs(split, count))


def _measured(split: data.Split, model: nn.Module, forms: Mapping[str, Form]) -> tuple[int, float]:
    stored = through_file(model, forms)
    return stored.bytes, 100 * accuracy(stored.load(copy.deepcopy(model)), in_batches(split.test))


def _finding(
    arms: Mapping[str, Arm], sizes: tuple[float, ...], angles: Mapping[str, tuple[float, float]], best: str
) -> Finding:
    def gaps(name: str, other: str | None = None) -> dict[float, Difference]:
        """The difference between the cut networks and the other arm of the same sizes, or the dense network."""
        theirs = {size: arms[f"{other}, {size:.0%}" if other else "dense"].values for size in sizes}
        return {size: difference(arms[f"{name}, {size:.0%}"].values, theirs[size]) for size in sizes}

    def told(found: Mapping[float, Difference]) -> str:
        return "; ".join(f"{size:.0%}: {gap}" for size, gap in found.items())

    def ahead(name: str) -> str:
        return ", ".join(f"{size:.0%}" for size, gap in gaps(name, PLAIN).items() if gap.surely > 0) or "no size"

    whole, at40 = arms[f"{best}, all columns"], arms[f"{best}, 40%"]
    fall = difference(at40.values, whole.values)
    (equal, _), (other, weighted) = angles["equal inputs"], angles["unequal inputs"]
    checks = [
        Check("With equal inputs a linear map's first columns span what those of its SVD span.", equal < SAME,
              f"Largest angle {equal:.1f} degrees."),
        Check("With unequal inputs they span what those of the SVD weighted by the data span, not the plain one's.",
              weighted < SAME < other, f"Largest angles {weighted:.1f} and {other:.1f} degrees."),
        Check(f"At 40% or less one training, cut, is as accurate as the dense network, within {_MARGIN:g} point.",
              any(gap.surely >= -_MARGIN for gap in gaps(best).values()),
              f"{best}, chosen on development data; points: {told(gaps(best))}."),
        Check("At every size up to 40% it is more accurate than the SVD of a network trained as usual.",
              all(gap.surely > 0 for gap in gaps(best, PLAIN).values()), f"Points: {told(gaps(best, PLAIN))}."),
        Check(f"The curve is graceful: at 40% it is within {_GRACE:g} points of the network with all its columns.",
              fall.surely >= -_GRACE, f"{fall} points."),
    ]  # fmt: skip
    wholes = " and ".join(f"{arms[f'{name}, all columns'].shown} ({name})" for name in (OURS, DISTILLED))
    cut = arms[f"{best}, {_CHOICE:.0%}"]
    reason = (
        f"More accurate than the SVD: {OURS} at {ahead(OURS)}; {DISTILLED} at {ahead(DISTILLED)}. With all columns the "
        f"accuracy is {wholes}, that of the network trained as usual in as many epochs {arms['dense'].shown}, every "
        f"one at a rate of its own. At {cut.bytes:,} bytes {best} has {cut.shown}, at {arms[THIN].bytes:,} a thinner "
        f"dense network {arms[THIN].shown}, at {arms[QUANTIZED].bytes:,} quantization alone {arms[QUANTIZED].shown}."
    )
    return Finding(list(arms.values()), checks, reason)
