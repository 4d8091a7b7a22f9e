"""LLM-KICK: what compressed language models forget, asked as facts, retrieval and summaries, beside perplexity."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor, nn

from octavo.calibration.objective import KL
from octavo.forms import Form
from octavo.methods import Setting
from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.data import TEXT
from octavo.recipes.frame.windows import perplexity
from octavo.recipes.testbeds.one_shot import one_shot
from octavo.recipes.testbeds.remembering import READ, Remembering, remembering
from octavo.sources.batches import Batch
from octavo.verification.knowledge import answered, closed_book, in_context, scored, summaries

#: Bits of the weights that pruning leaves: rounding them costs nothing beside pruning.
BITS = 8
PRUNERS = ("magnitude", "wanda", "sparsegpt")
DENSE, FOUR, EASY = "dense", "gptq, 4 bits", "wanda where perplexity is 5% up"
#: What is compared: a method and its setting.
ARMS: dict[str, tuple[str, Setting]] = {
    **{f"{name}, {share}%": (name, {"sparsity": share / 100, "bits": BITS}) for name in PRUNERS for share in (50, 60)},
    **{f"{name}, 2:4": (name, {"pattern": "2:4", "bits": BITS}) for name in PRUNERS},
    **{f"gptq, {bits} bits": ("gptq", {"bits": bits, "group": 64}) for bits in (4, 3, 2)},
}


@Study(
    "llm-kick",
    system="LLM-KICK",
    source="Jaiswal et al. (2023), arXiv 2310.01382",
    metric="facts written without context (%)",
    higher=True,
    data=TEXT,
    claims={
        "hidden": "Facts are lost (over 5 points) where perplexity rises 5%",
        "retrieval": "Half the weights gone, retrieval in context loses less than recall",
        "summaries": "Half the weights gone, summaries lose less than recall",
        "pattern": "2:4 loses more facts than 50% without a pattern",
        "bits": "4 bits lose fewer facts than 50% sparsity in no fewer bytes",
    },
    extras={
        "rare": "Facts read rarely are lost first",
        "ranked": "Ranked by likelihood, facts look better kept than when written",
        "compensated": "SparseGPT keeps more facts than magnitude",
        "facts seen": "Calibrated on facts, pruning keeps more of them",
    },
)
def run(lab: Lab) -> None:
    """Decoders that know facts, one a seed; every arm is written to a file, read back, and asked the same questions."""
    for seed in lab.seeds:
        known = remembering(lab, seed)
        calibration = [{"input_ids": part} for part in known.windows.train[-64 * (seed + 1) :][:64].split(8)]
        asked = Asked(lab, known)

        def pruned(share: float, known: Remembering = known, batches: Sequence[Batch] = calibration) -> dict[str, Form]:
            return one_shot(known.model, "wanda", {"sparsity": share, "bits": BITS}, batches)

        def rise(share: float, known: Remembering = known, asked: Asked = asked) -> float:
            model = lab.stored(known.model, pruned(share)).load(copy.deepcopy(known.model))
            return abs(asked.perplexity(model, known.windows.development) / asked.dense - 1.05)

        share = lab.choose("sparsity of wanda with 5% more perplexity", rise, (0.2, 0.3, 0.4), higher=False)
        asked.add(DENSE, {})
        asked.add(EASY, pruned(share))
        for arm, (method, setting) in list(ARMS.items())[:: 4 if lab.quick else 1]:
            asked.add(arm, one_shot(known.model, method, setting, calibration))


class Asked:
    """A decoder's questions, and the answers of its compressed copies."""

    def __init__(self, lab: Lab, known: Remembering) -> None:
        self.lab, self.known = lab, known
        self.dense = self.perplexity(known.model, known.windows.development)

    def perplexity(self, model: nn.Module, part: Tensor) -> float:
        return perplexity(model, part[: 8 if self.lab.quick else 128])

    def add(self, arm: str, forms: Mapping[str, Form]) -> None:
        self.lab.step(arm)
        known, stored = self.known, self.lab.stored(self.known.model, forms)
        model, objective = stored.load(copy.deepcopy(known.model)), KL()

        @torch.inference_mode()
        def read(batches: Sequence[Batch]) -> Iterator[Tensor]:
            for batch in batches:
                yield objective.outputs(model, batch)

        facts = answered(closed_book(known.facts), known.encode, read)
        found = scored(answered(in_context(known.facts), known.encode, read))
        summed = scored(answered(summaries(known.passages), known.encode, read))
        by_label = {label: scored([one for one in facts if one.question.label == label]) for label in READ}
        also = {label: 100 * (score.written or 0) for label, score in by_label.items()}
        whole = scored(facts)
        self.lab.add(
            arm, 100 * (whole.written or 0), stored, ranked=100 * whole.likeliest, in_context=100 * (found.written or 0),
            summaries=100 * summed.likeliest, perplexity=self.perplexity(model, known.windows.test), **also,
        )  # fmt: skip
