"""Maestro: one training with ordered dropout, cut to many sizes, against the SVD of a normally trained network."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from octavo.forms import LowRank
from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.data import FASHION, Split, fashion
from octavo.recipes.frame.nets import in_batches, momentum, shuffled
from octavo.recipes.testbeds.linear_maps import angles
from octavo.training import accuracy, cross_entropy
from octavo.training.regimens.maestro import SOURCE, OrderedDropout
from octavo.training.widths import components, costs, with_weights, within_share

#: Weights of the factorized layers as shares of the dense ones, as published; the last is a question of ours.
SIZES = (0.11, 0.06, 0.03)
#: Width of the net, steps of every arm, how often ranks may fall in them; the largest angle of spans that count as one.
WIDTH, STEPS, EPOCHS, SAME = 256, 5000, 20, 5.0
#: Learning rates, and weights of the group lasso, that are chosen from.
RATES, PRESSURES = (0.02, 0.05, 0.15), (1e-4, 3e-4, 1e-3)

DENSE, SVD, THIN, CODED = "dense", "SVD of dense", "thinner net", "quantization alone"
OURS, NARROW = "Maestro", "Maestro, loss of the narrowed net"


@Study(
    "maestro",
    system="Maestro",
    source=SOURCE,
    metric="test accuracy (%)",
    higher=True,
    data=FASHION,
    claims={
        "svd": "Ordered dropout on a linear map finds its SVD",
        "11%": "As accurate as dense with 11% of its weights (within 1 point)",
        "6%": "As accurate as dense with 6% of its weights (within 1 point)",
    },
    extras={
        "data": "With unequal inputs it finds the SVD that the data weigh",
        "svd 11%": "Beats the SVD of a dense net at 11%",
        "svd 3%": "Cut to 3% without retraining, it beats that SVD",
        "thin": "Beats a thinner net of the same bytes",
    },
)
def run(lab: Lab) -> None:
    """Angles of a linear map; then a perceptron of two hidden layers, with the same choice of ranks for all."""
    split, epochs = fashion(lab), 8 if lab.quick else 100
    equal, weighted = ([angles(seed, spread, epochs)[bool(spread)] for seed in lab.seeds] for spread in (0.0, 0.5))
    for seed in lab.seeds:
        lab.step(f"seed {seed}")
        compare(lab, split, seed)
    arms = lab.arms
    trained, large = arms[OURS].also["share of weights"], _at(OURS, SIZES[0])
    lab.gate("the dense net is above 85%, a linear one has 84%", gap("accuracy", arms[DENSE].values, [85]))
    lab.gate("ranks shrank in training, to under 30% of the weights", gap("30% less the share", [0.3], trained))
    lab.gate("there is room: a thinner net of those bytes is worse", lab.ahead(DENSE, THIN))
    lab.judge("svd", gap(f"{SAME:g} degrees less the largest angle", [SAME], equal), needs=())
    lab.judge("data", gap(f"{SAME:g} degrees less the largest angle", [SAME], weighted), needs=())
    for key, ours, theirs, margin in (
        ("11%", SIZES[0], DENSE, -1.0), ("6%", SIZES[1], DENSE, -1.0), ("svd 11%", SIZES[0], _at(SVD, SIZES[0]), 0.0),
        ("svd 3%", SIZES[2], _at(SVD, SIZES[2]), 0.0), ("thin", SIZES[0], THIN, 0.0),
    ):  # fmt: skip
        lab.judge(key, lab.ahead(_at(OURS, ours), theirs, margin))
    lab.say(
        f"Training leaves {statistics.fmean(trained):.0%} of the weights, with {arms[OURS].shown} %; at {SIZES[0]:.0%} "
        f"it has {arms[large].shown} %, a thinner net {arms[THIN].shown} %, and quantization alone {arms[CODED].shown} "
        f"% in as many bytes. With the loss of the narrowed net alone it has {arms[_at(NARROW, SIZES[0])].shown} %."
    )


def compare(lab: Lab, split: Split, seed: int) -> None:
    """All arms of one seed, from the same start and on the same batches."""
    test, development = in_batches(split.test, 1000), in_batches(split.development, 1000)

    def plain(width: int = WIDTH) -> nn.Module:
        torch.manual_seed(seed)
        layers = nn.Linear(split.train[0][0].numel(), width), nn.Linear(width, width), nn.Linear(width, 10)
        return nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def trained(arm: str | None, model: nn.Module, lr: float, **options: Any) -> nn.Module:
        options |= {"steps": 12 if lab.quick else STEPS, "seed": seed, "arm": arm, "optimizer": momentum(lr)}
        return lab.train(model, shuffled(*split.train, size=64, seed=seed), cross_entropy, **options)

    def ours(arm: str | None, lr: float, pressure: float, *, distil: bool) -> tuple[nn.Module, dict[str, LowRank]]:
        regimen = OrderedDropout(pressure=pressure, distil=distil, seed=seed)
        model = trained(arm, plain(), lr, epochs=1 if lab.quick else EPOCHS, regimen=regimen)
        return model, regimen.forms(model)

    def add(arm: str, model: nn.Module, forms: Mapping[str, LowRank], **also: float) -> None:
        stored = lab.stored(model, forms)
        lab.add(arm, 100 * accuracy(stored.load(copy.deepcopy(model)), test), stored, **also)

    @torch.inference_mode()
    def loss(model: nn.Module) -> float:
        return statistics.fmean(float(cross_entropy(model, batch)) for batch in development[:2])

    def score(lr: float, pressure: float) -> float:
        model, forms = ours(None, lr, pressure, distil=True)
        return accuracy(with_weights(model, within_share(forms, costs(model, forms, loss), SIZES[0])), development)

    def rate(net: str, width: int) -> float:
        return lab.choose(f"rate of {net}", lambda lr: accuracy(trained(None, plain(width), lr), development), RATES)

    own = lab.choose("rate of Maestro", lambda lr: score(lr, PRESSURES[1]), RATES)
    pressure = lab.choose("weight of the group lasso", lambda pressure: score(own, pressure), PRESSURES)
    model = trained(DENSE, plain(), rate(DENSE, WIDTH))
    nets = {SVD: (model, components(model))}
    nets |= {name: ours(name, own, pressure, distil=name == OURS) for name in (OURS, NARROW)}
    for name, (net, forms) in nets.items():
        weights = sum(part.numel() for form in forms.values() for part in form.tensors().values())
        share = weights / sum(form.shape[0] * form.shape[1] for form in forms.values())
        curves = costs(net, forms, loss)
        add(DENSE if name == SVD else name, net, within_share(forms, curves, 1.0), share_of_weights=share)
        for size in SIZES:
            add(_at(name, size), net, within_share(forms, curves, size))
    most = lab.arms[_at(OURS, SIZES[0])].bytes
    width, coded = lab.thinner(plain, most, range(2, WIDTH)), lab.quantization_alone(model, most)
    add(THIN, trained(THIN, plain(width), rate(THIN, width)), {})
    lab.add(CODED, 100 * accuracy(coded.load(model), test), coded)


def _at(name: str, size: float) -> str:
    return f"{name}, {size:.0%}"
