"""Class-dependent compression: lottery tickets that keep missing few positives, by weights and a ranking term."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.data import FASHION, Parts
from octavo.recipes.frame.nets import shuffled
from octavo.recipes.testbeds.detection import ALARMS, MeanDistance, Part, detected, perceptron, pullovers
from octavo.training import few_misses
from octavo.training.losses import LossFunction
from octavo.training.regimens.rewinding import Rewinding

#: Of the weights that are left, masked before every round; rounds after the first; steps of each; examples of a step.
SHARE, ROUNDS, STEPS, BATCH = 0.6, 5, 400, 256
#: Tried weights of positives and of the ranking term.
WEIGHTS, RANKINGS = (2.0, 5.0, 12.0), (0.03, 0.1, 0.3)

PLAIN, WEIGHTED, RANKED, BOTH = "cross entropy", "weighted", "ranked", "weighted and ranked"
CODED, GUESS = "quantization alone", "distance to the mean pullover"
MISSED, AREA, LEFT = f"missed at {ALARMS:.0%} false alarms (%)", "AUC (%)", "weights left (%)"


@Study(
    "class-dependent",
    system="Class-dependent compression",
    source="Entezari & Saukh (2020), arXiv 1909.10364",
    metric="missed positives at a threshold of one half (%)",
    higher=False,
    data=FASHION,
    claims={
        "fewer": "Compressed with both terms it misses fewer than compressed without",
        "area": "Its AUC is above that of the net compressed without",
        "parameters": "With 99% fewer weights it misses no more than uncompressed",
    },
    extras={
        "equal": "At equal false alarms it misses fewer than without the terms",
        "ranking": "At equal false alarms the ranking term adds to the weights",
        "weights": "At equal false alarms weights alone change little (1 point)",
        "quantized": "It misses fewer than quantization alone, equal bytes and alarms",
    },
)
def run(lab: Lab) -> None:
    """A perceptron of 300 and 100 units that finds pullovers, 2% of its training images, through rounds of pruning."""
    losses: dict[str, LossFunction] = {}
    for seed in lab.seeds:
        lab.step(f"seed {seed}")
        data = pullovers(lab, seed)
        losses = losses or chosen(lab, data)
        for name, loss in losses.items():
            compress(lab, data, name, loss, seed)
        add(lab, GUESS, MeanDistance(data.train), data.test)
    whole, last, deep = named(PLAIN, 0), named(BOTH, rounds(lab)), range(2, rounds(lab) + 1)
    arms, left = lab.arms, lab.arms[last].also[LEFT]
    lab.gate("the whole net ranks better than a distance", lab.ahead(whole, GUESS, of=AREA, higher=True))
    lab.gate("the whole net misses over 5% of the positives", gap("missed", arms[whole].values, [5]))
    lab.gate("at most 1.5% of the weights are left", gap("1.5% less what is left", [1.5], left))
    pairs = [(named(BOTH, number), named(PLAIN, number)) for number in deep]
    lab.judge("fewer", *(lab.ahead(*pair) for pair in pairs))
    lab.judge("area", *(lab.ahead(*pair, of=AREA, higher=True) for pair in pairs))
    lab.judge("parameters", lab.ahead(last, whole))
    lab.judge("equal", *(lab.ahead(*pair, of=MISSED) for pair in pairs))
    lab.judge("ranking", *(lab.ahead(named(BOTH, number), named(WEIGHTED, number), of=MISSED) for number in deep))
    weighted, plain = (named(name, rounds(lab)) for name in (WEIGHTED, PLAIN))
    ends = ((weighted, plain), (plain, weighted))
    lab.judge("weights", *(lab.ahead(ours, theirs, -1.0, of=MISSED) for ours, theirs in ends))
    lab.judge("quantized", lab.ahead(last, CODED, of=MISSED))
    shown = "; ".join(
        f"{name} {both_shares(lab, named(name, rounds(lab)))}" for name in (PLAIN, WEIGHTED, RANKED, BOTH)
    )
    lab.say(f"With {left[0]:.1f}% of the weights, missed at one half and at {ALARMS:.0%} false alarms: {shown}.")
    lab.say("Weights of the positives move the threshold. A better ranking shows at equal false alarms alone.")


def named(name: str, number: int) -> str:
    """The name of an arm after a round."""
    return f"{name}, {(1 - SHARE) ** number:.1%} left"


def rounds(lab: Lab) -> int:
    """Rounds after the first."""
    return 2 if lab.quick else ROUNDS


def both_shares(lab: Lab, arm: str) -> str:
    """Both shares of missed positives of an arm, for texts."""
    found = lab.arms[arm]
    return f"{found.mean:.1f}% and {sum(found.also[MISSED]) / len(found.values):.1f}%"


def chosen(lab: Lab, data: Parts[Part]) -> dict[str, LossFunction]:
    """The losses, with weights that miss the fewest of the development data at equal false alarms."""

    def best(name: str, grid: tuple[float, ...], loss: Callable[[float], LossFunction]) -> float:
        def score(value: float) -> float:
            model = perceptron(data.train[0].shape[1], lab.first_seed)
            return detected(trained(lab, data, model, loss(value), lab.first_seed), data.development).at_equal

        return lab.choose(name, score, grid)

    weight = best("weight of positives", WEIGHTS, few_misses)
    alone = best("weight of the ranking", RANKINGS, lambda value: few_misses(1.0, value))
    beside = best("weight of the ranking, beside weights", RANKINGS, lambda value: few_misses(weight, value))
    return {
        PLAIN: few_misses(), WEIGHTED: few_misses(weight), RANKED: few_misses(1.0, alone),
        BOTH: few_misses(weight, beside),
    }  # fmt: skip


def trained(
    lab: Lab, data: Parts[Part], model: nn.Module, loss: LossFunction, seed: int, number: int = 0,
    arm: str | None = None, ticket: Rewinding | None = None,
) -> nn.Module:  # fmt: skip
    """One round."""
    batches = shuffled(*data.train, size=64 if lab.quick else BATCH, seed=100 * seed + number)
    steps = 8 if lab.quick else STEPS
    return lab.train(model, batches, loss, steps=steps, seed=seed, arm=arm, regimen=ticket, lr=1e-3)


def compress(lab: Lab, data: Parts[Part], name: str, loss: LossFunction, seed: int) -> None:
    """All rounds of one loss, each stored, read back and measured."""
    model, ticket = perceptron(data.train[0].shape[1], seed), Rewinding(SHARE)
    size, whole = 0, model
    for number in range(rounds(lab) + 1):
        # The steps of all rounds are those of the last.
        trained(lab, data, model, loss, seed, number, named(name, rounds(lab)), ticket)
        stored = lab.stored(model, ticket.forms(model) if number else {})
        size, whole = stored.bytes, copy.deepcopy(model) if not number else whole
        read = stored.load(copy.deepcopy(model))
        add(lab, named(name, number), read, data.test, size, 100 * (1 - SHARE) ** number)
    if name == BOTH:
        coded = lab.quantization_alone(whole, size)
        add(lab, CODED, coded.load(whole), data.test, coded.bytes)


def add(lab: Lab, arm: str, model: nn.Module, part: Part, size: int = 0, left: float = 100.0) -> None:
    """Record what a detector does."""
    found = detected(model, part)
    lab.add(arm, found.missed, size, **{MISSED: found.at_equal, AREA: found.area, LEFT: left})
