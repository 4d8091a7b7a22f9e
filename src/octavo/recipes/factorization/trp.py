"""Trained rank pruning: low rank learned in training, against an SVD after training, with and without fine-tuning."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from octavo.forms import Form
from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.data import CIFAR10, FASHION, Split, cifar10, fashion
from octavo.recipes.frame.nets import ResNet, augmented, in_batches, momentum
from octavo.training import accuracy, cross_entropy, formed, settle
from octavo.training.regimens.trp import SOURCE, TrainedRankPruning, decomposed, kernels

#: The share of energy that a projection keeps. The paper's 0.9 leaves rank 5 to 7 in each layer of so short a training.
ENERGY = 0.95
#: Weights of the nuclear norm, the paper's 3e-4 among them, and rates of fine-tuning.
PRESSURES, RATES = (3e-5, 3e-4, 3e-3), (0.01, 0.03, 0.1)
#: Steps of every arm, and those of them that are fine-tuning.
STEPS, TUNED = 700, 140

DENSE, PLAIN, FINE = "dense", "SVD", "SVD, fine-tuned"
NUCLEAR, OURS, BOTH, THIN = "nuclear norm, then SVD", "TRP", "TRP with nuclear norm", "thinner net"
CODED, CIFAR = "quantization alone", ", CIFAR-10"
#: The rivals of the smaller net, which the nuclear norm leaves.
PLAIN_TOO, FINE_TOO = f"{PLAIN}, smaller", f"{FINE}, smaller"


@Study(
    "trp",
    system="Trained Rank Pruning",
    source=SOURCE,
    metric="test accuracy (%)",
    higher=True,
    data=f"{FASHION}; {CIFAR10}",
    claims={
        "tuned": "Without fine-tuning, as accurate as a fine-tuned SVD (within 1 point)",
        "nuclear tuned": "So it is with the nuclear norm (within 1 point)",
        "plain": "Far above an SVD without fine-tuning (by over 5 points)",
        "nuclear plain": "So it is with the nuclear norm (by over 5 points)",
    },
    extras={
        "projection": "The projection does it: with the norm TRP beats the norm alone",
        "above": "TRP beats the fine-tuned SVD at equal total steps",
        "thin": "TRP beats a thinner net of the same bytes",
        "cifar": "On CIFAR-10 it beats the fine-tuned SVD, too",
    },
)
def run(lab: Lab) -> None:
    """A ResNet-8; kernels are folded as (n, c h w), and rivals have the size that each TRP net found for itself."""
    for seed in lab.seeds:
        lab.step(f"seed {seed}")
        compare(lab, fashion(lab), seed)
        compare(lab, cifar10(lab), seed, CIFAR)
    arms = lab.arms
    share = arms[OURS].bytes / arms[DENSE].bytes
    lab.gate("the dense net is above 80%", gap("accuracy", arms[DENSE].values, [80]))
    lab.gate("ranks shrank: the file has under 60% of the dense bytes", gap("60% less the share", [0.6], [share]))
    lab.gate("truncation does damage, more than 1 point", lab.ahead(DENSE, PLAIN, 1.0))
    for ours, prefix, plain, fine in ((OURS, "", PLAIN, FINE), (BOTH, "nuclear ", PLAIN_TOO, FINE_TOO)):
        lab.judge(prefix + "tuned", lab.ahead(ours, fine, -1.0))
        lab.judge(prefix + "plain", lab.ahead(ours, plain, 5.0))
    lab.judge("projection", lab.ahead(BOTH, NUCLEAR))
    for key, rival in (("above", FINE), ("thin", THIN)):
        lab.judge(key, lab.ahead(OURS, rival))
    lab.judge("cifar", lab.ahead(OURS + CIFAR, FINE + CIFAR), needs=())
    lab.say(
        f"TRP keeps {arms[OURS].shown} % of the dense net's {arms[DENSE].shown} % in {share:.0%} of its bytes. "
        f"The same bytes spent on quantization alone give {arms[CODED].shown} %."
    )


def compare(lab: Lab, split: Split, seed: int, mark: str = "") -> None:
    """All arms of one seed, from the same start and on the same batches; where arms are marked, the two that matter."""
    steps, tuned = (8, 2) if lab.quick else (STEPS, TUNED)
    test, development = in_batches(split.test), in_batches(split.development)

    def net(width: int = 16) -> nn.Module:
        torch.manual_seed(seed)
        return ResNet(1, split.classes, width, split.train[0].shape[1])

    def trained(arm: str | None, model: nn.Module, steps: int, lr: float = 0.1, **options: Any) -> nn.Module:
        batches = augmented(*split.train, size=64, seed=seed)
        return lab.train(
            model, batches, cross_entropy, steps=steps, seed=seed, arm=arm, optimizer=momentum(lr), **options
        )

    def fine(arm: str | None, lr: float, budget: int) -> tuple[nn.Module, dict[str, Form]]:
        model = copy.deepcopy(begun)
        formed(model, within(begun, budget))
        trained(arm, model, tuned, lr, before=steps - tuned)
        return model, settle(model)

    def pressed(energy: float) -> float:
        """The weight of best accuracy after a short training, cut to a third of the weights."""

        def score(nuclear: float) -> float:
            model = trained(None, net(), tuned, regimen=TrainedRankPruning(energy=energy, nuclear=nuclear))
            return accuracy(lab.stored(model, within(model, elements(model, {}) // 3)).load(model), development)

        return lab.choose(f"weight of the nuclear norm, energy {energy:g}", score, PRESSURES)

    regimens = {OURS: TrainedRankPruning(energy=ENERGY, nuclear=0.0)}
    if not mark:
        regimens[NUCLEAR] = TrainedRankPruning(energy=1.0, nuclear=pressed(1.0))
        regimens[BOTH] = TrainedRankPruning(energy=ENERGY, nuclear=pressed(ENERGY))
    models = {name: trained(name + mark, net(), steps, regimen=regimen) for name, regimen in regimens.items()}
    begun = trained(None, net(), steps - tuned)
    sizes = {name: elements(model, within(model)) for name, model in models.items() if name != NUCLEAR}
    size = sizes[OURS]
    lr = lab.choose(f"rate of fine-tuning{mark}", lambda lr: accuracy(fine(None, lr, size)[0], development), RATES)
    kept = {FINE: fine(FINE + mark, lr, size), OURS: (models[OURS], within(models[OURS], size))}
    if not mark:
        smaller, dense = sizes[BOTH], trained(DENSE, net(), steps)
        kept |= {name: (models[name], within(models[name], smaller)) for name in (BOTH, NUCLEAR)}
        kept |= {DENSE: (dense, {}), PLAIN: (dense, within(dense, size)), PLAIN_TOO: (dense, within(dense, smaller))}
        kept[FINE_TOO] = fine(FINE_TOO, lr, smaller)
        within_bytes = lab.stored(*kept[OURS]).bytes
        kept[THIN] = trained(THIN, net(lab.thinner(net, within_bytes, range(2, 17))), steps), {}
        coded = lab.quantization_alone(dense, within_bytes)
        lab.add(CODED, 100 * accuracy(coded.load(copy.deepcopy(dense)), test), coded)
    for name, (model, forms) in kept.items():
        stored = lab.stored(model, forms)
        lab.add(name + mark, 100 * accuracy(stored.load(model), test), stored)


def elements(model: nn.Module, forms: Mapping[str, Form]) -> int:
    """Coefficients of all kernels that can be decomposed."""
    return sum(
        sum(part.numel() for part in forms[name].tensors().values()) if name in forms else weight.numel()
        for name, weight in kernels(model).items()
    )


def within(model: nn.Module, budget: int | None = None) -> dict[str, Form]:
    """Factors with the largest share of energy, equal in all layers, within the budget; all energy without one."""

    def at(energy: float) -> dict[str, Form]:
        found = {name: decomposed(weight, "channel", energy) for name, weight in kernels(model).items()}
        return {name: form for name, form in found.items() if form is not None}

    best = at(1 - 1e-6)
    if budget is None or elements(model, best) <= budget:
        return best
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if elements(model, at(middle)) <= budget else (low, middle)
    return at(low)
