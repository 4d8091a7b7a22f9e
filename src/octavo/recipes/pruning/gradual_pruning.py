"""Gradual magnitude pruning: a large sparse net against small dense ones, at equal non-zeros and at equal bytes."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from octavo.forms import Form, Sparse
from octavo.recipes.frame import Lab, Study, gap, quantized
from octavo.recipes.frame.data import CIFAR10, Split, cifar10
from octavo.recipes.frame.nets import ResNet, augmented, in_batches, momentum
from octavo.training import accuracy, cross_entropy
from octavo.training.masks import WeightMasks
from octavo.training.regimens.gradual_pruning import SOURCE, GradualPruning

#: Widths of the dense nets by the words of the claims; the sparse nets are of the whole width.
WIDTH, SMALL = 16, {"half": 8, "quarter": 4}
#: Steps of every arm; those of fine-tuning, where all is pruned at once; bits of quantized survivors.
STEPS, TUNED, BITS = 600, 180, 5.0
#: Rates of fine-tuning.
RATES = (0.01, 0.03, 0.1)

DENSE, LINEAR, CODED, MIXED = "dense", "linear classifier", "quantization alone", "sparse, survivors quantized"
ONCE, ACROSS = "pruned at once, fine-tuned", "one ranking for all layers"


@Study(
    "gradual-pruning",
    system="Gradual magnitude pruning",
    source=SOURCE,
    metric="test accuracy (%)",
    higher=True,
    data=CIFAR10,
    coarse=True,
    claims={
        "half": "Sparse beats a dense net of half the width, equal non-zeros",
        "quarter": "Sparse beats a dense net of a quarter, equal non-zeros",
        "little": "A net with three quarters masked loses at most 2 points",
    },
    extras={
        "half bytes": "Sparse beats a dense net of half the width, equal bytes",
        "quarter bytes": "Sparse beats a dense net of a quarter, equal bytes",
        "gradual": "Gradually masked, it beats one pruned at once and fine-tuned",
        "across": "One ranking for all layers beats equal shares",
        "quantized": "Survivors quantized, it beats quantization alone, equal bytes",
    },
)
def run(lab: Lab) -> None:
    """A ResNet-8 on CIFAR-10; bytes count masks and 16 bits per survivor."""
    for seed in lab.each_seed():
        lab.step(f"seed {seed}")
        compare(lab, cifar10(lab), seed)
    arms = lab.arms
    lab.gate("the dense net beats a linear classifier by over 10 points", lab.ahead(DENSE, LINEAR, 10.0))
    lab.gate("there is room: half the width loses over 2 points", lab.ahead(DENSE, dense_of("half"), 2.0))
    left = arms[sparse_of("half")].also["non-zeros"]
    lab.gate("at most 30% of the weights are left", gap("30% less the share", [0.3], [left[0] / left_of(WIDTH)]))
    for key in SMALL:
        lab.judge(key, lab.ahead(sparse_of(key), dense_of(key)))
        lab.judge(f"{key} bytes", lab.ahead(sparse_of(key, "bytes"), dense_of(key)))
    lab.judge("little", lab.ahead(sparse_of("half"), DENSE, -2.0))
    lab.judge("gradual", lab.ahead(sparse_of("quarter"), ONCE))
    lab.judge("across", lab.ahead(ACROSS, sparse_of("quarter")))
    lab.judge("quantized", lab.ahead(MIXED, CODED))
    shown = ", ".join(f"{name} {arms[name].shown} %" for name in (sparse_of("quarter", "bytes"), dense_of("quarter")))
    lab.say(
        f"In {arms[dense_of('quarter')].bytes:,} bytes: {shown}. A mask takes up to a bit per weight, so equal bytes "
        f"leave fewer survivors than equal non-zeros. In {arms[MIXED].bytes:,} bytes: {MIXED} {arms[MIXED].shown} %, "
        f"{CODED} {arms[CODED].shown} %."
    )


def dense_of(key: str) -> str:
    """The name of a small dense net."""
    return f"dense, {key} the width"


def sparse_of(key: str, equal: str = "non-zeros") -> str:
    """The name of the sparse net as large as a small dense one."""
    return f"sparse, {equal} of {key} the width"


def left_of(width: int) -> int:
    """Weights of the layers of a ResNet-8 of that width."""
    return sum(weight.numel() for weight in ResNet(1, width=width).parameters() if weight.ndim > 1)


def compare(lab: Lab, split: Split, seed: int) -> None:
    """All arms of one seed, from the same start and on the same batches."""
    steps, tuned = (10, 3) if lab.quick else (STEPS, TUNED)
    test, development = in_batches(split.test), in_batches(split.development)

    def net(width: int = WIDTH) -> nn.Module:
        torch.manual_seed(seed)
        return ResNet(1, split.classes, width, split.train[0].shape[1])

    def trained(
        arm: str | None,
        model: nn.Module,
        steps: int,
        regimen: GradualPruning | None = None,
        lr: float = 0.1,
        before: int = 0,
    ) -> tuple[nn.Module, Mapping[str, Form]]:
        batches, optimizer = augmented(*split.train, size=64, seed=seed), momentum(lr)
        made = lab.train(
            model, batches, cross_entropy, steps=steps, seed=seed, arm=arm, before=before, optimizer=optimizer,
            regimen=regimen,
        )  # fmt: skip
        return made, {} if regimen is None else regimen.forms(made)

    def masked(density: float) -> dict[str, Form]:
        """Forms of random masks, which take the bytes of those that are learned."""
        whole = WeightMasks(net())
        whole.scatter(density, torch.Generator().manual_seed(seed))
        return whole.forms(net())

    dense = trained(DENSE, net(), steps)
    pixels = nn.Sequential(nn.Flatten(), nn.Linear(split.train[0][0].numel(), split.classes))
    kept = {DENSE: dense, LINEAR: trained(LINEAR, pixels, steps, lr=1e-3)}
    begun, _ = trained(None, net(), steps - tuned)
    for key, width in SMALL.items():
        kept[dense_of(key)] = trained(dense_of(key), net(width), steps)
        share = left_of(width) / left_of(WIDTH)
        size = lab.stored(net(width)).bytes
        of_bytes = lab.fit(lambda density: lab.stored(net(), masked(density)), size, 0.0, 1.0)[0]
        for equal, density in (("non-zeros", share), ("bytes", of_bytes)):
            arm = sparse_of(key, equal)
            kept[arm] = trained(arm, net(), steps, GradualPruning(1 - density))
    last = 1 - left_of(SMALL["quarter"]) / left_of(WIDTH)
    kept[ACROSS] = trained(ACROSS, net(), steps, GradualPruning(last, across=True))

    def at_once(arm: str | None, lr: float) -> tuple[nn.Module, Mapping[str, Form]]:
        regimen = GradualPruning(last, start=0.0, end=0.0)
        return trained(arm, copy.deepcopy(begun), tuned, regimen, lr, before=steps - tuned)

    lr = lab.choose("rate of fine-tuning", lambda lr: accuracy(at_once(None, lr)[0], development), RATES)
    kept[ONCE] = at_once(ONCE, lr)
    sparse, forms = kept[sparse_of("half")]
    kept[MIXED] = sparse, {name: coded(form) for name, form in forms.items()}
    size = lab.stored(*kept[MIXED]).bytes
    alone = lab.quantization_alone(dense[0], size)
    lab.add(CODED, 100 * accuracy(alone.load(copy.deepcopy(dense[0])), test), alone, **{"non-zeros": left_of(WIDTH)})
    for name, (model, left) in kept.items():
        stored = lab.stored(model, left)
        count = sum(int(weight.count_nonzero()) for weight in model.parameters() if weight.ndim > 1)
        lab.add(name, 100 * accuracy(stored.load(model), test), stored, **{"non-zeros": count})


def coded(form: Form) -> Form:
    """A sparse form whose survivors are quantized; those that become zero leave the mask."""
    assert isinstance(form, Sparse)
    return quantized(form, BITS)
