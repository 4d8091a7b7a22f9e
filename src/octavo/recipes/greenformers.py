"""Greenformers: a transformer that is low-rank by design beside one whose attention is, by length."""

from __future__ import annotations

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
from octavo.recipes.base import Arm, Check, Finding, Trial, recipe
from octavo.recipes.models import in_batches, shuffled, trained
from octavo.recipes.stored import through_file
from octavo.train import accuracy, cross_entropy, fit
from octavo.train.low_rank import low_rank

KINDS = ("full", "LRT", "Linformer")
#: Tokens in every batch that is timed, so that lengths can be compared.
TOKENS = 4096
FORWARD, STEP, MEMORY = "forward pass (ms)", "training step (ms)", "it holds (MB)"


@recipe(
    "greenformers",
    system="Greenformers (Low-Rank Transformer)",
    source="Cahyawijaya (2021), arXiv 2108.10808; Linformer: Wang et al. (2020), arXiv 2006.04768",
    claim="A transformer with low-rank layers is faster than Linformer on short sequences and slower on long ones, and "
    "only the former makes the file smaller.",
    metric=f"processor time of a forward pass over {TOKENS:,} tokens on one thread (ms, lower is better)",
    data=data.CIFAR10,
)
def run(trial: Trial) -> Finding:
    """Encoders of every length timed, and small ones trained on images in patches of two sizes."""
    lengths = (16, 64) if trial.quick else (64, 128, 256, 512, 1024, 2048, 4096)
    width, projected = (32, 8) if trial.quick else (256, 128)
    arms: list[Arm] = []
    found: dict[str, dict[int, Arm]] = {kind: {} for kind in KINDS}
    for length in lengths:
        trial.step(f"{length} tokens")
        for arm, kind in zip(_timed(trial, length, width, projected), KINDS, strict=True):
            found[kind][length] = arm
            arms.append(arm)
    classifiers = _trained(trial)
    checks = [_crossing(found, lengths, column) for column in (FORWARD, STEP)]
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
    return Finding([*arms, *classifiers], checks, _reason(found, lengths, classifiers, width, projected))


class Encoder(nn.Module):
    """A pre-norm transformer encoder that classifies the mean of its tokens.

    Parameters
    ----------
    features, length
        Of what it reads, (N, length, features).
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


def _timed(trial: Trial, length: int, width: int, projected: int) -> list[Arm]:
    x = torch.randn(TOKENS // length, length, width, generator=torch.Generator().manual_seed(0))
    times: dict[str, list[dict[str, float]]] = {FORWARD: [], STEP: []}
    for seed in trial.seeds:
        models = {kind: encoder(kind, width, length, width, projected, seed) for kind in KINDS}
        for column, call in ((FORWARD, _forward), (STEP, _step)):
            times[column].append(_milliseconds({kind: partial(call, model, x) for kind, model in models.items()}))
    arms = []
    for kind, model in models.items():
        steps = [taken[kind] for taken in times[STEP]]
        also = {
            STEP: statistics.fmean(steps),
            "its spread": statistics.stdev(steps) if len(steps) > 1 else 0.0,
            MEMORY: _peak(model, x),
            "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
        }
        forward = tuple(taken[kind] for taken in times[FORWARD])
        arms.append(Arm(f"{length} tokens: {kind}", through_file(model).bytes, forward, also))
    return arms


@torch.inference_mode()
def _forward(model: nn.Module, x: Tensor) -> None:
    model.eval()(x)


def _step(model: nn.Module, x: Tensor) -> None:
    cross_entropy(model.train(), (x, torch.zeros(len(x), dtype=torch.long))).backward()
    model.zero_grad(set_to_none=True)


def _milliseconds(calls: Mapping[str, Callable[[], Any]], rounds: int = 3) -> dict[str, float]:
    """Median time of every call, in turns after one to warm up, on one thread.

    What is counted is the processor's time, which on one thread is what the clock shows if nothing else is running.
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
    """Bytes of the tensors that operations make, as long as anything holds them."""

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
    """Megabytes of gradients and of what passes between operations that a training step holds at most."""
    with _Held([*model.parameters(), x]) as held:
        _step(model, x)
    return held.most / 1e6


def patches(images: Tensor, side: int) -> Tensor:
    """Images (N, channels, H, W) as (N, patches, values)."""
    return functional.unfold(images, side, stride=side).transpose(1, 2).contiguous()


def _trained(trial: Trial) -> list[Arm]:
    """Small encoders on images in patches of two sizes, then LRT begun at the weights of the trained full encoder."""
    split = data.images(trial, train=4_000)
    arms = []
    for side in (4, 2):
        parts = [(patches(x, side), y) for x, y in (split.train, split.test)]
        length = parts[0][0].shape[1]
        rows: dict[str, list[dict[str, float]]] = {}
        for seed in trial.seeds:
            models = _classifiers(trial, parts[0], seed, warm=side == 4)
            for name, model in models.items():
                stored = through_file(model)
                rows.setdefault(name, []).append(
                    {
                        "bytes": stored.bytes,
                        "accuracy": 100 * accuracy(stored.load(model), in_batches(parts[1])),
                        "parameters": sum(parameter.numel() for parameter in model.parameters()),
                    }
                )
            shown = parts[0][0][: TOKENS // length]
            calls = {name: partial(_forward, model, shown) for name, model in models.items()}
            for name, taken in _milliseconds(calls).items():
                rows[name][-1]["ms"] = taken
        arms += [_classifier(f"CIFAR-10 in {length} patches: {name}", found) for name, found in rows.items()]
    return arms


def _classifiers(trial: Trial, pair: tuple[Tensor, Tensor], seed: int, *, warm: bool) -> dict[str, nn.Module]:
    """Trained encoders by name; of :data:`KINDS`, and, if wanted, of LRT with other starts."""
    (length, features), width, epochs = pair[0].shape[1:], 32 if trial.quick else 64, 1 if trial.quick else 2

    def make(kind: str) -> nn.Module:
        return encoder(kind, features, length, width, length // 4, seed)

    def learn(model: nn.Module, epochs: int, lr: float) -> None:
        fit(model, shuffled(*pair, size=50, seed=seed), cross_entropy, epochs=epochs, lr=lr, seed=seed)

    models = {}
    for kind in KINDS:
        name = f"greenformers-{kind.lower()}-n{length}-d{width}-e{epochs}-s{seed}"
        models[kind] = trained(trial, name, partial(make, kind), partial(learn, epochs=epochs, lr=2e-3))
    for start in ("svd", "semi-nmf") if warm else ():
        trial.step(f"{length} patches, LRT from {start}, seed {seed}")
        begun, further = make("full"), make("LRT")
        begun.load_state_dict(models["full"].state_dict())
        low_rank(begun.get_submodule("layers"), width // 4, start)
        further.load_state_dict(begun.state_dict())
        learn(further, 1, 1e-3)
        models |= {f"LRT from {start}, as it begins": begun, f"LRT from {start}, one epoch later": further}
    return models


def _classifier(name: str, rows: Sequence[Mapping[str, float]]) -> Arm:
    accuracies = [row["accuracy"] for row in rows]
    also = {
        "parameters": float(rows[0]["parameters"]),
        "test accuracy (%)": statistics.fmean(accuracies),
        "spread of accuracy": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
    }
    return Arm(name, round(statistics.fmean(row["bytes"] for row in rows)), tuple(row["ms"] for row in rows), also)


def _time(arm: Arm, column: str) -> tuple[float, float]:
    """Mean and spread."""
    return (arm.mean, arm.spread or 0.0) if column == FORWARD else (arm.also[STEP], arm.also["its spread"])


def crossover(lengths: Sequence[int], rising: Sequence[float], flat: Sequence[float]) -> float | None:
    """The length at which ``rising`` passes ``flat`` for good, between measured ones by their logarithms."""
    ratios = [math.log(a / b) for a, b in zip(rising, flat, strict=True)]
    below = [at for at, ratio in enumerate(ratios) if ratio < 0]
    if not below or below[-1] == len(ratios) - 1:
        return None
    at = below[-1]
    share = -ratios[at] / (ratios[at + 1] - ratios[at])
    return float(lengths[at] * (lengths[at + 1] / lengths[at]) ** share)


def _crossing(found: Mapping[str, Mapping[int, Arm]], lengths: Sequence[int], column: str) -> Check:
    ours, others = ([_time(found[kind][length], column) for length in lengths] for kind in ("LRT", "Linformer"))
    where = crossover(lengths, [mean for mean, _ in ours], [mean for mean, _ in others])
    first = others[0][0] - ours[0][0] > others[0][1] + ours[0][1]
    last = ours[-1][0] - others[-1][0] > others[-1][1] + ours[-1][1]
    figures = "; ".join(f"{length}: {ours[at][0]:.4g} and {others[at][0]:.4g} ms" for at, length in enumerate(lengths))
    told = f"they cross at {where:.0f} tokens" if where else "they do not cross"
    return Check(
        f"{column.split(' (')[0].capitalize()}: LRT is faster at {lengths[0]} tokens, Linformer at {lengths[-1]}.",
        first and last,
        f"LRT and Linformer: {figures}; {told}.",
    )


def _reason(
    found: Mapping[str, Mapping[int, Arm]], lengths: Sequence[int], classifiers: Sequence[Arm], width: int, k: int
) -> str:
    expected = 6 * width - 9 * (width // 4) + 2 * k
    places = [
        crossover(lengths, *([_time(found[kind][n], column)[0] for n in lengths] for kind in ("LRT", "Linformer")))
        for column in (FORWARD, STEP)
    ]
    forward, step = (f"at {place:.0f} tokens" if place else "nowhere" for place in places)
    peaks = {kind: found[kind][lengths[-1]].also[MEMORY] for kind in KINDS}
    rates = "; ".join(
        f"{arm.name.removeprefix('CIFAR-10 in ')} {arm.also['test accuracy (%)']:.1f} ± "
        f"{arm.also['spread of accuracy']:.1f}%"
        for arm in classifiers
    )
    return (
        f"Both save the same multiplications at 6 d - 9 r + 2 k = {expected} tokens (d {width}, r d/4, k {k}); on one "
        f"thread the times cross {forward}, those of training steps {step}. At {lengths[-1]} tokens a training step "
        f"holds {peaks['full']:.0f} MB with full layers, {peaks['LRT']:.0f} with LRT and {peaks['Linformer']:.0f} with "
        "Linformer: fused attention does not hold the matrix of all pairs. Accuracy, with k a quarter of the length: "
        f"{rates}."
    )
