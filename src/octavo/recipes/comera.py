"""CoMERA: a text classifier trained from scratch as tensor trains that find their own ranks."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import MissingExtraError
from octavo.recipes import data, models
from octavo.recipes.base import Arm, Check, Finding, Trial, recipe
from octavo.recipes.stored import through_file
from octavo.train import accuracy, cross_entropy, fit
from octavo.train.adaptive_trains import fold
from octavo.train.comera import PENALTIES, CoMERA, rates

#: Epochs of the early and the late stage; every other arm has as many in all.
_EARLY, _LATE = 2, 2
#: Fixed ranks; the late stage's targets are their sizes.
_RANKS = (8, 14, 20)
#: Learning rates of dense models and of cores, chosen on development sentences; that of what stays dense beside cores.
_DENSE_RATES, _CORE_RATES, _BESIDE = (5e-4, 1e-3), (1.5e-3, 3e-3), 1e-3
#: Rate of diagonals in the early stage, and those of the late one, which has to bring most of them down to zero within
#: hundreds of steps: too low, it misses its target; too high, all fall together and the model is lost.
_EARLY_DIAGONALS, _LATE_DIAGONALS = 5e-3, (7e-3, 1e-2, 1.4e-2, 2e-2)


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

        width = width or (32 if self.trial.quick else 128)
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=self.words, hidden_size=width, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=inner or 2 * width, max_position_embeddings=self.length, type_vocab_size=1,
        )  # fmt: skip
        return BertForSequenceClassification(config)

    def batches(self, seed: int) -> Callable[[int], Iterator[Any]]:
        """Of 32 sentences, shuffled."""
        draw = models.shuffled(*self.train, size=32, seed=seed)
        return lambda epoch: (_batch(ids, labels) for ids, labels in draw(epoch))

    def score(self, model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
        """Accuracy in percent."""
        return 100 * accuracy(model, [_batch(*pair) for pair in models.in_batches(part)])

    def dense(self, seed: int, lr: float, *shape: int) -> nn.Module:
        """A dense model, trained."""
        model = self.make(seed, *shape)
        fit(model, self.batches(seed), cross_entropy, epochs=_EARLY + _LATE, lr=lr, seed=seed)
        return model

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
        optimizer = rates(lr, _BESIDE, diagonals)
        losses = fit(
            model, self.batches(seed), cross_entropy, epochs=epochs, optimizer=optimizer, regimen=regimen, seed=seed
        )
        return _Trained(model, regimen.size, losses[-1])

    def late(
        self, seed: int, lr: float, early: _Trained, target: int, diagonals: Sequence[float], penalty: str
    ) -> _Late:
        """The late stage, at that rate of diagonals which of those that meet the target is best on development data."""

        def tried(rate: float) -> _Trained:
            goal = {"target": target, "loss_target": early.loss, "penalty": penalty}
            return self.trains(seed, lr, _LATE, start=early.model, diagonals=rate, **goal)

        if len(diagonals) == 1:
            return diagonals[0], tried(diagonals[0])
        runs = {rate: tried(rate) for rate in diagonals}
        off = {rate: abs(run.size / target - 1) for rate, run in runs.items()}
        # If none does, the nearest.
        near = [rate for rate in runs if off[rate] <= 0.05] or [min(off, key=lambda rate: off[rate])]
        best = max(near, key=lambda rate: self.score(runs[rate].model, self.development))
        return best, runs[best]

    def stored(self, model: nn.Module, *shape: int) -> tuple[int, float]:
        """Bytes of the file, and accuracy on test sentences of what was read back from it."""
        found = through_file(model, fold(model))
        return found.bytes, self.score(found.load(self.make(0, *shape)), self.test)


@dataclass(frozen=True)
class _Trained:
    """A model of tensor trains, the elements of their cores, and the mean loss of the last epoch."""

    model: nn.Module
    size: int
    loss: float


#: The rate of diagonals, and the model that was trained at it.
_Late = tuple[float, _Trained]


def _batch(ids: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}, labels


def _bench(trial: Trial) -> _Bench:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("the classifier needs transformers: pip install 'octavo[hf]'") from error
    learn, shown = data.sentiment(trial)
    counts = Counter(word for sentence, _ in learn for word in sentence.lower().split())
    # By falling frequency; 0 fills up, 1 is any word that was met only once.
    known = sorted((word for word, count in counts.items() if count > 1), key=lambda word: (-counts[word], word))
    numbers, length = {word: number for number, word in enumerate(known, start=2)}, 16 if trial.quick else 24

    def encoded(rows: Sequence[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        for row, (sentence, _) in zip(ids, rows, strict=True):
            found = [numbers.get(word, 1) for word in sentence.lower().split()][:length]
            row[: len(found)] = torch.tensor(found)
        return ids, torch.tensor([label for _, label in rows])

    # Every tenth sentence is for choosing.
    held = [row for place, row in enumerate(learn) if place % 10 == 9]
    rest = [row for place, row in enumerate(learn) if place % 10 != 9]
    return _Bench(trial, len(numbers) + 2, length, encoded(rest), encoded(held), encoded(shown))


@recipe(
    "comera",
    system="CoMERA",
    source="Yang et al. (2024), arXiv 2405.14377",
    claim="Tensor trains that find their own ranks while they are trained from scratch reach the size asked for, and "
    "are as accurate as the best fixed rank of that size.",
    metric="accuracy on SST-2's development sentences (%, higher is better)",
    data=data.SST2,
)
def run(trial: Trial) -> Finding:
    """Dense and smaller dense, fixed ranks, the early stage alone, and both stages with three targets."""
    bench, first = _bench(trial), trial.first_seed
    ranks = _RANKS[:1] if trial.quick else _RANKS
    trial.step("choosing learning rates")
    dense_lr = max(_DENSE_RATES, key=lambda lr: bench.score(bench.dense(first, lr), bench.development))
    middle = ranks[len(ranks) // 2]
    core_lr = max(
        _CORE_RATES,
        key=lambda lr: bench.score(bench.trains(first, lr, rank=middle, gamma=0.0).model, bench.development),
    )
    found: dict[str, list[tuple[int, float, float]]] = {}
    missed = []
    also: dict[str, dict[str, float]] = {}
    late_rates: dict[tuple[int, str], tuple[float, ...]] = {}

    def add(name: str, trained: _Trained) -> int:
        """Remember a seed's figures of an arm; returns the bytes of its file."""
        size, value = bench.stored(copy.deepcopy(trained.model))
        found.setdefault(name, []).append((size, value, trained.size))
        return size

    for seed in trial.seeds:
        trial.step(f"seed {seed}: dense")
        whole, value = bench.stored(bench.dense(seed, dense_lr))
        found.setdefault("dense", []).append((whole, value, 0))
        trial.step(f"seed {seed}: early stage")
        early = {penalty: bench.trains(seed, core_lr, _EARLY, penalty=penalty) for penalty in PENALTIES}
        add(f"early stage alone, {_EARLY} epochs", early["size"])
        add(f"early stage alone, {_EARLY} epochs, mean as penalty", early["mean"])
        for rank in ranks:
            trial.step(f"seed {seed}: rank {rank}")
            fixed = bench.trains(seed, core_lr, rank=rank, gamma=0.0)
            size = add(f"fixed rank {rank}", fixed)
            shape = _shape(bench, size, whole)
            smaller, value = bench.stored(bench.dense(seed, dense_lr, *shape), *shape)
            found.setdefault(f"smaller dense, bytes of rank {rank}", []).append((smaller, value, 0))
            for penalty, start in early.items():
                if penalty == "mean" and rank != middle:
                    continue
                # Chosen with the first seed, as all rates are.
                tries = late_rates.get((rank, penalty), _LATE_DIAGONALS)
                chosen, late = bench.late(seed, core_lr, start, fixed.size, tries, penalty)
                late_rates[rank, penalty] = (chosen,)
                name = f"early and late, size of rank {rank}{', mean as penalty' * (penalty == 'mean')}"
                add(name, late)
                also[name] = {"rate of diagonals": chosen}
                if penalty == "size":
                    missed.append(late.size / fixed.size - 1)
    return _finding({name: _arm(name, runs, also.get(name, {})) for name, runs in found.items()}, ranks, missed)


def _arm(name: str, runs: Sequence[tuple[int, float, float]], also: Mapping[str, float]) -> Arm:
    sizes, values, elements = zip(*runs, strict=True)
    cores = {"elements of cores": fmean(elements)} if elements[0] else {}
    return Arm(name, round(fmean(sizes)), values, {**cores, **also})


def _shape(bench: _Bench, size: int, whole: int) -> tuple[int, int]:
    """Width and inner width of a dense model of that many bytes: the widest that fits, and then the widest inside."""

    def estimate(width: int, inner: int) -> int:
        return 2 * sum(p.numel() for p in bench.make(0, width, inner).parameters())

    # What the file holds besides its two bytes a parameter is the same whatever the widths.
    room = size - (whole - 2 * sum(p.numel() for p in bench.make(0).parameters()))
    width = max((width for width in range(4, 132, 4) if estimate(width, width) <= room), default=4)
    fits, step = width, estimate(width, width + 1) - estimate(width, width)
    return width, fits + max(0, (room - estimate(width, width)) // step)


def _finding(arms: dict[str, Arm], ranks: Sequence[int], missed: Sequence[float]) -> Finding:
    pairs = {rank: (arms[f"early and late, size of rank {rank}"], arms[f"fixed rank {rank}"]) for rank in ranks}
    told = "; ".join(
        f"size of rank {rank}: {ours.mean:.1f} against {fixed.mean:.1f}" for rank, (ours, fixed) in pairs.items()
    )
    worst = max(missed, key=abs)
    checks = [
        Check(
            "At every size the ranks that were found are no less accurate than the fixed one, within the spread.",
            all(ours.mean >= fixed.mean - max(ours.spread or 0, fixed.spread or 0) for ours, fixed in pairs.values()),
            f"{told}.",
        ),
        Check(
            "The late stage ends within 5% of its target.",
            abs(worst) <= 0.05,
            f"{worst:+.1%} at worst, of {len(missed)} runs.",
        ),
    ]
    small = ", ".join(f"{arms[f'smaller dense, bytes of rank {rank}'].mean:.1f}" for rank in ranks)
    middle = ranks[len(ranks) // 2]
    mean = arms[f"early and late, size of rank {middle}, mean as penalty"]
    reason = (
        f"Found ranks against fixed ones: {told}. Smaller dense models of the same bytes have {small}, the whole one "
        f"{arms['dense'].mean:.1f}. With the mean of active entries as penalty the late stage ends at "
        f"{mean.also['elements of cores']:,.0f} elements where {pairs[middle][1].also['elements of cores']:,.0f} were "
        f"asked for, with {mean.mean:.1f}."
    )
    return Finding(list(arms.values()), checks, reason)
