"""Minitron: a decoder pruned by activations in width or depth, and taught again by the logits of the original."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibration.objective import KL
from octavo.cuts import Score, best
from octavo.cuts.depth import losses_without, without_run
from octavo.cuts.scores.activation import Activation
from octavo.cuts.structured import Structured
from octavo.recipes.frame import Gap, Lab, Stored, Study, gap
from octavo.recipes.frame.bases import language_model
from octavo.recipes.frame.data import TEXT
from octavo.recipes.frame.nets import shuffled
from octavo.recipes.frame.windows import nats
from octavo.training import distillation, next_token
from octavo.training.losses import LossFunction

#: The share of heads, neurons and columns that goes. Half of the layers weigh as much.
SHARE = 0.25
STEPS, WINDOWS = 80, 8
RATES = (1e-3, 2e-3, 4e-3)
DENSE, SCRATCH, RANDOM = "dense", "random weights, labels", "random units, logits"
LABELS, OURS, DEPTH = "width, labels", "width, logits", "depth, logits"
AGGREGATED = {"mean, l2": ("mean", "l2"), "mean, mean": ("mean", "mean"), "variance": ("variance", "variance")}
CHOSEN, UNTRAINED = "mean, l2", "before retraining"


@Study(
    "minitron",
    system="Minitron",
    source="Muralidharan et al. (2024), arXiv 2407.14679",
    metric="test perplexity",
    higher=False,
    data=TEXT,
    claims={
        "scratch": "Pruned and distilled, it beats random weights after as many steps",
        "logits": "Logits of the original teach better than labels",
        "width": "Pruning width beats pruning depth after retraining",
        "aggregation": "L2 over the batch of means over sequences ranks units best",
    },
    extras={
        "units": "Units chosen by activations beat random ones, both distilled",
        "before": "Before retraining, pruning depth loses less than pruning width",
    },
)
def run(lab: Lab) -> None:
    """A Llama of 6 layers loses 40% of its weights in width or depth; each seed draws its own calibration text."""
    base, parts = language_model(lab)
    base.config.use_cache = False
    development, test = (part[: 4 if lab.quick else 128] for part in (parts.development, parts.test))
    steps, count = (2, 8) if lab.quick else (STEPS, 64)

    def add(arm: str, model: nn.Module, size: Stored | int = 0) -> None:
        lost = fmean(nats(model, test))
        lab.add(arm, math.exp(lost), size, nats=lost)

    add(DENSE, base, lab.stored(base))
    teach = distillation(copy.deepcopy(base).to(lab.device), temperature=1.0)
    for seed in lab.each_seed():
        lab.step(f"cuts of seed {seed}")
        seen = [{"input_ids": ids} for ids in parts.train[seed * count :][:count].split(8)]
        cuts = {name: narrowed(base, seen, Activation(*how)) for name, how in AGGREGATED.items()}
        cuts[DEPTH] = shallower(base, seen)
        for name, model in cuts.items():
            add(f"{name}, {UNTRAINED}", model)
        width = cuts[CHOSEN]
        torch.manual_seed(seed)
        begun: Mapping[str, tuple[nn.Module, LossFunction]] = {
            SCRATCH: (type(base)(width.config), next_token),
            RANDOM: (narrowed(base, seen, None, seed), teach),
            LABELS: (width, next_token),
            OURS: (width, teach),
            DEPTH: (cuts[DEPTH], teach),
        }
        for arm, (model, loss) in begun.items():
            lab.step(f"{arm}, seed {seed}")
            train = partial(trained, lab, parts.train, model, loss, seed, steps)
            score = lambda lr, train=train: sum(nats(train(lr), development))  # noqa: E731
            done = train(lab.choose(f"rate of {arm}", score, RATES), arm)
            stored = lab.stored(done)
            add(arm, stored.load(done), stored)
    judge(lab)


def judge(lab: Lab) -> None:
    """Gates and verdicts."""
    arms = lab.arms

    def less(ours: str, theirs: str, margin: float = 0.0) -> Gap:
        return lab.ahead(ours, theirs, margin, of="nats", higher=False)

    lab.gate("the base is better than 60", gap("60 less perplexity", [60], arms[DENSE].values))
    lab.gate("random weights are over 10 behind the base", lab.ahead(DENSE, SCRATCH, 10))
    lab.gate("pruning does damage, over 0.3 nats", less(DENSE, f"{CHOSEN}, {UNTRAINED}", 0.3))
    for key, rival in {"scratch": SCRATCH, "logits": LABELS, "width": DEPTH, "units": RANDOM}.items():
        lab.judge(key, lab.ahead(OURS, rival))
    others = [name for name in AGGREGATED if name != CHOSEN]
    lab.judge("aggregation", *(less(f"{CHOSEN}, {UNTRAINED}", f"{name}, {UNTRAINED}") for name in others))
    lab.judge("before", less(f"{DEPTH}, {UNTRAINED}", f"{CHOSEN}, {UNTRAINED}"))
    lab.say("Perplexities: " + "; ".join(f"{arm} {found.shown}" for arm, found in arms.items()) + ".")


def shallower(base: nn.Module, seen: Sequence[dict[str, Tensor]]) -> nn.Module:
    """The model without the run of half of its layers that changes its outputs least."""
    layers = Structured(("layer",)).units(base)[0]
    losses = losses_without(base, layers, layers.count // 2, seen[:2], KL())
    cut = Structured(("layer",), "magnitude", compensate=False)
    return cut.apply(base, without_run(layers, losses), cut.observe(base, seen[:1]))


def narrowed(base: nn.Module, seen: Sequence[dict[str, Tensor]], score: Score[Any] | None, seed: int = 0) -> nn.Module:
    """The model without the units of lowest scores; random ones without a score."""
    cut = Structured(("head", "neuron", "column"), score or "magnitude", compensate=False, objective="kl")
    units, evidence = cut.units(base), cut.observe(base, seen)
    generator = torch.Generator().manual_seed(seed)
    drawn = {part.name: torch.rand(part.count, generator=generator) for part in units}
    return cut.apply(base, best(cut.scores(base, units, evidence) if score else drawn, SHARE), evidence)


def trained(
    lab: Lab,
    ids: Tensor,
    model: nn.Module,
    loss: LossFunction,
    seed: int,
    steps: int,
    lr: float,
    arm: str | None = None,
) -> nn.Module:
    """A copy of a model after so many steps on shuffled windows of tokens."""

    def batches(number: int) -> Iterator[dict[str, Tensor]]:
        for (part,) in shuffled(ids, size=WINDOWS, seed=seed)(number):
            yield {"input_ids": part}

    return lab.train(copy.deepcopy(model), batches, loss, steps=steps, seed=seed, arm=arm, lr=lr)
