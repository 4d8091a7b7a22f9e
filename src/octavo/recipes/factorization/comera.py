"""CoMERA: a text classifier trained from scratch as tensor trains that find their own ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from octavo.architectures import SequenceClassifier
from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.data import Split, origins
from octavo.recipes.frame.nets import in_batches, shuffled
from octavo.training import CoMERA, accuracy, core_rates, cross_entropy
from octavo.training.adaptive_trains import elements, fold

#: The published compression, and one of ours; steps of every arm, of which the early stage has half.
PUBLISHED, STRONG, STEPS = 4.23, 12.0, 1200
#: Rates of dense nets and of cores, and weights of the early penalty, that are chosen from; rates of diagonals and of
#: what stays dense beside trains; how far from its target, as a share, the late stage may end.
RATES, PENALTIES, DIAGONALS, BESIDE, NEAR = (1e-3, 3e-3, 9e-3), (0.1, 0.3, 1.0), 3e-2, 1e-3, 0.05
DENSE, THIN, CODED = "dense", f"thinner net, {PUBLISHED} times", f"quantization alone, {PUBLISHED} times"
OURS, FIXED = ({k: f"{name}, {k:g} times" for k in (PUBLISHED, STRONG)} for name in ("found ranks", "one rank"))
MEAN = f"found ranks, mean as penalty, {STRONG:g} times"


@Study(
    "comera",
    system="CoMERA",
    source="Yang et al. (2024), arXiv 2405.14377",
    metric="test accuracy (%)",
    higher=True,
    data="which of six texts 16 words are from (benchmarks/corpus.py makes the texts)",
    claims={"4.23": f"{PUBLISHED} times smaller and as accurate as dense (within 1 point)"},
    extras={
        "target": f"The late stage ends within {NEAR:.0%} of its target",
        "fixed": "Found ranks beat one rank for all, at both sizes",
        "penalty": "The size as penalty beats the mean of the released code",
        "thin": "Found ranks beat a thinner net of the same bytes",
    },
)
def run(lab: Lab) -> None:
    """A transformer of one layer, dense or as trains, from the same start and on the same batches."""
    split = origins(lab)
    for seed in lab.seeds:
        lab.step(f"seed {seed}")
        compare(lab, split, seed)
    arms = lab.arms
    ours, fewer = arms[OURS[STRONG]], arms[DENSE].bytes / arms[OURS[PUBLISHED]].bytes
    lab.gate("the dense net is above 60%, chance is 17%", gap("accuracy", arms[DENSE].values, [60]))
    lab.gate("ranks shrank, by 20%", gap("80% less the share left", [0.8], ours.also["share after the early stage"]))
    lab.gate("there is room: a thinner net is worse than dense", lab.ahead(DENSE, THIN))
    lab.judge("4.23", lab.ahead(OURS[PUBLISHED], DENSE, -1.0), gap("times fewer bytes", [fewer], [PUBLISHED - 0.01]))
    misses = [arms[name].also["distance from target"] for name in OURS.values()]
    lab.judge("target", *(gap("5% less the distance", [NEAR], values) for values in misses))
    lab.judge("fixed", *(lab.ahead(OURS[ratio], FIXED[ratio]) for ratio in OURS))
    lab.judge("thin", lab.ahead(OURS[PUBLISHED], THIN))
    lab.judge("penalty", lab.ahead(OURS[STRONG], MEAN))
    lab.say(
        f"{fewer:.2f} times smaller found ranks have {arms[OURS[PUBLISHED]].shown} %, one rank "
        f"{arms[FIXED[PUBLISHED]].shown} %, quantization alone {arms[CODED].shown} %, and dense {arms[DENSE].shown} %. "
        f"{STRONG:g} times smaller found ranks have {ours.shown} %, one rank {arms[FIXED[STRONG]].shown} %."
    )


def compare(lab: Lab, split: Split, seed: int) -> None:
    """All arms of one seed."""
    test, development, length = in_batches(split.test), in_batches(split.development), split.train[0].shape[1]
    batches = shuffled(*split.train, size=32, seed=seed)
    steps, half, smallest = (8, 4, 512) if lab.quick else (STEPS, STEPS // 2, 4096)

    def net(width: int = 64) -> nn.Module:
        torch.manual_seed(seed)
        embedding = nn.Embedding(int(split.train[0].max()) + 1, width)
        return nn.Sequential(embedding, SequenceClassifier(width, length, split.classes, width=width, depth=1))

    def begun(rank: int = CoMERA.rank) -> nn.Module:
        model = net()
        CoMERA(rank, smallest=smallest).begin(model, 1)
        return model

    def trained(arm: str | None, model: nn.Module, steps: int, **options: Any) -> nn.Module:
        return lab.train(model, batches, cross_entropy, steps=steps, seed=seed, arm=arm, **options)

    def tensorized(arm: str | None, model: nn.Module, steps: int, lr: float, **knobs: Any) -> nn.Module:
        how = {"regimen": CoMERA(smallest=smallest, **knobs), "optimizer": core_rates(lr, BESIDE, DIAGONALS)}
        return trained(arm, model, steps, before=half if "target" in knobs else 0, **how)

    def found(arm: str | None, ratio: float, penalty: str, gamma: float) -> tuple[nn.Module, float, float]:
        """The net, its distance from its target, and the share of elements that the early stage leaves."""
        model = tensorized(None, begun(), half, cores, gamma=gamma, penalty=penalty)
        share = elements(model) / most
        reached = float(cross_entropy(model, (split.train[0][:1000], split.train[1][:1000])).detach())
        goal = {"target": targets[ratio], "loss_target": reached, "penalty": penalty}
        model = tensorized(arm, model, steps - half, cores, **goal)
        return model, abs(elements(model) / targets[ratio] - 1), share

    def score(gamma: float) -> float:
        model, miss, _ = found(None, ratio, penalty, gamma)
        return accuracy(model, development) if miss <= NEAR else -miss

    def add(arm: str, model: nn.Module, **also: float) -> None:
        stored = lab.stored(model, fold(model))
        lab.add(arm, 100 * accuracy(stored.load(model), test), stored, **also)

    def rate(what: str, train: Callable[[float], nn.Module]) -> float:
        return lab.choose(f"rate of {what}", lambda lr: accuracy(train(lr), development), RATES)

    lr = rate("dense", lambda lr: trained(None, net(), steps, lr=lr))
    dense = trained(DENSE, net(), steps, lr=lr)
    add(DENSE, dense)
    whole, most, first = lab.arms[DENSE].bytes, elements(begun()), begun()
    # What a file holds beside the elements of its trains.
    rest = lab.stored(first, fold(first)).bytes - 2 * most
    targets = {ratio: round((whole / ratio - rest) / 2) for ratio in OURS}
    sizes = {rank: elements(begun(rank)) for rank in range(1, 31)}
    ranks = {ratio: max(r for r in sizes if r == 1 or sizes[r] <= target) for ratio, target in targets.items()}
    cores = rate("cores", lambda lr: tensorized(None, begun(ranks[STRONG]), steps, lr, gamma=0.0))
    for arm, ratio, penalty in [*((arm, ratio, "size") for ratio, arm in OURS.items()), (MEAN, STRONG, "mean")]:
        gamma = lab.choose(f"weight of the penalty, {arm}", score, PENALTIES)
        model, miss, share = found(arm, ratio, penalty, gamma)
        add(arm, model, distance_from_target=miss, share_after_the_early_stage=share)
    for ratio, arm in FIXED.items():
        add(arm, tensorized(arm, begun(ranks[ratio]), steps, cores, gamma=0.0))
    width = 4 * lab.thinner(lambda quarter: net(4 * quarter), round(whole / PUBLISHED), range(1, 16))
    lr = rate("the thinner net", lambda lr: trained(None, net(width), steps, lr=lr))
    add(THIN, trained(THIN, net(width), steps, lr=lr))
    coded = lab.quantization_alone(dense, round(whole / PUBLISHED))
    lab.add(CODED, 100 * accuracy(coded.load(dense), test), coded)
