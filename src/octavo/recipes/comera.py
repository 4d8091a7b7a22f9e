"""CoMERA: a text classifier trained from scratch as tensor trains that find their own ranks."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import MissingExtraError
from octavo.recipes import data, models
from octavo.recipes.base import Arm, Check, Finding, Trial, difference, recipe
from octavo.recipes.stored import through_file
from octavo.training import accuracy, cross_entropy, fit
from octavo.training.adaptive_trains import fold
from octavo.training.regimens.comera import PENALTIES, CoMERA, core_rates

#: Epochs of the early and the late stage; every other arm has as many in all.
_EARLY, _LATE = 2, 2
#: Fixed ranks; the late stage's targets are their sizes.
_RANKS = (12, 20)
#: Learning rates that every arm chooses from on development sentences, with the first seed: of dense models, of cores
#: of a fixed rank, and of diagonals in the late stage. Too low, these miss the target; too high, all fall together.
_DENSE_RATES, _CORE_RATES, _LATE_DIAGONALS = (5e-4, 1e-3, 2e-3), (1.5e-3, 3e-3, 6e-3), (5e-3, 1e-2, 2e-2)
#: Rate of the parameters that stay dense; those of both stages' cores, and of the early one's diagonals.
_BESIDE, _CORES, _EARLY_DIAGONALS = 1e-3, 3e-3, 5e-3
#: How far from its target the late stage may end.
_NEAR = 0.05
#: Points below the other that still count as being as accurate.
_MARGIN = 1.0
#: The published compression.
_PUBLISHED = 4.23


@dataclass(frozen=True)
class _Trained:
    """A model, the elements of its cores, if it has any, and the mean loss of the last epoch."""

    model: nn.Module
    size: int
    loss: float


@dataclass
class _Bench:
    """Sentences as numbers of words, and models that classify them."""

    trial: Trial
    words: int
    length: int
    train: tuple[Tensor, Tensor]
    development: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def make(self, seed: int, width: int | None = None, inner: int | None = None) -> nn.Module:
        """A transformer encoder of two layers (BERT's), with random weights."""
        from transformers import BertConfig, BertForSequenceClassification

        width = width or (32 if self.trial.quick else 64)
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=self.words, hidden_size=width, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=inner or 2 * width, max_position_embeddings=self.length, type_vocab_size=1,
        )  # fmt: skip
        return BertForSequenceClassification(config)

    def batches(self, seed: int) -> Callable[[int], Iterator[Any]]:
        """Shuffled batches of 32 sentences."""
        draw = models.shuffled(*self.train, size=32, seed=seed)
        return lambda epoch: (_batch(ids, labels) for ids, labels in draw(epoch))

    def score(self, model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
        """Accuracy in percent."""
        return 100 * accuracy(model, [_batch(*pair) for pair in models.in_batches(part)])

    def dense(self, seed: int, lr: float, shape: Sequence[int] = ()) -> _Trained:
        """Train a dense model."""
        model = self.make(seed, *shape)
        losses = fit(model, self.batches(seed), cross_entropy, epochs=_EARLY + _LATE, lr=lr, seed=seed)
        return _Trained(model, 0, losses[-1])

    def trains(
        self,
        seed: int,
        lr: float,
        epochs: int = _EARLY + _LATE,
        *,
        start: nn.Module | None = None,
        diagonals: float = _EARLY_DIAGONALS,
        **options: Any,
    ) -> _Trained:
        """One stage of training, from random tensor trains or from those of ``start``."""
        model = self.make(seed) if start is None else copy.deepcopy(start)
        regimen = CoMERA(smallest=512 if self.trial.quick else 4096, **options)
        optimizer = core_rates(lr, _BESIDE, diagonals)
        losses = fit(
            model, self.batches(seed), cross_entropy, epochs=epochs, optimizer=optimizer, regimen=regimen, seed=seed
        )
        return _Trained(model, regimen.size, losses[-1])

    def arm(
        self,
        name: str,
        grid: Sequence[float],
        make: Callable[[int, float], _Trained],
        *shape: int,
        target: float | None = None,
    ) -> Arm:
        """Train with every seed, at the rate that is best on development sentences with the first seed.

        With a ``target`` only rates that ended near it are considered, or else the nearest is used.
        """

        def worth(run: _Trained) -> tuple[float, float]:
            miss = abs(run.size / target - 1) if target else 0.0
            return (-miss, 0.0) if miss > _NEAR else (0.0, self.score(run.model, self.development))

        first, *others = self.trial.seeds
        tried = {}
        for rate in grid:
            self.trial.step(f"{name}: rate {rate:g}")
            tried[rate] = make(first, rate)
        best = max(tried, key=lambda rate: worth(tried[rate]))
        runs = [tried[best]]
        for seed in others:
            self.trial.step(f"{name}: seed {seed}")
            runs.append(make(seed, best))
        found = []
        for run in runs:
            # A copy, for folding ends what a late stage may go on from.
            model = copy.deepcopy(run.model)
            stored = through_file(model, fold(model))
            found.append((stored.bytes, self.score(stored.load(self.make(0, *shape)), self.test)))
        sizes, values = zip(*found, strict=True)
        also = {"learning rate": best}
        if runs[0].size:
            also["elements of cores"] = fmean(run.size for run in runs)
        if target:
            also["furthest from the target, %"] = max((100 * (run.size / target - 1) for run in runs), key=abs)
        return Arm(name, round(fmean(sizes)), values, also)


def _batch(ids: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}, labels


def _bench(trial: Trial) -> _Bench:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("the classifier needs transformers: pip install 'octavo[hf]'") from error
    learn, shown = data.sentiment(trial)
    # Every tenth sentence is for choosing.
    held = learn[9::10]
    rest = [row for place, row in enumerate(learn) if place % 10 != 9]
    counts = Counter(word for sentence, _ in rest for word in sentence.lower().split())
    # By falling frequency; 0 fills up, 1 is any word that was met only once.
    known = sorted((word for word, count in counts.items() if count > 1), key=lambda word: (-counts[word], word))
    numbers, length = {word: number for number, word in enumerate(known, start=2)}, 16 if trial.quick else 24

    def encoded(rows: Sequence[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        for row, (sentence, _) in zip(ids, rows, strict=True):
            found = [numbers.get(word, 1) for word in sentence.lower().split()][:length]
            row[: len(found)] = torch.tensor(found)
        return ids, torch.tensor([label for _, label in rows])

    return _Bench(trial, len(numbers) + 2, length, encoded(rest), encoded(held), encoded(shown))


@recipe(
    "comera",
    system="CoMERA",
    source="Yang et al. (2024), arXiv 2405.14377",
    claim="A BERT-like model of code becomes 4.23 times smaller by being trained from scratch as tensor trains that "
    "find their own ranks. Checked here, on a small classifier: whether it becomes that small without a loss, whether "
    "the size asked for is reached, and whether found ranks are as accurate as fixed ones.",
    metric="accuracy on SST-2's development sentences (%, higher is better)",
    data=data.SST2,
)
def run(trial: Trial) -> Finding:
    """Dense and smaller dense, fixed ranks, the early stage alone, and both stages with a target for each rank."""
    bench = _bench(trial)
    ranks = _RANKS[:1] if trial.quick else _RANKS
    arms = [bench.arm("dense", _DENSE_RATES, bench.dense)]
    trial.step("early stages")
    started = {
        (penalty, seed): bench.trains(seed, _CORES, _EARLY, penalty=penalty)
        for penalty in PENALTIES
        for seed in trial.seeds
    }

    def early(penalty: str, seed: int, rate: float) -> _Trained:
        return started[penalty, seed]

    def late(penalty: str, target: int, seed: int, rate: float) -> _Trained:
        start = started[penalty, seed]
        goal = {"target": target, "loss_target": start.loss, "penalty": penalty}
        return bench.trains(seed, _CORES, _LATE, start=start.model, diagonals=rate, **goal)

    for penalty in PENALTIES:
        name = f"early stage alone, {_EARLY} epochs{_suffix(penalty)}"
        arms.append(bench.arm(name, (_CORES,), partial(early, penalty)))
    for rank in ranks:
        fixed = bench.arm(f"fixed rank {rank}", _CORE_RATES, partial(bench.trains, rank=rank, gamma=0.0))
        shape = _shape(bench, fixed.bytes, arms[0].bytes)
        smaller = partial(bench.dense, shape=shape)
        arms += [fixed, bench.arm(f"smaller dense, bytes of rank {rank}", _DENSE_RATES, smaller, *shape)]
        target = round(fixed.also["elements of cores"])
        # The released code's penalty has one target, the smallest.
        for penalty in PENALTIES if rank == ranks[0] else PENALTIES[:1]:
            name = f"early and late, size of rank {rank}{_suffix(penalty)}"
            arms.append(bench.arm(name, _LATE_DIAGONALS, partial(late, penalty, target), target=target))
    return _finding({arm.name: arm for arm in arms}, ranks)


def _suffix(penalty: str) -> str:
    return ", mean as penalty" * (penalty == "mean")


def _shape(bench: _Bench, size: int, whole: int) -> tuple[int, int]:
    """Width and inner width of a dense model of the given bytes: the largest width first, then the inner width."""

    def estimate(width: int, inner: int) -> int:
        return 2 * sum(p.numel() for p in bench.make(0, width, inner).parameters())

    # What the file holds besides its two bytes a parameter is the same whatever the widths.
    room = size - (whole - 2 * sum(p.numel() for p in bench.make(0).parameters()))
    width = max((width for width in range(4, 132, 4) if estimate(width, width) <= room), default=4)
    fits, step = width, estimate(width, width + 1) - estimate(width, width)
    return width, fits + max(0, (room - estimate(width, width)) // step)


def _finding(arms: Mapping[str, Arm], ranks: Sequence[int]) -> Finding:
    dense = arms["dense"]
    pairs = {rank: (arms[f"early and late, size of rank {rank}"], arms[f"fixed rank {rank}"]) for rank in ranks}
    gaps = {rank: difference(ours.values, fixed.values) for rank, (ours, fixed) in pairs.items()}
    lost = [(dense.bytes / ours.bytes, difference(ours.values, dense.values)) for ours, _ in pairs.values()]
    worst = max((ours.also["furthest from the target, %"] for ours, _ in pairs.values()), key=abs)
    mean = arms[f"early and late, size of rank {ranks[0]}, mean as penalty"]
    told = f"{mean.also['furthest from the target, %']:+.1f}% with the mean as penalty, as in the released code"
    checks = [
        Check(
            f"A file at least {_PUBLISHED} times smaller than the dense model's is as accurate, within "
            f"{_MARGIN:g} point.",
            any(ratio >= _PUBLISHED and gap.surely >= -_MARGIN for ratio, gap in lost),
            "; ".join(f"{ratio:.1f} times smaller: {gap} points" for ratio, gap in lost) + ".",
        ),
        Check(
            f"At every size the ranks that were found are as accurate as the fixed one, within {_MARGIN:g} point.",
            all(gap.surely >= -_MARGIN for gap in gaps.values()),
            "; ".join(f"size of rank {rank}: {gap} points" for rank, gap in gaps.items()) + ".",
        ),
        Check(
            f"The late stage ends within {_NEAR:.0%} of its target.",
            abs(worst) <= 100 * _NEAR,
            f"{worst:+.1f}% at worst with the size as penalty; {told}.",
        ),
    ]
    compared = "; ".join(
        f"{ours.bytes:,} bytes: {ours.shown} against {fixed.shown} with a fixed rank and "
        f"{arms[f'smaller dense, bytes of rank {rank}'].shown} for a smaller dense model"
        for rank, (ours, fixed) in pairs.items()
    )
    reason = (
        f"Found ranks at {compared}; the whole dense model has {dense.shown}. With the mean of active entries as "
        f"penalty the late stage has {mean.shown}, and its size is {told.partition(' ')[0]} from the target at worst."
    )
    return Finding(list(arms.values()), checks, reason)
