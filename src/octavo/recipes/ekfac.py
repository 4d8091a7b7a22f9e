"""EK-FAC (Grosse et al., 2023): its influence estimates, and its value as a weight of compression errors."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.calibration.calibrating import calibrate
from octavo.calibration.curvature import Curvature, kronecker
from octavo.calibration.objective import Batch, Loss, objective
from octavo.forms import Dense, Form, LowRank, Sparse
from octavo.methods.factorize.fisher_svd import Fitting
from octavo.methods.prune import masks
from octavo.recipes import data, models
from octavo.recipes.base import Arm, Check, Finding, Trial, difference, recipe
from octavo.recipes.stored import Stored, through_file
from octavo.sources.sites import from_module
from octavo.training import cross_entropy, fit

#: Approximations of the curvature, with the exact expectation over the model's own labels if nothing else is said.
#: Sampled labels are a few draws, as nets of many classes need; true ones give the empirical Fisher matrix.
KINDS = ("diagonal", "K-FAC", "EK-FAC", "EK-FAC, sampled labels", "EK-FAC, true labels", "exact, layer by layer")
NETS = ("dense", "convolutional")
WEIGHTS = ("none", "A", "A and S", "EK-FAC", "EK-FAC, true labels")
#: Shares of the rank at which two factors have as many elements as the matrix, and shares of zeros.
_RANKS, _ZEROS = (0.7, 0.5), (0.5, 0.7)
#: Damping of influence, as a share of the mean eigenvalue.
_DAMPING = 0.1
#: What approximate influence may lack of exact influence in the linear datamodel score, and A and S of A in nats.
_SCORE_MARGIN, _LOSS_MARGIN = 0.05, 0.01


@recipe(
    "ekfac",
    system="EK-FAC",
    source="Grosse et al. (2023), arXiv 2308.03296; George et al. (2018), arXiv 1806.03884",
    claim="Influence by EK-FAC is about as accurate as by iterated inverse-Hessian-vector products, and far cheaper. "
    "Checked here is the accuracy, against an exact solution, not the cost; and, not published, whether EK-FAC "
    "follows exact influence better than K-FAC and that better than a diagonal, and whether errors weighed by inputs "
    "and output gradients cost no more loss than by inputs alone.",
    metric="influence: correlation with the exact one (higher is better); retraining: linear datamodel score, the rank "
    "correlation with losses after training on subsets (higher); compressed: test cross-entropy (lower)",
    data=f"scikit-learn's digits for influence; {data.CIFAR10}",
)
def run(trial: Trial) -> Finding:
    """Influence on a net small enough for dense matrices; then a net compressed under five weights of errors."""
    values: dict[str, list[float]] = {}
    ranks: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for seed in trial.seeds:
        for net in NETS:
            trial.step(f"influence on a {net} net, seed {seed}")
            scores, subsets, losses = influence(trial, net, seed)
            for kind in KINDS:
                name = f"influence, {net}, {kind}"
                values.setdefault(name, []).append(_correlation(scores[kind], scores["exact"]))
                ranks.setdefault(name, []).append(_rank_correlation(scores[kind], scores["exact"]))
            for kind, score in scores.items():
                # What is learned lowers the loss.
                found = _rank_correlation(-score @ subsets.t(), losses)
                values.setdefault(f"retraining, {net}, {kind}", []).append(found)
        for name, stored, loss in compressed(trial, seed):
            values.setdefault(name, []).append(loss)
            sizes[name] = stored.bytes
    also = {name: {"rank correlation": statistics.fmean(found)} for name, found in ranks.items()}
    arms = {name: Arm(name, sizes.get(name, 0), tuple(found), also.get(name, {})) for name, found in values.items()}
    return Finding(list(arms.values()), *_judged(arms))


def _judged(arms: dict[str, Arm]) -> tuple[list[Check], str]:
    checks = []
    for net in NETS:
        for fine, coarse in (("EK-FAC", "K-FAC"), ("K-FAC", "diagonal")):
            ours, theirs = (arms[f"influence, {net}, {kind}"] for kind in (fine, coarse))
            gap = difference(ours.values, theirs.values)
            checks.append(
                Check(
                    f"{net} net: {fine} correlates better with exact influence than {coarse}.",
                    gap.surely > 0,
                    f"{ours.shown} against {theirs.shown}; difference {gap}.",
                )
            )
        ours, theirs = (arms[f"retraining, {net}, {kind}"] for kind in ("EK-FAC", "exact"))
        gap = difference(ours.values, theirs.values)
        checks.append(
            Check(
                f"{net} net: linear datamodel score of EK-FAC at most {_SCORE_MARGIN:g} below that of exact influence.",
                gap.surely >= -_SCORE_MARGIN,
                f"{ours.shown} against {theirs.shown}; difference {gap}.",
            )
        )
    for kind in _sizes():
        one, both = arms[f"{kind}, A"], arms[f"{kind}, A and S"]
        gain = difference(one.values, both.values)
        checks.append(
            Check(
                f"{kind}: weighed by A and S at most {_LOSS_MARGIN:g} nats more loss than by A alone.",
                gain.surely >= -_LOSS_MARGIN,
                f"{both.shown} against {one.shown} at {both.bytes:,} and {one.bytes:,} bytes; A and S gain {gain}.",
            )
        )
    bounds = "; ".join(
        f"{kind} {' and '.join(f'{arms[name].mean:.3f}' for name in (f'influence, {net}, {kind}' for net in NETS))}"
        for kind in KINDS[2:]
    )
    reason = (
        f"Correlations with exact influence on the {' and the '.join(NETS)} net: {bounds}. In compression EK-FAC in "
        "place of A and S changes the loss by "
        f"{_changes(arms, 'A and S', 'EK-FAC')}, and true labels in place of the model's own by "
        f"{_changes(arms, 'EK-FAC', 'EK-FAC, true labels')}."
    )
    return checks, reason


def _changes(arms: dict[str, Arm], before: str, after: str) -> str:
    """Differences of loss between two weights of errors, size by size."""
    return ", ".join(
        str(difference(arms[f"{kind}, {after}"].values, arms[f"{kind}, {before}"].values)) for kind in _sizes()
    )


# Influence


@dataclass(frozen=True)
class Layer:
    """Statistics of a layer at T positions: inputs (N, T, columns), gradients of log-probabilities (C, N, T, rows)."""

    inputs: Tensor
    gradients: Tensor

    def outputs(self, labels: Tensor) -> Tensor:
        """Gradients of the loss of labels (N,) at the outputs, (N, T, rows)."""
        return -self.gradients[labels, torch.arange(len(labels))]

    def weights(self, labels: Tensor) -> Tensor:
        """Gradients of the loss of labels (N,) in the weights, (N, rows, columns)."""
        return self.outputs(labels).mT @ self.inputs

    def fisher_root(self, probabilities: Tensor) -> Tensor:
        """``R`` (N C, weights) with ``R^T R`` the Gauss-Newton matrix, a mean over examples and a sum over classes."""
        heavy = self.gradients * (probabilities.t() / len(probabilities)).sqrt()[:, :, None, None]
        return (heavy.mT @ self.inputs).flatten(2).flatten(0, 1)

    def solved(self, kind: str, labels: Tensor, counts: Tensor, asked: Tensor, damping: float) -> Tensor:
        """``(F + damping)^-1`` of gradients (queries, rows, columns), ``F`` approximated.

        It is a mean over labels (draws, N), each of which counts as often as ``counts`` (draws, N), of mean 1, says.
        """
        outputs = torch.cat(
            [self.outputs(row) * count.sqrt()[:, None, None] for row, count in zip(labels, counts, strict=True)]
        )
        gradients = outputs.mT @ self.inputs.repeat(len(labels), 1, 1)
        if kind == "diagonal":
            return asked / (gradients.square().mean(0) + damping)
        # A sum over the positions of an example on one side, a mean on the other.
        left = outputs.flatten(0, 1).t() @ outputs.flatten(0, 1) / len(outputs)
        right = self.inputs.flatten(0, 1).t() @ self.inputs.flatten(0, 1) / self.inputs.shape[:2].numel()
        curvature = kronecker(left, right)
        return (curvature if kind == "K-FAC" else curvature.corrected(gradients)).solve(asked, damping)


def influence(trial: Trial, net: str, seed: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Influence (queries, examples) on a small net by kind, then subsets (subsets, examples) and losses after them.

    The influence of training example ``m`` on query ``q`` is ``grad_q^T (F + damping)^-1 grad_m``. Exactly, ``F`` is
    the dense Gauss-Newton matrix of all weights together; approximations take it layer by layer. Damping is the same
    for all: a tenth of the mean diagonal of a layer. The losses (queries, subsets) are those of the net when it was
    trained again, from the same start, on random halves of the examples.
    """
    count, queries, halves = (100, 20, 4) if trial.quick else (500, 200, 32)
    x, y = _digits()
    model = _learned(trial, net, seed, x[:count], y[:count])
    known, probabilities = model.seen(x[:count])
    shown, _ = model.seen(x[-queries:])
    learned = [layer.weights(y[:count]) for layer in known]
    asked = [layer.weights(y[-queries:]) for layer in shown]
    roots = [layer.fisher_root(probabilities) for layer in known]
    damping = [_DAMPING * float(root.square().sum()) / root.shape[1] for root in roots]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(probabilities, 8, replacement=True, generator=generator).t()
    classes = probabilities.shape[1]
    expected = torch.arange(classes)[:, None].expand(classes, count), classes * probabilities.t()
    labels = {
        "EK-FAC, sampled labels": (drawn, torch.ones_like(drawn, dtype=x.dtype)),
        "EK-FAC, true labels": (y[:count][None], torch.ones(1, count, dtype=x.dtype)),
    }
    scores = {"exact": _exact(roots, damping, asked, learned)}
    for kind in KINDS:
        scores[kind] = torch.zeros_like(scores["exact"])
        for layer, ridge, root, one, other in zip(known, damping, roots, asked, learned, strict=True):
            if kind == "exact, layer by layer":
                scores[kind] += _exact([root], [ridge], [one], [other])
                continue
            inverse = layer.solved(kind, *labels.get(kind, expected), one, ridge)
            scores[kind] += inverse.flatten(1) @ other.flatten(1).t()
    subsets, losses = torch.zeros(halves, count, dtype=x.dtype), []
    for subset in subsets:
        which = torch.randperm(count, generator=generator)[: count // 2]
        subset[which] = 1
        again = _learned(trial, net, seed, x[which], y[which])
        with torch.inference_mode():
            losses.append(functional.cross_entropy(again(x[-queries:]), y[-queries:], reduction="none"))
    return scores, subsets, torch.stack(losses, 1)


def _learned(trial: Trial, net: str, seed: int, x: Tensor, y: Tensor) -> SmallNet:
    """A net trained on digits."""
    torch.manual_seed(seed)
    model = SmallNet(net).double()
    batches = models.shuffled(x, y, size=50, seed=seed)
    fit(model, batches, cross_entropy, epochs=10 if trial.quick else 30, lr=1e-2, seed=seed)
    return model


def _exact(roots: list[Tensor], damping: list[float], asked: list[Tensor], learned: list[Tensor]) -> Tensor:
    """Influence (queries, examples) by the dense joint matrix of the weights of some layers."""
    root = torch.cat(roots, 1)
    ridge = torch.cat([torch.full_like(part[0], value) for part, value in zip(roots, damping, strict=True)])
    ours, theirs = (torch.cat([part.flatten(1) for part in parts], 1) for parts in (asked, learned))
    return ours @ torch.linalg.solve(root.t() @ root + ridge.diag(), theirs.t())


def _correlation(one: Tensor, other: Tensor) -> float:
    """Pearson correlation over the training examples of a query, averaged over queries."""
    one, other = one - one.mean(1, keepdim=True), other - other.mean(1, keepdim=True)
    return float(functional.cosine_similarity(one, other).mean())


def _rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman correlation, averaged over queries."""
    from scipy.stats import spearmanr

    return statistics.fmean(spearmanr(*pair).statistic for pair in zip(one.numpy(), other.numpy(), strict=True))


def _digits() -> tuple[Tensor, Tensor]:
    """Digits (N, 64) in a fixed random order."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.data), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.data / 8 - 1)[order], torch.tensor(found.target).long()[order]


class SmallNet(nn.Module):
    """A net for 8 x 8 digits: dense with 1,210 weights, or convolutional with 1,954. A constant input is the bias."""

    def __init__(self, net: str) -> None:
        super().__init__()
        self.kernels = 2 if net == "convolutional" else 0
        shapes = [(10, 8), (73, 8), (129, 10)] if self.kernels else [(65, 16), (17, 10)]
        self.layers = nn.ModuleList(nn.Linear(columns, rows, bias=False) for columns, rows in shapes)

    def forward(self, x: Tensor, keep: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Logits (N, 10) of digits (N, 64); inputs and outputs of every layer are added to ``keep``."""
        x = x[:, :, None]
        for number, layer in enumerate(self.layers):
            if number < self.kernels:
                # Patches of 3 x 3, at every pixel first and at every other pixel then.
                maps = x.mT.unflatten(2, (8, 8))
                x = functional.unfold(maps, 3, padding=1, stride=number + 1).mT
            else:
                x = x.flatten(1)[:, None]
            inputs = functional.pad(x, (0, 1), value=1.0)
            outputs = layer(inputs)
            if keep is not None:
                keep.append((inputs, outputs))
            x = torch.tanh(outputs)
        return outputs[:, 0]

    def seen(self, x: Tensor) -> tuple[list[Layer], Tensor]:
        """Statistics of all layers on the inputs, and the probabilities (N, 10)."""
        kept: list[tuple[Tensor, Tensor]] = []
        logs = self(x, kept).log_softmax(-1)
        outputs = [part for _, part in kept]
        gradients = zip(
            *(torch.autograd.grad(column.sum(), outputs, retain_graph=True) for column in logs.t()), strict=True
        )
        layers = [
            Layer(inputs.detach(), torch.stack(parts)) for (inputs, _), parts in zip(kept, gradients, strict=True)
        ]
        return layers, logs.detach().exp()


# Weights of errors


def _sizes() -> list[str]:
    return [*(f"low rank {share:g}" for share in _RANKS), *(f"pruned {share:.0%}" for share in _ZEROS)]


def compressed(trial: Trial, seed: int) -> Sequence[tuple[str, Stored, float]]:
    """Arms of a trained ResNet-8: name, what was stored, test cross-entropy. Nothing is trained afterwards."""
    split, model = data.images(trial), models.classifier(trial, seed)
    source = from_module(model)
    sites = [site for site in source.sites()[0] if site.name.startswith("blocks.")]
    x, y = (part[: 200 if trial.quick else 1000] for part in split.train)
    found: dict[str, dict[str, Curvature]] = {}
    for labels, batches, wanted in (
        ("own", list(x.split(50)), objective("kl")),
        ("true", list(zip(x.split(50), y.split(50), strict=True)), Loss(_losses)),
    ):
        evidence = calibrate(source, sites, batches, wanted, seed=seed, curvature="ekfac").evidence
        found[labels] = {site.name: evidence[site.name].curvature or _missing(site.name) for site in sites}
    weights = {site.name: site.layout.to_matrix(source.read(site.name).float()) for site in sites}
    results = []
    for kind in WEIGHTS:
        trial.step(f"compressing, errors weighed by {kind}, seed {seed}")
        curvatures = {
            name: weighing(kind, curvature)
            for name, curvature in found["true" if kind.endswith("true labels") else "own"].items()
        }
        for size, share in zip(_sizes(), (*_RANKS, *_ZEROS), strict=True):
            make = low_rank if size.startswith("low rank") else pruned
            forms = {name: make(weight, curvatures[name], share) for name, weight in weights.items()}
            stored = through_file(model, forms)
            results.append((f"{size}, {kind}", stored, _test_loss(model, split, stored)))
    stored = through_file(model)
    return [("as trained", stored, _test_loss(model, split, stored)), *results]


def weighing(kind: str, curvature: Curvature) -> Curvature:
    """The part of a curvature that an arm may use."""
    blind = torch.ones_like(curvature.output_values)
    if kind == "none":
        some = torch.ones_like(curvature.input_values)
        return replace(curvature, output_values=blind, input_values=some, values=torch.ones_like(curvature.values))
    if kind == "A":
        values = curvature.input_values.expand_as(curvature.values)
        return replace(curvature, output_values=blind, values=values)
    if kind == "A and S":
        return replace(curvature, values=curvature.output_values[:, None] * curvature.input_values)
    return curvature


def low_rank(weight: Tensor, curvature: Curvature, share: float) -> Form:
    """Two factors of least loss under a curvature; for a product of moments this is the whitened SVD."""
    rows, columns = weight.shape
    rank = max(1, round(share * rows * columns / (rows + columns)))
    found = Fitting(weight, curvature).of(rank, sweeps=10)
    return LowRank(Dense(found.left), Dense(found.right))


def pruned(weight: Tensor, curvature: Curvature, share: float) -> Form:
    """Optimal brain surgeon: prune weights of least ``w^2 / (2 [F^-1]_ww)``; the others compensate."""
    mask = masks.largest(weight.square() / curvature.inverse_diagonal(), round((1 - share) * weight.numel()))
    return Sparse(mask, Dense(surviving(weight, mask, curvature)[mask][None]))


def surviving(weight: Tensor, mask: Tensor, curvature: Curvature, steps: int = 100) -> Tensor:
    """The weights under a mask of least loss, by conjugate gradients on ``mask F mask``."""
    target, stays = weight.double(), mask.double()
    weights = target * stays
    scale = (curvature.outputs.square() @ curvature.values @ curvature.inputs.square().t()).double()
    residual = stays * curvature.times(target - weights)
    direction, energy = residual / scale, float((residual.square() / scale).sum())
    first = energy
    for _ in range(steps):
        if energy <= 1e-12 * first or not energy:
            break
        moved = stays * curvature.times(direction)
        length = energy / float((direction * moved).sum())
        weights, residual = weights + length * direction, residual - length * moved
        before, energy = energy, float((residual.square() / scale).sum())
        direction = residual / scale + energy / before * direction
    return weights.float()


def _missing(name: str) -> Curvature:
    raise RuntimeError(f"{name}: no curvature was measured")


def _losses(module: nn.Module, batch: Batch) -> Tensor:
    """The loss of the true label of every example."""
    return functional.cross_entropy(module(batch[0]), batch[1], reduction="none")


@torch.inference_mode()
def _test_loss(model: nn.Module, split: data.Split, stored: Stored) -> float:
    model = stored.load(copy.deepcopy(model))
    losses = [functional.cross_entropy(model(x), y, reduction="sum") for x, y in models.in_batches(split.test)]
    return float(torch.stack(losses).sum()) / len(split.test[0])
