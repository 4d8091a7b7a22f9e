"""The YOLOv8 pipeline on a small detector: sparsity training, channel pruning by scale, channel-wise distillation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from octavo.cuts import Units, best, saved, without
from octavo.cuts.carrying import by_norms, carry
from octavo.cuts.channels import channel_units
from octavo.methods.prune.thresholds import above
from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.data import CIFAR10, FASHION, cifar10, fashion
from octavo.recipes.frame.nets import shuffled
from octavo.recipes.testbeds.costs import milliseconds
from octavo.recipes.testbeds.scenes import Locator, average_precision, heat, scenes
from octavo.training.losses import LossFunction
from octavo.training.regimens.slimming import Slimming, scales, without_decay
from octavo.training.teaching import Channels, HiddenStates, Lesson, Term

#: Channels of the first layer; training and test scenes; steps before a cut, and after it.
WIDTH, TRAIN, TEST, STEPS, TUNED = 12, 8_000, 1_000, 600, 240
#: Share of the parameters that goes, and share of its channels that each layer keeps.
REMOVED, FLOOR = 0.7, 0.1
RATES, PRESSURES, WEIGHTS = (0.01, 0.03, 0.1), (0.01, 0.03, 0.1), (0.3, 1.0, 3.0)
DENSE, THIN, FILTERS, OURS = "dense", "thinner net", "filters of small L1 norm", "by scale, channel-wise distillation"
PLAIN, KNOWN, CUT, CARRIED = (
    "by scale, labels",
    "by scale, distilled logits",
    "by scale, untrained",
    "by scale, carried",
)
TIME, SMALL = "milliseconds of a batch", "scales near zero (%)"


@Study(
    "yolo",
    system="Pruning and distillation of YOLOv8 for drones",
    source="Channel pruning and distillation of YOLOv8 (2025); Slimming: Liu et al. (2017); CWD: Shu et al. (2021)",
    metric="mean average precision (%)",
    higher=True,
    data=f"garments on photographs: {FASHION}; {CIFAR10}",
    claims={
        "apart": "Sparsity training pushes scales apart: 20 points more near zero",
        "kept": "With 70% fewer parameters precision falls by at most 2.7 points",
        "taught": "Channel-wise distillation beats fine-tuning on labels",
        "faster": "The pruned net runs over 1.5 times faster",
    },
    extras={
        "logits": "Channel-wise distillation beats distillation of logits",
        "filters": "Cut by scale it beats filters cut by L1 norm",
        "carry": "Biases carried over save precision before fine-tuning",
        "thin": "It beats a thinner net trained for as long",
    },
)
def run(lab: Lab) -> None:
    """A small net with a neck, like a detector's: no package has the labelled photographs that a real one needs."""
    parts = scenes(fashion(lab), cifar10(lab), *((64, 32) if lab.quick else (TRAIN, TEST)))
    test, development = ([*zip(*(half.split(100) for half in part), strict=True)]
                         for part in (parts.test, parts.development))  # fmt: skip
    steps, tuned, classes = *((4, 2) if lab.quick else (STEPS, TUNED)), int(parts.train[1].max()) + 1
    precision = lambda model: average_precision(model, development)  # noqa: E731

    def net(width: int, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Locator(width, classes)

    def trained(
        model: nn.Module, seed: int, steps: int, lr: float, loss: LossFunction = heat, **options: Any
    ) -> nn.Module:
        batches = shuffled(*parts.train, size=32, seed=seed)
        return lab.train(model, batches, loss, steps=steps, seed=seed, optimizer=without_decay(lr), **options)

    def sparse(seed: int, steps: int, pressure: float) -> nn.Module:
        return trained(net(WIDTH, seed), seed, steps, rate, regimen=Slimming(pressure))

    def short(lr: float) -> float:
        return precision(trained(net(WIDTH, lab.first_seed), lab.first_seed, steps // 3, lr))

    def pressed(pressure: float) -> float:
        model = sparse(lab.first_seed, steps, pressure)
        return precision(cut(model, by_scale, parts.train[0][:256], carried=True))

    rate = lab.choose("rate", short, RATES)
    pressure = lab.choose("weight of the scales", pressed, PRESSURES)
    for seed in lab.seeds:
        lab.step(f"seed {seed}")
        plain, slim = trained(net(WIDTH, seed), seed, steps, rate), sparse(seed, steps, pressure)
        dense = trained(copy.deepcopy(plain), seed, tuned, rate / 3, arm=DENSE, before=steps)
        teacher, images = copy.deepcopy(dense).to(lab.device), parts.train[0][:256]
        bare, smaller = (cut(slim, by_scale, images, carried=carried) for carried in (False, True))
        filters = cut(plain, by_filters, images, carried=True)

        def fine(
            arm: str | None, start: nn.Module, *terms: Term, seed: int = seed, teacher: nn.Module = teacher
        ) -> nn.Module:
            loss = Lesson(teacher, terms, heat) if terms else heat
            model, first = copy.deepcopy(start), tuple(half[:8] for half in parts.train)
            with loss.maps(model, first) if isinstance(loss, Lesson) else nullcontext():
                return trained(model, seed, tuned, rate / 3, loss, arm=arm, before=steps)

        def weighed(arm: str, term: Callable[[float], Term], start: nn.Module = smaller) -> nn.Module:
            weight = lab.choose(f"weight, {arm}", lambda weight: precision(fine(None, start, term(weight))), WEIGHTS)
            return fine(arm, start, term(weight))

        models = {
            DENSE: dense,
            CUT: bare,
            CARRIED: smaller,
            FILTERS: fine(FILTERS, filters),
            PLAIN: fine(PLAIN, smaller),
            KNOWN: weighed(KNOWN, lambda weight: HiddenStates({"head": "head"}, weight=weight)),
            OURS: weighed(OURS, lambda weight: Channels({"neck": "neck", "head": "head"}, weight=weight)),
        }
        stored = {arm: lab.stored(model) for arm, model in models.items()}
        width = lab.thinner(partial(net, seed=seed), stored[OURS].bytes, range(2, WIDTH + 1))
        models[THIN] = trained(net(width, seed), seed, steps + tuned, rate, arm=THIN)
        stored[THIN] = lab.stored(models[THIN])
        with torch.inference_mode():
            calls = {arm: partial(models[arm].eval(), test[0][0]) for arm in (DENSE, OURS)}
            times = milliseconds(calls, 1 if lab.quick else 9)
        near = {DENSE: near_zero(plain), OURS: near_zero(slim)}
        for arm, model in models.items():
            also = {TIME: times[arm], SMALL: near[arm]} if arm in near else {}
            lab.add(arm, average_precision(stored[arm].load(model), test), stored[arm], **also)
    arms = lab.arms
    lab.gate("the dense net is above 60%", gap("precision", arms[DENSE].values, [60]))
    lab.gate("a thinner net is worse, by over 1 point", lab.ahead(DENSE, THIN, 1.0))
    lab.gate("the cut alone does damage, more than 1 point", lab.ahead(DENSE, CUT, 1.0))
    lab.judge("apart", lab.ahead(OURS, DENSE, 20.0, of=SMALL, higher=True), needs=())
    lab.judge("kept", lab.ahead(OURS, DENSE, -2.7))
    lab.judge("taught", lab.ahead(OURS, PLAIN))
    slow, fast = (arms[arm].also[TIME] for arm in (DENSE, OURS))
    lab.judge(
        "faster", gap("time of the dense net / 1.5 over that of the pruned", [t / 1.5 for t in slow], fast), needs=()
    )
    for key, ours, rival in (
        ("logits", OURS, KNOWN),
        ("filters", PLAIN, FILTERS),
        ("carry", CARRIED, CUT),
        ("thin", OURS, THIN),
    ):
        lab.judge(key, lab.ahead(ours, rival))
    lab.say("Precisions: " + "; ".join(f"{arm} {found.shown}" for arm, found in arms.items()) + ".")


def cut(model: nn.Module, choose: Callable[..., dict[str, Tensor]], images: Tensor, *, carried: bool) -> nn.Module:
    """The model without so many channels that the share :data:`REMOVED` of its parameters is gone."""
    units = channel_units(model, images[:2])
    whole = sum(parameter.numel() for parameter in model.parameters())
    low, high = 0.0, 1.0
    for _ in range(12):
        share = (low + high) / 2
        kept = choose(model, units, share)
        low, high = (share, high) if saved(model, units, kept) < REMOVED * whole else (low, share)
    kept = choose(model, units, high - 1e-9)
    return without(carry(model, units, kept, images.split(64)) if carried else model, units, kept)


def by_scale(model: nn.Module, units: Sequence[Units], share: float) -> dict[str, Tensor]:
    """The channels of largest scale in all layers together."""
    return by_norms(units, above({name: scale.abs() for name, scale in scales(model).items()}, share, FLOOR))


def by_filters(model: nn.Module, units: Sequence[Units], share: float) -> dict[str, Tensor]:
    """The filters of largest L1 norm in every layer."""
    own = model.state_dict()
    first = {part.name: next(s for s in part.slices if s.dim == 0 and own[s.tensor].ndim == 4) for part in units}
    return best({name: own[piece.tensor].abs().flatten(1).sum(1) for name, piece in first.items()}, share)


def near_zero(model: nn.Module) -> float:
    """Percent of the scales that are under a twentieth of the largest of their layer."""
    found = torch.cat([scale.detach().abs() / scale.detach().abs().max() for scale in scales(model).values()])
    return 100 * float((found < 0.05).float().mean())
