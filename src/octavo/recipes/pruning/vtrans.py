"""VTrans: masks of heads, neurons and columns trained to a stated size, against units cut by magnitude."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from octavo.cuts import Units, without
from octavo.cuts.choosing import best_across
from octavo.cuts.scores.magnitude import WeightMagnitude
from octavo.cuts.structured import Structured
from octavo.cuts.transformer_units import COLUMN, HEAD, NEURON
from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.data import FASHION, Split, fashion
from octavo.recipes.frame.nets import in_batches, shuffled
from octavo.sources.model_classes import require_transformers
from octavo.training import accuracy, cross_entropy
from octavo.training.bottleneck import UnitSizes
from octavo.training.regimens.vtrans import SOURCE, VTrans

#: Steps of the dense base, those of every arm after it, and the share of these after the masks are fixed.
BASE, STEPS, TUNED = 700, 500, 0.3
#: Shares of all weights that are left, the strong one for all variants; and the data of Fast-VTrans.
MILD, STRONG, FEW = 0.3, 0.15, 0.03
#: Factors by which the magnitudes of columns count beside those of other units; large ones leave columns whole.
FACTORS = (0.25, 1.0, 4.0, 16.0)
DENSE, OURS, PLAIN, CODED = "dense", "VTrans", "structured magnitude", "quantization alone"
WHOLE, FASTER, FAST = "VTrans, columns left", "Faster-VTrans: masks alone", "Fast-VTrans: 3% of the data"
MISS, FOUND = "miss of the stated size (%)", "weights that the masks leave (%)"


@Study(
    "vtrans",
    system="VTrans",
    source=SOURCE,
    metric="test accuracy (%)",
    higher=True,
    data=FASHION,
    claims={
        "size": "The masks themselves hit the stated size within 1%",
        "magnitude": "At the same size better than structured magnitude pruning",
        "columns": "Pruning embedding columns too beats leaving them whole",
        "faster": "Masks alone, then tuning: within 1 point",
        "fast": "With 3% of the data: within 1 point",
    },
    extras={"coded": "More accurate than quantization alone in the same bytes"},
)
def run(lab: Lab) -> None:
    """A vision transformer, cut to 30% and to 15% of all its weights."""
    for seed in lab.each_seed():
        lab.step(f"seed {seed}")
        compare(lab, fashion(lab), seed)
    arms, sizes = lab.arms, [at(OURS, share) for share in (MILD, STRONG)]
    strong = sizes[1]
    healthy = "the dense net is above 80%"
    lab.gate(healthy, gap("accuracy", arms[DENSE].values, [80]))
    lab.gate("there is room: magnitude loses over 0.5 points at 15%", lab.ahead(DENSE, at(PLAIN, STRONG), 0.5))
    left = gap("20% less what the masks leave", [20.0], arms[strong].also[FOUND])
    lab.gate("units went: the masks themselves leave under 20%", left)
    lab.judge(
        "size", *(gap(f"1% less the miss, {arm}", [1.0], arms[arm].also[MISS]) for arm in sizes), needs=(healthy,)
    )
    lab.judge("magnitude", *(lab.ahead(at(OURS, share), at(PLAIN, share)) for share in (MILD, STRONG)))
    lab.judge("columns", lab.ahead(strong, WHOLE))
    lab.judge("faster", lab.ahead(FASTER, strong, -1.0))
    lab.judge("fast", lab.ahead(FAST, strong, -1.0))
    lab.judge("coded", lab.ahead(strong, CODED))
    lab.say(
        f"The dense net has {arms[DENSE].shown} %. With {STRONG:.0%} of the weights VTrans has {arms[strong].shown} %, "
        f"with masks alone {arms[FASTER].shown} %, and structured magnitude {arms[at(PLAIN, STRONG)].shown} %. "
        f"Quantization alone has {arms[CODED].shown} % in the same bytes."
    )
    factors = " and ".join(f"{lab.choices[weight_of(share)].value:g}" for share in (MILD, STRONG))
    lab.say(
        f"Structured magnitude counts that of columns times {factors} ({MILD:.0%} and {STRONG:.0%} left), as chosen on "
        "development data."
    )


def compare(lab: Lab, split: Split, seed: int) -> None:
    """All arms of one seed, from the same trained net."""
    before, steps = (10, 10) if lab.quick else (BASE, STEPS)
    test, development = in_batches(split.test, 500), in_batches(split.development, 500)

    def trained(
        arm: str | None, model: nn.Module, steps: int, done: int = 0, part: float = 1.0, **how: Any
    ) -> nn.Module:
        count = max(64, round(part * len(split.train[0])))
        batches = shuffled(split.train[0][:count], split.train[1][:count], size=64, seed=10 * seed + bool(done))
        return lab.train(model, batches, cross_entropy, steps=steps, seed=seed, arm=arm, before=done, **how)

    def add(arm: str, model: nn.Module, **also: float) -> int:
        stored = lab.stored(model)
        lab.add(arm, 100 * accuracy(stored.load(copy.deepcopy(model)), test), stored, **also)
        return stored.bytes

    begun = trained(None, vision_transformer(lab, split, seed), before, lr=2e-3)
    units = Structured((HEAD, NEURON, COLUMN)).units(begun)
    rest = [part for part in units if part.kind != COLUMN]
    dense = trained(DENSE, copy.deepcopy(begun), steps, before)
    add(DENSE, dense)

    def masked(arm: str | None, share: float, parts: list[Units] = units, **how: Any) -> tuple[nn.Module, float]:
        """The cut net, and the share of weights that the masks themselves left."""
        some = how.pop("part", 1.0)
        regimen = VTrans(parts, share, tuned=TUNED, rate=1.0 if lab.quick else 0.1, **how)
        model = trained(arm, copy.deepcopy(begun), steps, before, some, regimen=regimen)
        return without(model, parts, regimen.hand_over(model).kept), regimen.found

    sizes, size = UnitSizes(begun, units), 0
    for share in (MILD, STRONG):
        model, found = masked(at(OURS, share), share)
        size = add(at(OURS, share), model, **{MISS: 100 * abs(found / share - 1), FOUND: 100 * found})

        def thin(factor: float, arm: str | None = None, share: float = share) -> nn.Module:
            cut = without(begun, units, by_magnitude(begun, units, sizes, share, factor))
            return trained(arm, cut, steps, before)

        factor = lab.choose(weight_of(share), lambda factor: accuracy(thin(factor), development), FACTORS)
        add(at(PLAIN, share), thin(factor, at(PLAIN, share)))
    add(WHOLE, masked(WHOLE, STRONG, rest)[0])
    add(FASTER, masked(FASTER, STRONG, only_masks=True)[0])
    add(FAST, masked(FAST, STRONG, part=FEW)[0])
    coded = lab.quantization_alone(dense, size)
    lab.add(CODED, 100 * accuracy(coded.load(dense), test), coded)


def at(arm: str, share: float) -> str:
    """The name of an arm with so much left."""
    return f"{arm}, {share:.0%} left"


def weight_of(share: float) -> str:
    """The name of what weighs the magnitudes of columns."""
    return f"weight of columns, {share:.0%} left"


def vision_transformer(lab: Lab, split: Split, seed: int) -> nn.Module:
    """A ViT of 3 layers and 96 columns, for images in 16 patches."""
    library: Any = require_transformers()
    side, width = split.train[0].shape[-1], 64 if lab.quick else 96
    config = library.ViTConfig(
        image_size=side, patch_size=side // 4, num_channels=1, num_labels=split.classes, hidden_size=width,
        num_hidden_layers=2 if lab.quick else 3, num_attention_heads=width // 16, intermediate_size=4 * width,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return library.ViTForImageClassification(config)


def by_magnitude(
    model: nn.Module, units: list[Units], sizes: UnitSizes, share: float, factor: float
) -> dict[str, torch.Tensor]:
    """The units of largest magnitude that are within the share.

    Each place's magnitudes are divided by their mean; those of columns count times a factor.
    """
    scores = WeightMagnitude().scores(model, units, None)
    scores = {p.name: scores[p.name] / scores[p.name].mean() * (factor if p.kind == COLUMN else 1) for p in units}
    low, high = 0.0, 1.0 - len(units) / sum(part.count for part in units)
    for _ in range(30):
        middle = (low + high) / 2
        kept = best_across(scores, middle)
        left = float(sizes.left({name: mask.float() for name, mask in kept.items()})) / sizes.total
        low, high = (low, middle) if left <= share else (middle, high)
    return best_across(scores, high)
