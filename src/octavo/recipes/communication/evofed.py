"""EvoFed: clients send how near shared perturbations come to their weights, against other codecs in the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.flows import Schema
from octavo.flows.payload import overhead
from octavo.flows.updates.fitness import Fitness
from octavo.flows.updates.sketch import Sketch
from octavo.flows.updates.topk import TopK
from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.data import FASHION, Split, fashion
from octavo.recipes.testbeds.federated import Federation, Send, Tensors, coded, dealt, federate, percent, plain
from octavo.recipes.testbeds.workers import conv_net

#: Clients and their classes' concentration; rounds; examples of a client's round, in batches of 32.
CLIENTS, CONCENTRATION, ROUNDS, EACH = 5, 0.3, 200, 256
#: Perturbations with their opposites: the source's for Fashion-MNIST, of all weights at once.
POPULATION = 128
#: Tried rates of clients and of the server.
RATES, STEPS = (0.03, 0.1, 0.3), (3.0, 10.0, 30.0)
FEDAVG, OURS, SINGLE, CORRECTED = "FedAvg", "EvoFed", "EvoFed without pairs", "EvoFed, corrected"
PARTS, LARGER = "EvoFed, 4 parts", "EvoFed, 4 times the population"
SMALL, LINEAR, TOP = "EvoFed, differences on a grid", "orthogonal sketch", "top-k with feedback"
SHORT = "FedAvg, a tenth of the rounds"


@Study(
    "evofed",
    system="EvoFed",
    source="Rahimi et al. (2023), NeurIPS",
    metric="test accuracy (%)",
    higher=True,
    data=f"{FASHION}; images of 14 x 14",
    claims={
        "level": "It is within 3 points of FedAvg with 97% fewer bytes",
        "population": "Four times the population is more accurate (by 1 point)",
    },
    extras={
        "pairs": "Antithetic pairs are needed: without them over 5 points worse",
        "corrected": "Corrected fitness of single perturbations beats pairs, equal bytes",
        "parts": "Four parts are as good as four times the population (2 points)",
        "grid": "Differences on a grid beat floats in the same bytes",
        "top-k": "It beats top-k with feedback in the same bytes",
        "rounds": "FedAvg needs a tenth of the rounds to be within 3 points",
    },
)
def run(lab: Lab) -> None:
    """Five clients with skewed classes; clients and server draw the same perturbations in every round."""
    split = fashion(lab)
    train, development, test = (halved(part) for part in (split.train, split.development, split.test))
    split = Split(train, development, test, split.digest, split.classes)
    rounds = 1 if lab.quick else ROUNDS
    for seed in lab.each_seed():
        lab.step(f"seed {seed}")
        count = 64 if lab.quick else EACH
        clients = dealt(split.train, 2 if lab.quick else CLIENTS, CONCENTRATION, seed)

        def net(seed: int = seed) -> nn.Module:
            torch.manual_seed(seed)
            return conv_net(split.train[0].shape[1:], split.classes, (4, 4) if lab.quick else (8, 16))

        whole = sum(parameter.numel() for parameter in net().parameters())
        size, base = overhead(2) + 4 * POPULATION, Federation(clients, net, rounds, 0.1, seed, examples=count)
        short = replace(base, rounds=max(rounds // 10, 1))
        lr = lab.choose(
            "rate of clients",
            lambda lr: percent(federate(replace(base, lr=lr, rounds=short.rounds), plain).net, split.development),  # noqa: B023
            RATES,
        )
        base, short = replace(base, lr=lr), replace(short, lr=lr)
        lossy: dict[str, Callable[[], Send]] = {
            OURS: floats("paired", whole, POPULATION // 2),
            SINGLE: floats("single", whole, POPULATION),
            CORRECTED: floats("corrected", whole, POPULATION),
            PARTS: floats("paired", -(-whole // 4), POPULATION // 2),
            LARGER: floats("paired", whole, 2 * POPULATION),
            SMALL: coded(Fitness(), size),
            LINEAR: coded(Sketch(feedback=False), size),
        }
        for arm, opened in {FEDAVG: plain, SHORT: plain, **lossy, TOP: coded(TopK(), size)}.items():
            lab.step(f"seed {seed}: {arm}")
            federation = short if arm == SHORT else base
            if arm in lossy:
                federation = replace(federation, server=chosen(lab, arm, base, opened, split.development))
            found = federate(federation, opened)
            lab.add(arm, percent(found.net, split.test), round(found.uplink))
    judge(lab)


def halved(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Images of half the size."""
    return functional.avg_pool2d(part[0], 2), part[1]


def chosen(
    lab: Lab, arm: str, base: Federation, opened: Callable[[], Send], development: tuple[Tensor, Tensor]
) -> float:
    """The server's rate, from a third of the rounds."""
    third = max(base.rounds // 3, 1)

    def tried(rate: float) -> float:
        return percent(federate(replace(base, server=rate, rounds=third), opened).net, development)

    return lab.choose(f"rate of the server, {arm}", tried, STEPS)


def floats(estimator: str, part: int, numbers: int) -> Callable[[], Send]:
    """Carriers of so many numbers a part, each in four bytes as in the source, where a pair has two."""
    codec, each = Fitness(part=part, estimator=estimator), 8 if estimator == "paired" else 4
    choice = {"levels": 127}

    def opened() -> Send:
        steps = 0

        def send(update: Tensors) -> tuple[Tensors, int]:
            nonlocal steps
            schema = Schema.of(update)
            prepared = codec.prepare(schema.flat(update), schema, choice, steps)
            amount = min(numbers * len(prepared[1]), codec.most(schema))
            packed = [memoryview(part) for part in codec.pack(prepared, schema, amount, choice)]
            arrived = schema.split(codec.unpack(packed, schema, steps))
            steps += 1
            return arrived, overhead(2) + each * amount

        return send

    return opened


def judge(lab: Lab) -> None:
    """All claims."""
    arms = lab.arms
    lab.gate("FedAvg is above 65%", gap("accuracy", arms[FEDAVG].values, [65]))
    lab.gate("rounds matter: a tenth of them is worse", lab.ahead(FEDAVG, SHORT))
    saved = gap("share of bytes saved over 97%", [1 - arms[OURS].bytes / arms[FEDAVG].bytes], [0.97])
    lab.judge("level", lab.ahead(OURS, FEDAVG, -3.0), saved)
    lab.judge("population", lab.ahead(LARGER, OURS, 1.0))
    lab.judge("pairs", lab.ahead(OURS, SINGLE, 5.0))
    lab.judge("corrected", lab.ahead(CORRECTED, OURS))
    lab.judge("parts", lab.ahead(PARTS, LARGER, -2.0))
    lab.judge("grid", lab.ahead(SMALL, OURS))
    lab.judge("top-k", lab.ahead(OURS, TOP))
    lab.judge("rounds", lab.ahead(SHORT, FEDAVG, -3.0))
    lab.say(
        f"{POPULATION} numbers of all weights see a small part of an update in a round. Half of those of pairs "
        "are not needed: the difference of two says all, and a few bits of it are enough."
    )
    lab.say(f"The orthogonal sketch has {arms[LINEAR].shown} %, top-k with feedback {arms[TOP].shown} %.")
