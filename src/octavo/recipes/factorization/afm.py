"""Atomic feature mimicking of a click-through model: two parts fitted to outputs, with and without a ReLU between."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from octavo.methods.factorize.mimicking import Mimicking
from octavo.recipes.frame import Lab, Study
from octavo.recipes.frame.nets import shuffled
from octavo.recipes.testbeds.ctr import CTR, MOVIELENS, ClickData, FilmMeans, auc, click_loss, clicks, clicks_model

#: Times smaller than the dense network, both in half precision.
RATIOS = (3, 5)
#: Rates of the dense networks, large and small, and of fine-tuning.
DENSE_RATES, RATES = (3e-3, 6e-3, 1.2e-2), (3e-4, 1e-3, 3e-3)
#: Epochs of the dense networks, before one of fine-tuning; examples of a step; sizes of the large network.
EPOCHS, BATCH, WIDTH, HIDDEN = 3, 512, 16, (256, 128)

#: Ranks by name of the layer, and the hidden sizes of a smaller network.
RanksAndSizes = tuple[dict[str, int], list[int]]
DENSE, SVD, LINEAR, OURS, SMALL = "dense", "SVD", "AFM without ReLU", "AFM", "smaller dense"


@Study(
    "afm",
    system="Atomic Feature Mimicking",
    source="Yu et al. (2024), arXiv 2405.18146",
    metric="test AUC (%)",
    higher=True,
    data=MOVIELENS,
    claims={
        "3 times": "3 times smaller, fine-tuned, its AUC is above the original's",
        "5 times": "5 times smaller, fine-tuned, its AUC is above the original's",
        "mimics": "Without training, fitting outputs beats an SVD of weights",
    },
    extras={
        "linear": "Without the ReLU, fine-tuned, the AUC is above the original's",
        "relu": "The ReLU helps: it beats linear parts after fine-tuning",
        "equal steps": "It beats the original after as many steps of training",
        "smaller": "It beats a smaller dense network of equal bytes and steps",
    },
    seeds=20,
)
def run(lab: Lab) -> None:
    """Tables and hidden layers in parts of equal ranks; every seed has its own random split of the data."""
    plans: dict[int, RanksAndSizes] = {}
    for seed in lab.seeds:
        lab.step(f"seed {seed}")
        data = clicks(lab, shuffle=seed)
        plans = plans or {ratio: plan(lab, data.sizes, ratio) for ratio in RATIOS}
        compare(lab, data, plans, seed)
    most = RATIOS[-1]
    room, damage = f"a smaller dense network is worse at {most} times", f"an SVD does damage at {most} times"
    lab.gate("the dense network beats the mean rating of a film", lab.ahead(DENSE, "mean of a film"))
    lab.gate(room, lab.ahead(named(DENSE), named(SMALL, most)))
    lab.gate(damage, lab.ahead(DENSE, named(SVD, most, tuned=False)))
    for ratio in RATIOS:
        lab.judge(f"{ratio} times", lab.ahead(named(OURS, ratio), DENSE), needs=[room])
    starts = [lab.ahead(named(LINEAR, r, tuned=False), named(SVD, r, tuned=False)) for r in RATIOS]
    lab.judge("mimics", *starts, needs=[damage])
    lab.judge("linear", *(lab.ahead(named(LINEAR, r), DENSE) for r in RATIOS), needs=[room])
    for key, rival in (("relu", LINEAR), ("smaller", SMALL)):
        lab.judge(key, *(lab.ahead(named(OURS, r), named(rival, r)) for r in RATIOS), needs=[room])
    lab.judge("equal steps", *(lab.ahead(named(OURS, r), named(DENSE)) for r in RATIOS), needs=[room])
    cost = lab.ahead(named(LINEAR, most, tuned=False), named(OURS, most, tuned=False)).mean
    shown = ", ".join(f"{name} {lab.arms[named(name, most)].shown} %" for name in (OURS, LINEAR, SMALL))
    lab.say(
        f"One more epoch changes the dense network by {lab.ahead(named(DENSE), DENSE).mean:+.2g} points. The closed "
        f"form does not know of the ReLU, which costs {cost:.2g} points at {most} times. Fine-tuned: {shown}."
    )


def named(name: str, ratio: int | None = None, *, tuned: bool = True) -> str:
    """The name of an arm."""
    return f"{name}{'' if ratio is None else f', {ratio}x'}{', fine-tuned' if tuned else ''}"


def plan(lab: Lab, sizes: Sequence[int], ratio: int) -> RanksAndSizes:
    """Ranks of the parts, and hidden sizes of a smaller network; tables are as much thinner in both."""
    dense, width = CTR(sizes, WIDTH, HIDDEN), WIDTH // ratio
    layers = {n: part.weight.shape for n, part in dense.named_modules() if isinstance(part, nn.Linear | nn.Embedding)}

    def ranks(share: float) -> dict[str, int]:
        thick = {name: min(shape) for name, shape in layers.items() if min(shape) >= WIDTH}
        return {n: width if n.startswith("tables") else max(1, round(share * most)) for n, most in thick.items()}

    def hidden(share: float) -> list[int]:
        return [max(1, round(share * size)) for size in HIDDEN]

    size = lab.stored(dense).bytes // ratio
    share = lab.fit(lambda share: lab.stored(Mimicking(ranks(share)).by_weights(dense)), size, 0.0, 1.0)[0]
    smaller = lab.fit(lambda share: lab.stored(CTR(sizes, width, hidden(share))), size, 0.0, 1.0)[0]
    return ranks(share), hidden(smaller)


def compare(lab: Lab, data: ClickData, plans: Mapping[int, RanksAndSizes], seed: int) -> None:
    """All arms of one seed: dense networks, then parts of the large one before and after fine-tuning."""
    epoch = len(data.train[0]) // BATCH

    def dense(name: str, **sizes: Any) -> nn.Module:
        def at(lr: float) -> nn.Module:
            return clicks_model(lab, data, seed, epochs=EPOCHS, lr=lr, **sizes)

        return at(lab.choose(f"rate of {name}", lambda lr: auc(at(lr), data.development), DENSE_RATES))

    def tuned(name: str, model: nn.Module) -> nn.Module:
        def at(lr: float, arm: str | None = None) -> nn.Module:
            batches = shuffled(*data.train, size=BATCH, seed=seed + 100)
            made, before = copy.deepcopy(model), EPOCHS * epoch
            return lab.train(made, batches, click_loss, steps=epoch, seed=seed, arm=arm, before=before, lr=lr)

        return at(lab.choose(f"rate of {name}", lambda lr: auc(at(lr), data.development), RATES), name)

    whole = dense(DENSE)
    starts, fields = {DENSE: whole}, data.train[0].split(4096)
    for ratio, (ranks, hidden) in plans.items():
        starts[f"{SVD}, {ratio}x"] = Mimicking(ranks, relu=False).by_weights(whole)
        starts[f"{LINEAR}, {ratio}x"] = Mimicking(ranks, relu=False).of(whole, fields)
        starts[f"{OURS}, {ratio}x"] = Mimicking(ranks).of(whole, fields)
        starts[f"{SMALL}, {ratio}x"] = dense(f"{SMALL}, {ratio}x", width=WIDTH // ratio, hidden=hidden)
    for name, model in starts.items():
        for arm, made in ((name, model), (f"{name}, fine-tuned", tuned(f"{name}, fine-tuned", model))):
            stored = lab.stored(made)
            lab.add(arm, auc(stored.load(made), data.test), stored)
    lab.add("mean of a film", auc(FilmMeans(data), data.test))
