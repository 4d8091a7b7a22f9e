"""LLM-KICK: what compressed language models forget, asked as facts, retrieval and summaries, beside perplexity."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from octavo.calibration.objective import KL
from octavo.forms import Form
from octavo.methods import Setting
from octavo.recipes.frame import Gap, Lab, Study, gap
from octavo.recipes.frame.data import TEXT
from octavo.recipes.frame.windows import perplexity
from octavo.recipes.testbeds.one_shot import one_shot
from octavo.recipes.testbeds.remembering import READ, Remembering, remembering
from octavo.sources.batches import Batch
from octavo.verification.knowledge import Answered, Question, answered, closed_book, in_context, scored, summaries

#: Bits of the weights that pruning leaves: rounding them costs nothing beside pruning.
BITS = 8
PRUNERS = ("magnitude", "wanda", "sparsegpt")
DENSE, FOUR, EASY, SEEN = "dense", "gptq, 4 bits", "wanda with 5% more perplexity", "sparsegpt, 50%, facts seen"
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
    metric="facts recalled without context (%)",
    higher=True,
    data=TEXT,
    claims={
        "hidden": "Recall falls by over 5 points where perplexity rises by 5%",
        "retrieval": "At 50% sparsity retrieval in the context loses less than recall",
        "summaries": "At 50% sparsity summaries lose less than recall",
        "pattern": "2:4 loses more facts than 50% without a pattern",
        "bits": "4 bits lose fewer facts than 50% sparsity of more bytes",
    },
    extras={
        "rare": "Facts that were read rarely are lost first",
        "ranked": "Ranked by likelihood, facts seem better kept than when written",
        "compensated": "SparseGPT keeps more facts than magnitude",
        "seen": "Calibrated on the facts, SparseGPT keeps more of them",
    },
)
def run(lab: Lab) -> None:
    """Decoders that know facts, one a seed; what is read back from the file of an arm is asked the same questions."""
    for seed in lab.seeds:
        known = remembering(lab, seed)
        asked = Asking(lab, known)
        texts = [{"input_ids": part} for part in known.windows.train[-64 * (seed + 1) :][:64].split(8)]

        def easy(share: float, asked: Asking = asked, texts: Sequence[Batch] = texts) -> dict[str, Form]:
            return one_shot(asked.known.model, "wanda", {"sparsity": share, "bits": BITS}, texts)

        def missed(share: float, asked: Asking = asked) -> float:
            model = asked.stored(easy(share))[0]
            return abs(
                asked.perplexity(model, "development") / asked.perplexity(asked.known.model, "development") - 1.05
            )

        share = lab.choose("sparsity of wanda with 5% more perplexity", missed, (0.2, 0.3, 0.4), higher=False)
        asked.add(DENSE, {})
        asked.add(EASY, easy(share))
        for arm, (method, setting) in ARMS.items():
            asked.add(arm, one_shot(known.model, method, setting, texts))
        facts = [{"input_ids": part} for part in known.statements[:64].split(8)]
        asked.add(SEEN, one_shot(known.model, *ARMS["sparsegpt, 50%"], facts))
    judge(lab)


class Asking:
    """The questions to a decoder, and the answers of its compressed copies."""

    def __init__(self, lab: Lab, known: Remembering) -> None:
        self.lab, self.known = lab, known

    def perplexity(self, model: nn.Module, part: str) -> float:
        """Of the first windows of a part of the running text."""
        return perplexity(model, getattr(self.known.windows, part)[: 8 if self.lab.quick else 128])

    def stored(self, forms: Mapping[str, Form]) -> tuple[nn.Module, int]:
        """What is read back, and the bytes of the file."""
        found = self.lab.stored(self.known.model, forms)
        return found.load(copy.deepcopy(self.known.model)), found.bytes

    def add(self, arm: str, forms: Mapping[str, Form]) -> None:
        """Ask what is stored."""
        self.lab.step(arm)
        model, size = self.stored(forms)
        objective, known = KL(), self.known

        @torch.inference_mode()
        def read(batches: Sequence[Batch]) -> Iterator[Tensor]:
            for batch in batches:
                yield objective.outputs(model, batch)

        def told(questions: Sequence[Question]) -> list[Answered]:
            return answered(questions, known.encode, read)

        facts = told(closed_book(known.facts))
        found, summed = scored(told(in_context(known.facts))), scored(told(summaries(known.passages)))
        labels = {label: share([one for one in facts if one.question.label == label]) for label in READ}
        self.lab.add(
            arm, share(facts), size, ranked=100 * scored(facts).likeliest, in_context=100 * (found.written or 0),
            summaries=100 * summed.likeliest, perplexity=self.perplexity(model, "test"), **labels,
        )  # fmt: skip


def share(facts: Sequence[Answered]) -> float:
    """Percent of facts that are written."""
    return 100 * (scored(facts).written or 0)


def judge(lab: Lab) -> None:
    """Compare what was lost, in points."""
    arms = lab.arms

    def lost(arm: str, of: str | None = None) -> list[float]:
        dense, now = (arms[name].values if of is None else arms[name].also[of] for name in (DENSE, arm))
        return [before - after for before, after in zip(dense, now, strict=True)]

    def more(arm: str, one: str | None, other: str | None) -> Gap:
        return gap(f"{arm}: {one or 'recall'} lost over {other or 'recall'}", lost(arm, one), lost(arm, other))

    half = [f"{name}, 50%" for name in PRUNERS]
    lab.gate("dense recalls over 95% of the facts", gap("recall", arms[DENSE].values, [95]))
    lab.gate("dense finds over 90% in the context", gap("retrieval", arms[DENSE].also["in context"], [90]))
    lab.gate("dense sums up over 20 points above chance", gap("summaries", arms[DENSE].also["summaries"], [12.5], 20))
    lab.gate("dense has a perplexity below 80", gap("80 less perplexity", [80], arms[DENSE].also["perplexity"]))
    lab.gate("50% by magnitude does damage, over 5 points", lab.ahead(DENSE, half[0], 5))
    lab.judge("hidden", lab.ahead(DENSE, EASY, 5))
    lab.judge("retrieval", *(more(arm, None, "in context") for arm in half))
    lab.judge("summaries", *(more(arm, None, "summaries") for arm in half))
    lab.judge("pattern", *(lab.ahead(arm, arm.replace("50%", "2:4")) for arm in half))
    smaller = [gap(f"bytes of {arm} over {FOUR}", [arms[arm].bytes], [arms[FOUR].bytes]) for arm in half]
    lab.judge("bits", *(lab.ahead(FOUR, arm) for arm in half), *smaller)
    lab.judge("rare", *(more(arm, "rare", "frequent") for arm in half))
    lab.judge("ranked", *(more(arm, None, "ranked") for arm in half))
    lab.judge("compensated", lab.ahead(half[2], half[0]))
    lab.judge("seen", lab.ahead(SEEN, half[2]))
    for arm in (DENSE, EASY, half[2], FOUR):
        found = arms[arm]
        others = ", ".join(f"{of} {sum(row) / len(row):.3g}" for of, row in found.also.items())
        lab.say(f"{arm}: {found.shown} % of the facts; {others}.")
