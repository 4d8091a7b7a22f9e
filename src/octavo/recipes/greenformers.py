"""Greenformers: a transformer with low-rank layers against one with low-rank attention, by length."""

from __future__ import annotations

import copy
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from octavo.recipes import data
from octavo.recipes.base import Arm, Check, Finding, Trial, difference, recipe
from octavo.recipes.models import in_batches, shuffled, trained
from octavo.recipes.stored import through_file
from octavo.training import accuracy, cross_entropy, fit
from octavo.training.low_rank import low_rank

KINDS = ("full", "LRT", "Linformer")
#: Tokens in every batch that is timed, so that lengths can be compared.
TOKENS = 4096
#: The published length up to which low-rank layers are better, and how far from the predicted one a crossing may lie.
PUBLISHED, NEAR = 512, 1.5
#: Learning rates of classifiers, one chosen for each on development images with the first seed; a third of them where
#: training begins at trained weights.
RATES = (1e-3, 3e-3, 9e-3)
FORWARD, STEP, MEMORY = "forward pass (ms)", "training step (ms)", "it holds (MB)"


@recipe(
    "greenformers",
    system="Greenformers (Low-Rank Transformer)",
    source="Cahyawijaya (2021), arXiv 2108.10808; Linformer: Wang et al. (2020), arXiv 2006.04768",
    claim="A transformer with low-rank layers serves sequences of up to 512 tokens better than Linformer, which serves "
    "longer ones better; only the former makes the file smaller. Checked here are processor times on one thread, and "
    "whether they cross where the counts of multiplications do.",
    metric=f"processor time of a forward pass over {TOKENS:,} tokens on one thread (ms, lower is better)",
    data=data.CIFAR10,
)
def run(trial: Trial) -> Finding:
    """Encoders of every length timed, and small ones trained on images in patches of two sizes."""
    lengths = (16, 64) if trial.quick else (64, 128, 256, 512, 1024, 2048, 4096)
    width, projected = (32, 8) if trial.quick else (256, 128)
    arms: list[Arm] = []
    found: dict[str, dict[int, Arm]] = {kind: {} for kind in KINDS}
    times: dict[str, dict[str, list[Sequence[float]]]] = {FORWARD: {}, STEP: {}}
    for length in lengths:
        trial.step(f"{length} tokens")
        for kind, (arm, steps) in _timed(trial, length, width, projected).items():
            found[kind][length] = arm
            arms.append(arm)
            times[FORWARD].setdefault(kind, []).append(arm.values)
            times[STEP].setdefault(kind, []).append(steps)
    classifiers = _trained(trial)
    # Multiplications a token: full layers have 12 d^2 + 2 n d, LRT 18 d r + 2 n d, Linformer 12 d^2 + 4 k d.
    expected = 6 * width - 9 * (width // 4) + 2 * projected
    checks = [check for column in times for check in _crossing(times[column], lengths, column, expected)]
    sizes = {kind: [found[kind][length].bytes for length in lengths] for kind in KINDS}
    checks.append(
        Check(
            "LRT's file is smaller than that of full layers at every length, and Linformer's at none.",
            all(a < b for a, b in zip(sizes["LRT"], sizes["full"], strict=True))
            and not any(a < b for a, b in zip(sizes["Linformer"], sizes["full"], strict=True)),
            "; ".join(
                f"{length}: full {full:,}, LRT {thin:,}, Linformer {other:,} bytes"
                for length, full, thin, other in zip(lengths, *(sizes[kind] for kind in KINDS), strict=True)
            )
            + ".",
        )
    )
    return Finding([*arms, *classifiers], checks, _reason(found, lengths[-1], classifiers))


class Encoder(nn.Module):
    """A pre-norm transformer encoder that classifies the mean of its tokens.

    Parameters
    ----------
    features, length
        Shape of its inputs, (N, length, features).
    projected
        Linformer's ``k``: keys and values of that many positions, learned mixtures of all; None for full attention.
    """

    def __init__(self, features: int, length: int, *, width: int, projected: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.Sequential(*(_Layer(length, width, projected) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, length, features) to logits of 10 classes."""
        return self.head(self.norm(self.layers(self.embed(x) + self.positions)).mean(1))


class _Layer(nn.Module):
    def __init__(self, length: int, width: int, projected: int | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        if projected is not None:
            # E and F of the paper, shared by heads.
            self.mix_keys, self.mix_values = (
                nn.Parameter(torch.randn(projected, length) / length**0.5) for _ in range(2)
            )
        self.projected = projected

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = self.query(y), self.key(y), self.value(y)
        if self.projected is not None:
            k, v = self.mix_keys @ k, self.mix_values @ v
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in (q, k, v))
        x = x + self.output(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def encoder(kind: str, features: int, length: int, width: int, projected: int, seed: int) -> nn.Module:
    """One of :data:`KINDS`, all layers of LRT at a quarter of the width as their rank."""
    torch.manual_seed(seed)
    model = Encoder(features, length, width=width, projected=projected if kind == "Linformer" else None)
    if kind == "LRT":
        low_rank(model.layers, width // 4)
    return model


def _timed(trial: Trial, length: int, width: int, projected: int) -> dict[str, tuple[Arm, Sequence[float]]]:
    """Encoders of every kind, and the times of their training steps by seed."""
    x = torch.randn(TOKENS // length, length, width, generator=torch.Generator().manual_seed(0))
    times: dict[str, list[dict[str, float]]] = {FORWARD: [], STEP: []}
    for seed in trial.seeds:
        models = {kind: encoder(kind, width, length, width, projected, seed) for kind in KINDS}
        for column, call in ((FORWARD, _forward), (STEP, _step)):
            times[column].append(_milliseconds({kind: partial(call, model, x) for kind, model in models.items()}))
    found: dict[str, tuple[Arm, Sequence[float]]] = {}
    for kind, model in models.items():
        forward, steps = (tuple(taken[kind] for taken in times[column]) for column in (FORWARD, STEP))
        also = {
            STEP: statistics.fmean(steps),
            MEMORY: _peak(model, x),
            "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
        }
        found[kind] = Arm(f"{length} tokens: {kind}", through_file(model).bytes, forward, also), steps
    return found


@torch.inference_mode()
def _forward(model: nn.Module, x: Tensor) -> None:
    model.eval()(x)


def _step(model: nn.Module, x: Tensor) -> None:
    cross_entropy(model.train(), (x, torch.zeros(len(x), dtype=torch.long))).backward()
    model.zero_grad(set_to_none=True)


def _milliseconds(calls: Mapping[str, Callable[[], Any]], rounds: int = 3) -> dict[str, float]:
    """Median time of every call, in alternating rounds after a warm-up round, on one thread.

    Processor time is measured, which on one thread equals the elapsed time if nothing else is running.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(rounds + 1):
            for name, call in calls.items():
                started = time.process_time()
                call()
                found[name].append(1e3 * (time.process_time() - started))
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(values[1:]) for name, values in found.items()}


class _Held(TorchDispatchMode):
    """Bytes of live tensors created by operations."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.storages: dict[int, weakref.ref] = {}
        for tensor in known:
            self._hold(tensor, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._hold(tensor, tensor.untyped_storage().nbytes())
        return out

    def _hold(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self.storages:
            return

        def released(_: Any) -> None:
            self.storages.pop(key)
            self.now -= size

        self.storages[key] = weakref.ref(storage, released)
        self.now += size
        self.most = max(self.most, self.now)


def _peak(model: nn.Module, x: Tensor) -> float:
    """Peak megabytes of gradients and intermediate tensors in a training step."""
    with _Held([*model.parameters(), x]) as held:
        _step(model, x)
    return held.most / 1e6


def patches(images: Tensor, side: int) -> Tensor:
    """Images (N, channels, H, W) as (N, patches, values)."""
    return functional.unfold(images, side, stride=side).transpose(1, 2).contiguous()


def _trained(trial: Trial) -> list[Arm]:
    """Small encoders on images in patches of two sizes, then LRT begun at the weights of the trained full encoder."""
    split = data.images(trial, train=2_500)
    arms = []
    for side in (4, 2):
        parts = [(patches(x, side), y) for x, y in (split.train, split.development, split.test)]
        length = parts[0][0].shape[1]
        rows: dict[str, list[dict[str, float]]] = {}
        rates: dict[str, float] = {}
        for seed in trial.seeds:
            models = _classifiers(trial, parts[0], parts[1], seed, rates, warm=side == 4)
            for name, model in models.items():
                stored = through_file(model)
                rows.setdefault(name, []).append(
                    {
                        "bytes": stored.bytes,
                        "accuracy": 100 * accuracy(stored.load(model), in_batches(parts[2])),
                        "parameters": sum(parameter.numel() for parameter in model.parameters()),
                    }
                )
            shown = parts[0][0][: TOKENS // length]
            calls = {name: partial(_forward, model, shown) for name, model in models.items()}
            for name, taken in _milliseconds(calls).items():
                rows[name][-1]["ms"] = taken
        arms += [
            _classifier(f"CIFAR-10 in {length} patches: {name}", found, rates.get(name)) for name, found in rows.items()
        ]
    return arms


def _classifiers(
    trial: Trial,
    pair: tuple[Tensor, Tensor],
    development: tuple[Tensor, Tensor],
    seed: int,
    rates: dict[str, float],
    *,
    warm: bool,
) -> dict[str, nn.Module]:
    """Trained encoders by name: of :data:`KINDS`, and optionally of LRT with other starts.

    Rates are chosen for those that have none yet.
    """
    (length, features), width, epochs = pair[0].shape[1:], 32 if trial.quick else 64, 1 if trial.quick else 2

    def make(kind: str) -> nn.Module:
        return encoder(kind, features, length, width, length // 4, seed)

    def learned(name: str, start: str, begin: Callable[[], nn.Module], epochs: int, grid: Sequence[float]) -> nn.Module:
        def at(lr: float) -> nn.Module:
            def learn(model: nn.Module) -> None:
                fit(model, shuffled(*pair, size=50, seed=seed), cross_entropy, epochs=epochs, lr=lr, seed=seed)

            label = f"greenformers-{start}-n{length}-d{width}-m{len(pair[0])}-e{epochs}-lr{lr:g}-s{seed}"
            return trained(trial, label, begin, learn)

        if name not in rates:
            rates[name] = max(grid, key=lambda lr: accuracy(at(lr), in_batches(development)))
        return at(rates[name])

    models = {kind: learned(kind, kind.lower(), partial(make, kind), epochs, RATES) for kind in KINDS}
    for start in ("svd", "semi-nmf") if warm else ():
        trial.step(f"{length} patches, LRT from {start}, seed {seed}")
        begun = make("full")
        begun.load_state_dict(models["full"].state_dict())
        low_rank(begun.get_submodule("layers"), width // 4, start)
        name = f"LRT from {start}, one epoch later"
        models[f"LRT from {start}, as it begins"] = begun
        label = f"lrt-{start}-lr{rates['full']:g}"
        models[name] = learned(name, label, partial(copy.deepcopy, begun), 1, [rate / 3 for rate in RATES])
    return models


def _classifier(name: str, rows: Sequence[Mapping[str, float]], rate: float | None) -> Arm:
    accuracies = [row["accuracy"] for row in rows]
    also = {"parameters": float(rows[0]["parameters"]), "test accuracy (%)": statistics.fmean(accuracies)}
    if len(accuracies) > 1:
        also["spread of accuracy"] = statistics.stdev(accuracies)
    if rate is not None:
        also["learning rate"] = rate
    return Arm(name, round(statistics.fmean(row["bytes"] for row in rows)), tuple(row["ms"] for row in rows), also)


def crossover(lengths: Sequence[int], rising: Sequence[float], flat: Sequence[float]) -> float | None:
    """The length from which ``rising`` stays above ``flat``, interpolated on logarithms."""
    ratios = [math.log(a / b) for a, b in zip(rising, flat, strict=True)]
    below = [at for at, ratio in enumerate(ratios) if ratio < 0]
    if not below or below[-1] == len(ratios) - 1:
        return None
    at = below[-1]
    share = -ratios[at] / (ratios[at + 1] - ratios[at])
    return float(lengths[at] * (lengths[at + 1] / lengths[at]) ** share)


def _crossing(
    times: Mapping[str, Sequence[Sequence[float]]], lengths: Sequence[int], column: str, expected: float
) -> list[Check]:
    """Times of a kind, by length and seed."""
    ours, others = times["LRT"], times["Linformer"]
    title, last = column.split(" (")[0].capitalize(), lengths[-1]
    short = [at for at, length in enumerate(lengths[:-1]) if length <= PUBLISHED]
    figures = "; ".join(
        f"{length}: {statistics.fmean(a):.4g} and {statistics.fmean(b):.4g} ms, {difference(b, a)}"
        for length, a, b in zip(lengths, ours, others, strict=True)
    )
    seeds = zip(zip(*ours, strict=True), zip(*others, strict=True), strict=True)
    places = [crossover(lengths, *pair) for pair in seeds]
    found = [math.log(place / expected) for place in places if place]
    near = len(found) == len(places) and all(
        difference(*pair).surely >= -math.log(NEAR) for pair in ((found, [0.0]), ([0.0], found))
    )
    return [
        Check(
            f"{title}: LRT is faster at all lengths up to {lengths[short[-1]]} tokens, Linformer at {last}.",
            all(difference(others[at], ours[at]).surely > 0 for at in short)
            and difference(ours[-1], others[-1]).surely > 0,
            f"LRT, Linformer, and by how much LRT is ahead: {figures}.",
        ),
        Check(
            f"{title}: they cross within a factor of {NEAR:g} of {expected} tokens, where they have as many "
            "multiplications.",
            near,
            f"By seed: {', '.join(f'{at:.0f}' if at else 'nowhere' for at in places)}; published: {PUBLISHED}.",
        ),
    ]


def _reason(found: Mapping[str, Mapping[int, Arm]], longest: int, classifiers: Sequence[Arm]) -> str:
    peaks = {kind: found[kind][longest].also[MEMORY] for kind in KINDS}
    # Of four heads in float32.
    pairs = TOKENS // longest * 4 * longest**2 * 4 / 1e6
    rates = "; ".join(
        f"{arm.name.removeprefix('CIFAR-10 in ')} {arm.also['test accuracy (%)']:.1f}"
        + (f" ± {arm.also['spread of accuracy']:.1f}" if "spread of accuracy" in arm.also else "")
        for arm in classifiers
    )
    return (
        f"At {longest} tokens a training step holds {peaks['full']:.0f} MB with full layers, {peaks['LRT']:.0f} with "
        f"LRT and {peaks['Linformer']:.0f} with Linformer; the weights of attention of one full layer would be "
        f"{pairs:.0f} MB{', so fused attention does not hold them' if peaks['full'] < pairs else ''}. Accuracy in %, "
        f"with k a quarter of the length: {rates}."
    )
