"""Maestro: one training with ordered dropout, cut to many sizes, against the SVD of a network trained as usual."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from octavo.evidence import Evidence
from octavo.forms import Dense, LowRank
from octavo.methods.factorize import factors
from octavo.recipes import Arm, Check, Finding, Trial, data, recipe
from octavo.recipes.models import ResNet, classifier, flipped, in_batches, momentum, shuffled
from octavo.recipes.stored import through_file
from octavo.train import accuracy, cross_entropy, fit
from octavo.train.maestro import SOURCE, OrderedDropout, allocated, factorizable, ladder, recalibrate, truncated

#: Weights of the factorized layers, as shares of the dense ones.
SIZES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
#: Weights of the group lasso to choose from, after one epoch and by development accuracy at 30%.
PRESSURES = (0.0, 1e-5, 1e-4)
EPOCHS = 8
#: Size at which the lasso and the loss are chosen.
_CHOICE = 0.3
#: Largest angle between subspaces, in degrees, that counts as the same one.
SAME = 5.0
#: Both losses of a step: the narrowed network's alone, or the whole one's, from which the narrowed one learns.
OURS, DISTILLED, PLAIN = "Maestro", "Maestro, distilled", "SVD of a trained network"


@recipe(
    "maestro",
    system="Maestro",
    source=SOURCE,
    claim="One training with ordered dropout on factors finds the SVD of a linear map, weighted by the data, and gives "
    "a network that can be cut to any size without retraining, better than the SVD of one that was trained as usual.",
    metric="test accuracy (%, higher is better)",
    data=data.CIFAR10,
)
def run(trial: Trial) -> Finding:
    """Principal angles of a linear map; then a ResNet-8, cut in both ways with the same choice of ranks."""
    angles = {name: _angles(spread) for name, spread in (("equal inputs", 0.0), ("unequal inputs", 0.5))}
    split = data.images(trial)
    pressures = {name: _chosen_pressure(trial, split, name) for name in (OURS, DISTILLED)}
    sizes = SIZES[3:5] if trial.quick else SIZES
    values: dict[str, list[float]] = {}
    stored: dict[str, list[int]] = {}
    ranks: dict[str, list[float]] = {}
    development: dict[str, float] = {}

    def measured(name: str, bytes_and_accuracy: tuple[int, float]) -> None:
        stored.setdefault(name, []).append(bytes_and_accuracy[0])
        values.setdefault(name, []).append(bytes_and_accuracy[1])

    for seed in trial.seeds:
        dense = classifier(trial, seed, epochs=EPOCHS)
        measured("dense", _measured(split, dense, {}))
        nets = {PLAIN: (dense, _decomposed(dense))}
        for name, pressure in pressures.items():
            trial.step(f"{name}, seed {seed}")
            nets[name] = model, forms = _trained(trial, split, seed, name, pressure, EPOCHS)
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
                if seed == trial.seeds[0] and size == _CHOICE:
                    development[name] = accuracy(whole, in_batches(split.development))
    also = {
        f"{name}, all columns": {"lasso": pressure, "mean rank": statistics.fmean(ranks[name])}
        for name, pressure in pressures.items()
    }
    arms = {
        name: Arm(name, round(statistics.fmean(stored[name])), tuple(found), also.get(name, {}))
        for name, found in values.items()
    }
    return _finding(arms, sizes, angles, max(pressures, key=lambda name: development[name]))


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


def _trained(
    trial: Trial, split: data.Split, seed: int, name: str, pressure: float, epochs: int
) -> tuple[nn.Module, dict[str, LowRank]]:
    """From the same start and with the same batches and rates as :func:`classifier`."""
    torch.manual_seed(seed)
    model = ResNet(classes=split.classes)
    regimen = OrderedDropout(pressure=pressure, distil=name == DISTILLED, seed=seed)
    batches = flipped(shuffled(*split.train, size=64, seed=seed))
    fit(
        model, batches, cross_entropy, epochs=min(epochs, 2) if trial.quick else epochs, optimizer=momentum(0.1),
        regimen=regimen, seed=seed,
    )  # fmt: skip
    return model.eval(), regimen.forms(model)


def _chosen_pressure(trial: Trial, split: data.Split, name: str) -> float:
    def score(pressure: float) -> float:
        trial.step(f"{name}, choosing the lasso: {pressure:g}")
        model, forms = _trained(trial, split, trial.seeds[0], name, pressure, 1)
        full = {name: form.left.shape[1] for name, form in forms.items()}
        shares = {name: max(1, round(_CHOICE * rank)) for name, rank in full.items()}
        model = _recalibrated(split, model, truncated(forms, shares))
        return accuracy(model, in_batches(split.development))

    return max(PRESSURES, key=score)


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
    """Factors of these widths, where they are smaller than the matrix."""
    shapes = _shapes(model, widths)
    smaller = {name: width for name, width in widths.items() for a, b in (shapes[name],) if width * (a + b) < a * b}
    return truncated(forms, smaller)


def _inputs(split: data.Split, count: int = 1000) -> tuple[Tensor, ...]:
    return split.train[0][:count].split(250)


def _recalibrated(split: data.Split, model: nn.Module, cut: Mapping[str, LowRank], count: int = 1000) -> nn.Module:
    """A copy with these weights, whose normalization has seen them."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state.update((name, form.dense().view_as(state[name])) for name, form in cut.items())
    changed = ResNet(classes=split.classes)
    changed.load_state_dict(state)
    return recalibrate(changed.eval(), _inputs(split, count))


def _measured(split: data.Split, model: nn.Module, forms: Mapping[str, LowRank]) -> tuple[int, float]:
    stored = through_file(model, forms)
    return stored.bytes, 100 * accuracy(stored.load(ResNet(classes=split.classes)), in_batches(split.test))


def _finding(
    arms: Mapping[str, Arm], sizes: tuple[float, ...], angles: Mapping[str, tuple[float, float]], best: str
) -> Finding:
    def difference(name: str, size: float) -> float:
        return arms[f"{name}, {size:.0%}"].mean - arms[f"{PLAIN}, {size:.0%}"].mean

    def spread(name: str, size: float) -> float:
        return max(arms[f"{of}, {size:.0%}"].spread or 0.0 for of in (name, PLAIN))

    def told(name: str) -> str:
        return "; ".join(
            f"{size:.0%}: {difference(name, size):+.1f} (spread {spread(name, size):.1f})" for size in sizes
        )

    def ahead(name: str) -> str:
        return ", ".join(f"{size:.0%}" for size in sizes if difference(name, size) > spread(name, size)) or "no size"

    small = [size for size in sizes if size <= 0.4]
    whole, at40 = arms[f"{best}, all columns"], arms[f"{best}, 40%"]
    (equal, _), (other, weighted) = angles["equal inputs"], angles["unequal inputs"]
    checks = [
        Check("With equal inputs a linear map's first columns span what those of its SVD span.", equal < SAME,
              f"Largest angle {equal:.1f} degrees."),
        Check("With unequal inputs they span what those of the SVD weighted by the data span, not the plain one's.",
              weighted < SAME < other, f"Largest angles {weighted:.1f} and {other:.1f} degrees."),
        Check("At every size up to 40% one training, cut, is more accurate than the SVD of a network trained as usual.",
              all(difference(best, size) > spread(best, size) for size in small),
              f"{best}, chosen on development data; points: {told(best)}."),
        Check("The curve is graceful: at 40% it is within 2 points of the network with all its columns.",
              whole.mean - at40.mean < 2, f"{best}: {at40.mean:.1f} against {whole.mean:.1f}."),
    ]  # fmt: skip
    wholes = " and ".join(f"{arms[f'{name}, all columns'].mean:.1f} ({name})" for name in (OURS, DISTILLED))
    reason = (
        f"Ahead of the SVD by more than the spread: {OURS} at {ahead(OURS)}; {DISTILLED} at {ahead(DISTILLED)}. With "
        f"all columns the accuracy is {wholes}, that of the network trained as usual in as many epochs "
        f"{arms['dense'].mean:.1f}."
    )
    return Finding(list(arms.values()), checks, reason)
