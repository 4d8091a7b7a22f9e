"""ALDS: groups and ranks of all layers at once, against an SVD by the same and by simpler allocations."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from octavo.forms import Form
from octavo.methods.factorize.alds import SOURCE
from octavo.methods.factorize.alds_network import chosen_forms, ranked_layers
from octavo.methods.factorize.minimax import RankChoice, RankedLayer, allocate_ranks, constant_ranks, energy_ranks
from octavo.recipes.frame import Lab, Stored, Study, gap, rank_correlation
from octavo.recipes.frame.bases import classifier
from octavo.recipes.frame.data import FASHION, fashion
from octavo.recipes.frame.nets import augmented, in_batches, momentum
from octavo.training import accuracy, cross_entropy, formed, settle

#: Coefficients of all layers together, as shares of the dense ones.
SIZES = (0.2, 0.35)
#: Rates of fine-tuning, its steps, and images of a step.
RATES, STEPS, BATCH = (0.003, 0.01, 0.03), 100, 64

DENSE, OURS, BOUND, CODED = "dense", "ALDS", "ALDS with sqrt(k)", "quantization alone"
SINGLE, CONSTANT, ENERGY = "one group by the same allocator", "constant relative rank", "energy threshold"


@Study(
    "alds",
    system="ALDS",
    source=SOURCE,
    metric="test accuracy (%)",
    higher=True,
    data=FASHION,
    claims={
        "before": "Without training, it beats SVD with constant or energy-based ranks",
        "after": "After fine-tuning, it beats SVD with constant or energy-based ranks",
        "groups": "Groups help: it beats one group under the same allocation",
    },
    extras={
        "bound": "Leaving sqrt(k) out, as the program does, beats the published bound",
        "coded": "It beats quantization alone at equal bytes",
    },
)
def run(lab: Lab) -> None:
    """A ResNet-8, all its layers decomposed at two sizes, before and after a short fine-tuning."""
    for seed in lab.seeds:
        lab.step(f"seed {seed}")
        compare(lab, seed)
    arms, least = lab.arms, SIZES[0]
    lab.gate("the dense net is above 85%", gap("accuracy", arms[DENSE].values, [85]))
    lab.gate("an SVD still lacks over 1 point after fine-tuning", lab.ahead(DENSE, at(CONSTANT, least), 1.0))
    grouped = [groups - 1 for groups in arms[at(OURS, least)].also["mean groups"]]
    lab.gate("several groups were chosen", gap("groups beyond one", grouped, [0]))
    for key, of in (("before", "before tuning"), ("after", None)):
        gaps = [lab.ahead(at(OURS, s), at(rival, s), of=of) for s in SIZES for rival in (CONSTANT, ENERGY)]
        lab.judge(key, *gaps)
    for key, rival in (("groups", SINGLE), ("bound", BOUND)):
        gaps = [lab.ahead(at(OURS, s), at(rival, s), of=of) for s in SIZES for of in ("before tuning", None)]
        lab.judge(key, *gaps)
    lab.judge("coded", *(lab.ahead(at(OURS, s), at(CODED, s)) for s in SIZES))
    rivals = [arm for arm in arms.values() if "largest error" in arm.also]
    levels, scores = ([v for arm in rivals for v in arm.also[of]] for of in ("largest error", "before tuning"))
    ours = arms[at(OURS, least)]
    lab.say(
        f"At {least:.0%} of the coefficients ALDS takes {statistics.fmean(ours.also['mean groups']):.1f} groups on "
        f"average and keeps {ours.shown} % of the dense net's {arms[DENSE].shown} %. Over all arms the largest error, "
        f"which it minimizes, has a rank correlation of {rank_correlation(levels, scores):.2f} with the accuracy "
        "before fine-tuning; a sure guide would have -1."
    )


def at(name: str, size: float) -> str:
    """The name of an arm."""
    return f"{name}, {size:.0%}"


def minimax(layers: Mapping[str, RankedLayer], share: float, **options: Any) -> Mapping[str, RankChoice | None]:
    """Groups and ranks of least largest error."""
    return allocate_ranks(layers, int(share * sum(layer.dense for layer in layers.values())), **options).choices


def compare(lab: Lab, seed: int) -> None:
    """All arms of one seed, at equal bytes and with equal steps of fine-tuning."""
    split, model = fashion(lab), classifier(lab, seed)
    layers, bound = ranked_layers(model), ranked_layers(model, bound=True)
    test, steps = in_batches(split.test), 1 if lab.quick else STEPS
    # The first three count coefficients; shares of ranks and of energy are searched for equal bytes.
    counting = {
        OURS: partial(minimax, layers),
        BOUND: partial(minimax, bound),
        SINGLE: partial(minimax, layers, groups=(1,)),
    }
    searched = {CONSTANT: partial(constant_ranks, layers), ENERGY: partial(energy_ranks, layers)}

    def tuned(name: str, forms: Mapping[str, Form]) -> tuple[nn.Module, Mapping[str, Form]]:
        def by(lr: float, arm: str | None = None) -> tuple[nn.Module, Mapping[str, Form]]:
            made, batches = copy.deepcopy(model), augmented(*split.train, size=BATCH, seed=seed)
            formed(made, forms)
            lab.train(made, batches, cross_entropy, steps=steps, seed=seed, arm=arm, optimizer=momentum(lr))
            return made, settle(made)

        score = lambda lr: accuracy(by(lr)[0], in_batches(split.development))  # noqa: E731
        return by(lab.choose(f"rate of {name.partition(',')[0]}", score, RATES), name)

    def percent(stored: Stored) -> float:
        return 100 * accuracy(stored.load(copy.deepcopy(model)), test)

    lab.add(DENSE, percent(lab.stored(model)), lab.stored(model))
    for size in SIZES:
        found = {name: allocator(size) for name, allocator in counting.items()}
        budget = lab.stored(model, chosen_forms(layers, found[OURS])).bytes
        for name, ranks in searched.items():
            search = lambda share, ranks=ranks: lab.stored(model, chosen_forms(layers, ranks(share)))  # noqa: E731
            found[name] = ranks(lab.fit(search, budget, 0.0, 1.0, near=0.05)[0])
        for name, choices in found.items():
            forms = chosen_forms(layers, choices)
            after = lab.stored(*tuned(at(name, size), forms))
            lab.add(
                at(name, size), percent(after), after, before_tuning=percent(lab.stored(model, forms)),
                largest_error=max(layers[n].error(choice) for n, choice in choices.items()),
                mean_groups=statistics.fmean(choice.groups for choice in choices.values() if choice),
            )  # fmt: skip
        coded = lab.quantization_alone(model, budget)
        lab.add(at(CODED, size), percent(coded), coded)
