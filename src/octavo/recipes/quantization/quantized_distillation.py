"""Quantized distillation: a small student that trains through rounding, with a teacher or without."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from octavo.forms import Form
from octavo.recipes.frame import Lab, Study
from octavo.recipes.frame.bases import classifier
from octavo.recipes.frame.data import FASHION, Split, fashion
from octavo.recipes.frame.nets import ResNet, augmented, in_batches, momentum
from octavo.training import LearnedLevels, QuantizedTraining, Regimen, accuracy, cross_entropy, distillation
from octavo.training.formed import plain_copy

SOURCE = "Polino, Pascanu & Alistarh (2018), arXiv 1802.05668"
#: Steps of every arm, and the last of them, which train through rounding; rates of these.
STEPS, TUNED, RATES = 600, 180, (0.003, 0.01, 0.03)
#: Width of the student; the teacher has twice as much. Temperature of both, and weight of the teacher.
WIDTH, TEMPERATURE, SHARE = 8, 5.0, 0.7
#: Bits of a weight, and weights that share a scale.
BITS, BUCKET = (2, 4), 256
#: What is quantized: all but the first layer and the last.
NAMES = ("blocks.*",)

TEACHER, STUDENT, TAUGHT, THINNER = "teacher", "student", "student of the teacher", "thinner student"
AFTER, AWARE, DISTILLED, LEVELS = (
    "rounded after",
    "trained through rounding",
    "quantized distillation",
    "learned levels",
)


@Study(
    "quantized-distillation",
    system="Quantized distillation, differentiable quantization",
    source=SOURCE,
    metric="test accuracy (%)",
    higher=True,
    data=FASHION,
    claims={
        "distilled": "At 2 bits, quantized distillation beats rounding afterwards",
        "levels": "At 2 bits, learned levels beat rounding afterwards",
        "student": "At 4 bits, quantized distillation equals the float student (1 point)",
    },
    extras={
        "teacher": "At 2 bits, the teacher helps training through rounding",
        "aware": "At 2 bits, training through rounding beats rounding afterwards",
        "smaller": "At 2 bits, quantized distillation beats a thinner student",
        "alone": "At 2 bits, quantized distillation beats quantization alone, equal bytes",
    },
)
def run(lab: Lab) -> None:
    """A ResNet-8 of half the width learns from one of the whole; all trained students have the same steps."""
    for seed in lab.each_seed():
        lab.step(f"seed {seed}")
        Students(lab, fashion(lab), seed).all()
    low, high = BITS
    lab.gate("the teacher beats the student", lab.ahead(TEACHER, STUDENT))
    lab.gate("there is room: a thinner student of the bytes is worse", lab.ahead(TAUGHT, THINNER, 1.0))
    lab.gate("rounding afterwards does damage", lab.ahead(TAUGHT, of(AFTER, low), 1.0))
    lab.judge("distilled", lab.ahead(of(DISTILLED, low), of(AFTER, low)))
    lab.judge("levels", lab.ahead(of(LEVELS, low), of(AFTER, low)))
    lab.judge("student", lab.ahead(of(DISTILLED, high), TAUGHT, -1.0))
    lab.judge("teacher", lab.ahead(of(DISTILLED, low), of(AWARE, low)))
    lab.judge("aware", lab.ahead(of(AWARE, low), of(AFTER, low)))
    lab.judge("smaller", lab.ahead(of(DISTILLED, low), THINNER))
    lab.judge("alone", lab.ahead(of(DISTILLED, low), "quantization alone"))
    arms = lab.arms
    shown = "; ".join(
        f"{bits} bits: "
        + ", ".join(f"{name} {arms[of(name, bits)].shown} %" for name in (AFTER, AWARE, DISTILLED, LEVELS))
        for bits in BITS
    )
    lab.say(f"{shown}. Learned levels fix the weights: only {2**low} or {2**high} numbers of a quantized matrix move.")


def of(name: str, bits: int) -> str:
    """The name of an arm."""
    return f"{name}, {bits} bits"


class Students:
    """All arms of one seed."""

    def __init__(self, lab: Lab, split: Split, seed: int) -> None:
        self.lab, self.split, self.seed = lab, split, seed
        self.steps, self.tuned = (10, 4) if lab.quick else (STEPS, TUNED)
        self.test, self.development = in_batches(split.test), in_batches(split.development)
        self.teacher = classifier(lab, seed)
        self.lesson = distillation(self.teacher.to(lab.device), cross_entropy, share=SHARE, temperature=TEMPERATURE)

    def net(self, width: int = WIDTH) -> nn.Module:
        """An untrained student."""
        torch.manual_seed(self.seed)
        return ResNet(1, self.split.classes, width, self.split.train[0].shape[1])

    def trained(
        self,
        model: nn.Module,
        arm: str | None,
        steps: int,
        *,
        taught: bool,
        lr: float = 0.1,
        regimen: Regimen | None = None,
    ) -> nn.Module:
        """A student after its last steps."""
        return self.lab.train(
            model, augmented(*self.split.train, size=64, seed=self.seed), self.lesson if taught else cross_entropy,
            steps=steps, seed=self.seed, arm=arm, before=self.steps - steps, optimizer=momentum(lr), regimen=regimen,
        )  # fmt: skip

    def all(self) -> None:
        """Every arm."""
        early = self.steps - self.tuned
        self.add(TEACHER, self.teacher.cpu())
        self.teacher.to(self.lab.device)
        self.add(STUDENT, self.trained(self.net(), STUDENT, self.steps, taught=False))
        whole = self.trained(self.net(), TAUGHT, self.steps, taught=True)
        self.add(TAUGHT, whole)
        begun = {taught: self.trained(self.net(), None, early, taught=taught) for taught in (False, True)}
        for bits in BITS:
            rounding = QuantizedTraining(setting={"bits": bits, "group": BUCKET}, names=NAMES)
            unseen = copy.deepcopy(whole)
            rounding.begin(unseen, 1)
            self.add(of(AFTER, bits), whole, rounding.forms(unseen))
            self.tune(AWARE, bits, begun[False], rounding, taught=False)
            size = self.tune(DISTILLED, bits, begun[True], rounding, taught=True)
            if bits == BITS[0]:
                self.rivals(whole, size)
            fixed = LearnedLevels(2**bits, weights=False, names=NAMES)
            self.tune(LEVELS, bits, begun[True], fixed, taught=True)

    def tune(self, arm: str, bits: int, begun: nn.Module, regimen: Regimen, *, taught: bool) -> int:
        """Train a student through what it is rounded to; returns its bytes."""

        def made(lr: float, name: str | None = None) -> tuple[nn.Module, Mapping[str, Form]]:
            model = self.trained(copy.deepcopy(begun), name, self.tuned, taught=taught, lr=lr, regimen=regimen)
            forms = regimen.forms(model)
            return plain_copy(model, forms), forms

        name = of(arm, bits)
        lr = self.lab.choose(f"rate of {name}", lambda lr: accuracy(made(lr)[0], self.development), RATES)
        return self.add(name, *made(lr, name))

    def rivals(self, whole: nn.Module, size: int) -> None:
        """What has the bytes of quantized distillation without training through rounding."""
        width = self.lab.thinner(self.net, size, range(1, WIDTH + 1))
        self.add(THINNER, self.trained(self.net(width), THINNER, self.steps, taught=True))
        alone = self.lab.quantization_alone(whole, size)
        self.lab.add("quantization alone", 100 * accuracy(alone.load(copy.deepcopy(whole)), self.test), alone)

    def add(self, arm: str, model: nn.Module, forms: Mapping[str, Form] | None = None) -> int:
        """Accuracy of what was read back; returns its bytes."""
        stored = self.lab.stored(model, forms)
        self.lab.add(arm, 100 * accuracy(stored.load(copy.deepcopy(model)), self.test), stored)
        return stored.bytes
