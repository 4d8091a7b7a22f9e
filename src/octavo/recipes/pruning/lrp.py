"""Pruning by explaining: filters of least relevance go, with ten images of each class and no fine-tuning."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from octavo.cuts import Slice, Units, without
from octavo.cuts.choosing import best_across
from octavo.cuts.propagation import propagated
from octavo.cuts.readers import readers_of
from octavo.cuts.scores.relevance import Relevance
from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.bases import classifier, images
from octavo.recipes.frame.data import CIFAR10, FASHION
from octavo.recipes.frame.nets import in_batches, momentum, shuffled
from octavo.training import accuracy, cross_entropy

#: Classes of the small task, images of each that criteria see, and the share of filters that goes in one step.
CLASSES, EACH, STEP = 3, 10, 0.05
#: Shares of filters at which nets are measured, and the one after which they are fine-tuned, with so many steps.
SHARES, SHARE, TUNED = (0.2, 0.3, 0.4, 0.5, 0.6), 0.5, 60
OURS, WEIGHT, GRADIENT, TAYLOR, RANDOM = "relevance", "weights", "gradients", "Taylor expansion", "at random"
DENSE, RAW, FINE, CLOTHES = "dense", ", layers as they are", ", fine-tuned", ", Fashion-MNIST"
ARRIVED = "share of relevance that arrives"
#: A model, its units and images with labels to the worth of every unit.
Criterion = Callable[[nn.Module, list[Units], tuple[Tensor, Tensor]], dict[str, Tensor]]


@Study(
    "lrp",
    system="Pruning by Explaining",
    source="Yeom et al. (2021), arXiv 1912.08881; its authors mark the method as patent pending",
    metric="test accuracy (%), mean over the shares of inner filters removed",
    higher=True,
    data=f"{CIFAR10}; {FASHION}",
    claims={
        "weights": "Without fine-tuning and with scarce data, better than weight norms",
        "gradients": "Without fine-tuning and with scarce data, better than gradients",
        "taylor": "Without fine-tuning and with scarce data, better than Taylor expansion",
        "tuned": "With fine-tuning, as good as Taylor expansion (within 1 point)",
    },
    extras={
        "random": "Better than filters removed at random",
        "raw": "Better than Taylor expansion if layers are not normalized",
        "fashion": "On Fashion-MNIST, better than Taylor expansion, too",
    },
)
def run(lab: Lab) -> None:
    """Nets of ten classes, cut for three of them: filters inside of residual blocks go in steps of 5%."""
    for seed in lab.each_seed():
        lab.step(f"seed {seed}")
        compare(lab, seed, "cifar10", "")
        compare(lab, seed, "fashion", CLOTHES)
    arms = lab.arms
    small, clothes = gates(lab, ""), gates(lab, CLOTHES)
    for key, rival in (("weights", WEIGHT), ("gradients", GRADIENT), ("taylor", TAYLOR), ("random", RANDOM)):
        lab.judge(key, lab.ahead(OURS, rival), needs=small)
    lab.judge("tuned", lab.ahead(OURS + FINE, TAYLOR + FINE, -1.0), needs=small)
    lab.judge("raw", lab.ahead(OURS + RAW, TAYLOR + RAW), needs=small)
    lab.judge("fashion", lab.ahead(OURS + CLOTHES, TAYLOR + CLOTHES), needs=clothes)
    lab.say(
        f"The dense net has {arms[DENSE].shown} %. With 20 to 60% of the filters inside of blocks gone, the net has "
        f"{arms[OURS].shown} % by relevance, {arms[TAYLOR].shown} % by Taylor expansion, and {arms[RANDOM].shown} % at "
        "random. Filters that blocks add to the residual stream stay."
    )


def gates(lab: Lab, mark: str) -> list[str]:
    """Gates of one data set; returns their texts."""
    dense, chance, ours = (lab.arms[name + mark] for name in (DENSE, RANDOM, OURS))
    found = {
        "the dense net is above 80%, three classes by chance 33%": gap("accuracy", dense.values, [80]),
        "filters at random do damage, over 5 points": gap("points lost", dense.values, chance.values, 5.0),
        "relevance is conserved: 90% arrive": gap("share less 0.9", ours.also[ARRIVED], [0.9]),
    }
    for text, one in found.items():
        lab.gate(text + mark, one)
    return [text + mark for text in found]


def compare(lab: Lab, seed: int, data: str, mark: str) -> None:
    """All criteria of one seed, on the same net, classes and images."""
    split, generator = images(lab, data), torch.Generator().manual_seed(seed)
    classes = torch.randperm(split.classes, generator=generator)[:CLASSES]
    train, test = (of_classes(part, classes) for part in (split.train, split.test))
    seen = torch.cat([(train[1] == k).nonzero()[:EACH, 0] for k in range(CLASSES)])
    few = train[0][seen], train[1][seen]
    model: Any = copy.deepcopy(classifier(lab, seed, data))
    head = nn.Linear(model.head.in_features, CLASSES)
    head.weight.data, head.bias.data = model.head.weight.data[classes], model.head.bias.data[classes]
    model.head = head

    def right(net: nn.Module) -> float:
        return 100 * accuracy(lab.stored(net).load(copy.deepcopy(net)), in_batches(test, 500))

    def add(arm: str, criterion: Criterion, normalize: bool, **also: float) -> nn.Module:
        lab.step(arm + mark)
        nets = cut_in_steps(model, criterion, few, normalize)
        values = [right(nets[share]) for share in SHARES]
        points = {f"at_{share:.0%}": value for share, value in zip(SHARES, values, strict=True)}
        lab.add(arm + mark, statistics.fmean(values), lab.stored(nets[SHARE]), **points, **also)
        return nets[SHARE]

    lab.add(DENSE + mark, right(model), lab.stored(model))
    ways: dict[str, Criterion] = {OURS: relevant, TAYLOR: expanded, RANDOM: drawn(seed)}
    if not mark:
        ways |= {WEIGHT: heavy, GRADIENT: steep}
    arrived = propagated(model, [few]).arrived
    halves = {name: add(name, way, True, **({ARRIVED: arrived} if name == OURS else {})) for name, way in ways.items()}
    if not mark:
        for name in (OURS, TAYLOR):
            add(name + RAW, ways[name], False)
            batches = shuffled(*train, size=32, seed=seed)
            tuned = lab.train(
                halves[name], batches, cross_entropy, steps=4 if lab.quick else TUNED, seed=seed, arm=name + FINE,
                optimizer=momentum(0.01),
            )  # fmt: skip
            lab.add(name + FINE, right(tuned), lab.stored(tuned))


def of_classes(part: tuple[Tensor, Tensor], classes: Tensor) -> tuple[Tensor, Tensor]:
    """The examples of some classes, numbered in that order."""
    which = (part[1][:, None] == classes).any(1)
    return part[0][which], (part[1][which][:, None] == classes).int().argmax(1)


def cut_in_steps(
    model: nn.Module, criterion: Criterion, few: tuple[Tensor, Tensor], normalize: bool
) -> dict[float, nn.Module]:
    """Nets without :data:`SHARES` of their inner filters; what is left is scored again before every step."""
    nets, net, total = {}, model, sum(part.count for part in block_units(model))
    for step in range(1, round(max(SHARES) / STEP) + 1):
        units = block_units(net)
        scores = criterion(net, units, few)
        if normalize:
            scores = {name: values / values.sum().clamp_min(1e-30) for name, values in scores.items()}
        left = total - round(step * STEP * total)
        net = without(net, units, best_across(scores, 1 - left / sum(part.count for part in units)))
        nets[round(step * STEP, 2)] = net
    return nets


def block_units(model: nn.Module) -> list[Units]:
    """The filters inside of each residual block, which only its own second convolution reads."""
    own, units = model.state_dict(), []
    for name in (name for name, _ in model.named_modules() if name.endswith(".first")):
        block, count = name.removesuffix("first"), len(own[f"{name}.weight"])
        places = torch.arange(count)[:, None]
        rows = [key for key, tensor in own.items() if key.startswith((name, f"{block}norm1")) and tensor.ndim]
        slices = [*(Slice(key, 0, places) for key in rows), Slice(f"{block}second.weight", 1, places)]
        units.append(Units(name, "channel", count, tuple(slices)))
    return units


def relevant(net: nn.Module, units: list[Units], few: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Relevance of the true classes at a filter's outputs."""
    return Relevance(normalize=False).scores(net, units, propagated(net, [few]))


def heavy(net: nn.Module, units: list[Units], few: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The sum of magnitudes of a filter's weights."""
    return {part.name: net.get_parameter(f"{part.name}.weight").detach().abs().flatten(1).sum(1) for part in units}


def steep(net: nn.Module, units: list[Units], few: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The mean magnitude of the loss's gradient at a filter's activations."""
    return {name: slope.abs().mean((0, 2, 3)) for name, (_, slope) in activations(net, units, few).items()}


def expanded(net: nn.Module, units: list[Units], few: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The first-order change of the loss without a filter: of each image, the mean over positions (Molchanov, 2017)."""
    found = activations(net, units, few)
    return {name: (flow * slope).mean((2, 3)).abs().mean(0) for name, (flow, slope) in found.items()}


def drawn(seed: int) -> Criterion:
    """Numbers by chance."""
    generator = torch.Generator().manual_seed(seed)
    return lambda net, units, few: {part.name: torch.rand(part.count, generator=generator) for part in units}


def activations(net: nn.Module, units: list[Units], few: tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """What is read of every filter, (images, filters, H, W), and the gradient of the loss there."""
    seen: dict[str, Tensor] = {}
    hooks = [
        reader.module.register_forward_pre_hook(lambda module, given, name=part.name: seen.update({name: given[0]}))
        for part in units
        for reader in readers_of(net, part)
    ]
    loss = cross_entropy(net.eval(), few)
    for hook in hooks:
        hook.remove()
    slopes = torch.autograd.grad(loss, list(seen.values()))
    return {name: (flow.detach(), slope) for (name, flow), slope in zip(seen.items(), slopes, strict=True)}
