"""SGQ: a network split over a link, whose features and gradients are quantized in stripes of similar channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.data import FASHION, Split, fashion
from octavo.recipes.frame.nets import momentum, shuffled
from octavo.recipes.testbeds.federated import percent
from octavo.recipes.testbeds.stripes import Boundary, Plain, SplitNet, Stripes, Uniform
from octavo.training import cross_entropy

#: Channels that cross the link; steps of every arm; examples of a step.
CHANNELS, STEPS, BATCH = 16, 600, 64
#: Bits a second of the simulated link.
LINK = 4e6
DENSE, OURS, RANDOM, SCALAR = "float32", "stripes of similar channels", "stripes at random", "a codebook a channel"
EIGHT, FOUR, TWO, ONE = (f"uniform, {bits} bits" for bits in (8, 4, 2, 1))
UP, DOWN, TIME = "bytes up a step", "bytes down a step", "seconds of the link a step"
ARMS: dict[str, Callable[[], Boundary]] = {
    DENSE: Plain, EIGHT: lambda: Uniform(8), FOUR: lambda: Uniform(4), TWO: lambda: Uniform(2),
    ONE: lambda: Uniform(1), SCALAR: lambda: Stripes(bits=1, size=1), RANDOM: lambda: Stripes(similar=False),
    OURS: Stripes,
}  # fmt: skip


@Study(
    "sgq",
    system="SGQ, stripe-wise group quantization",
    source="NeurIPS 2022; rebuilt from its abstract",
    metric="test accuracy (%)",
    higher=True,
    data=FASHION,
    claims={
        "traffic": "Over 15 times less traffic than float32, within 1 point",
        "uniform": "Less traffic than uniform 4 bits, within 1 point of it",
    },
    extras={
        "similar": "Similar channels beat random groups (accuracy, no more bytes)",
        "scalar": "Stripes beat a codebook for each channel with two values",
        "one bit": "Stripes beat uniform quantization to one bit",
    },
)
def run(lab: Lab) -> None:
    """The device has the first convolution; four bits for four channels are one bit a value, before entropy coding."""
    split = fashion(lab)
    steps = 8 if lab.quick else STEPS
    for seed in lab.seeds:
        for arm, opened in ARMS.items():
            lab.step(f"seed {seed}: {arm}")
            net = split_net(split, opened, seed)
            batches = shuffled(*split.train, size=BATCH, seed=seed)
            lab.train(net, batches, cross_entropy, steps=steps, seed=seed, arm=arm, optimizer=momentum(0.02))
            up, down = net.up.bytes / steps, net.down.bytes / steps
            lab.add(
                arm, percent(net, split.test), round(up + down), **{UP: up, DOWN: down, TIME: 8 * (up + down) / LINK}
            )
    judge(lab)


def split_net(split: Split, opened: Callable[[], Boundary], seed: int) -> SplitNet:
    """A convolutional net, cut after its first layer."""
    torch.manual_seed(seed)
    device = nn.Sequential(nn.Conv2d(split.train[0].shape[1], CHANNELS, 5, 2, 2), nn.ReLU())
    server = nn.Sequential(
        nn.Conv2d(CHANNELS, 32, 5, 2, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(512, split.classes),
    )
    return SplitNet(device, server, opened)


def judge(lab: Lab) -> None:
    """All claims; traffic is that of both directions."""
    arms = lab.arms
    lab.gate("the net on float32 is above 75%", gap("accuracy", arms[DENSE].values, [75]))
    lab.gate("bits matter: one is over 1 point worse than float32", lab.ahead(DENSE, ONE, 1.0))
    ratio = arms[DENSE].bytes / arms[OURS].bytes
    lab.judge("traffic", lab.ahead(OURS, DENSE, -1.0), gap("ratio over 15", [ratio], [15]))
    less = [
        gap(f"{what} of uniform 4 bits over stripes", arms[FOUR].also[what], arms[OURS].also[what])
        for what in (UP, DOWN)
    ]
    lab.judge("uniform", lab.ahead(OURS, FOUR, -1.0), *less)
    lab.judge("similar", lab.ahead(OURS, RANDOM))
    lab.judge("scalar", lab.ahead(OURS, SCALAR))
    lab.judge("one bit", lab.ahead(OURS, ONE))
    lab.say(f"Stripes take {ratio:.1f} times fewer bytes than float32, codebooks and scales included.")
    lab.say("The source has no public code, and its text was not at hand: grouping and codebooks are our realization.")
