"""CNNpack: kernels by their cosine coefficients, against the same pruning and coding of the kernels themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.calibration.evidence import Evidence
from octavo.forms import Dense, Form, Frequency, Sparse, Sum
from octavo.forms.frequency import to_frequency
from octavo.methods.quantize.cnnpack import CNNpack
from octavo.recipes.frame import Lab, Stored, Study, quantized
from octavo.recipes.frame.data import FASHION, Split, fashion
from octavo.recipes.frame.nets import ResNet, augmented, in_batches, momentum
from octavo.training import accuracy, cross_entropy, formed
from octavo.training.formed import settle

#: Steps of every arm, and those of fine-tuning among them; rates of fine-tuning.
STEPS, TUNED, RATES = 600, 150, (0.01, 0.03, 0.1)
#: Times that the files of all arms are smaller than float32, by the side of kernels: norms and labels of vectors, which
#: nobody prunes, take most of a smaller file of the ResNet. And bits of a survivor before fine-tuning.
RATIOS, BITS = {5: 20, 3: 8}, 4.0
WIDTH, CENTRES = 16, 16

DENSE, LINEAR, THINNER = "dense", "linear classifier", "thinner dense"
SPACE, COSINE, PACKED = "pruned in space", "pruned cosines", "CNNpack"
ENERGY = "energy of a quarter (%)"
CODED, STEPS_OF_COSINES = "quantization alone", "quantized cosines"


@Study(
    "cnnpack",
    system="CNNpack",
    source="CNNpack (Wang et al., 2016), NeurIPS 29",
    metric="test accuracy (%)",
    higher=True,
    data=FASHION,
    coarse=True,
    claims={
        "five": "CNNpack beats pruning in space, wide kernels, equal bytes",
        "accuracy": "20 times smaller, wide kernels lose at most a point",
    },
    extras={
        "three": "CNNpack beats pruning in space, narrow kernels, equal bytes",
        "centres": "Centres and residuals beat pruned cosines alone, wide kernels",
        "untrained": "Untrained, quantized cosines beat quantized wide kernels",
        "alone": "CNNpack beats quantization alone at equal bytes",
        "smaller": "CNNpack beats a thinner dense net at equal bytes",
    },
)
def run(lab: Lab) -> None:
    """A net with kernels of 5 x 5 and a ResNet-8 with 3 x 3; all trained arms have the same steps."""
    for seed in lab.each_seed():
        lab.step(f"seed {seed}")
        split = fashion(lab)
        for side in (5, 3):
            Comparison(lab, split, seed, side).all()
    rivals = {
        LINEAR: ("dense beats a linear classifier by 2 points", 2.0),
        THINNER: ("a thinner net loses a point", 1.0),
    }
    for side in (5, 3):
        for rival, (text, margin) in rivals.items():
            lab.gate(of(text, side), lab.ahead(of(DENSE, side), of(rival, side), margin))
    for key, side, ours, theirs, margin in (
        ("five", 5, PACKED, SPACE, 0.0),
        ("accuracy", 5, PACKED, DENSE, -1.0),
        ("three", 3, PACKED, SPACE, 0.0),
        ("centres", 5, PACKED, COSINE, 0.0),
        ("untrained", 5, STEPS_OF_COSINES, CODED, 0.0),
        ("alone", 5, PACKED, CODED, 0.0),
        ("smaller", 5, PACKED, THINNER, 0.0),
    ):
        lab.judge(
            key,
            lab.ahead(of(ours, side), of(theirs, side), margin),
            needs=[of(text, side) for text, _ in rivals.values()],
        )
    arms = lab.arms
    for side in (5, 3):
        energy = arms[of(COSINE, side)].also[ENERGY]
        inside = arms[of(SPACE, side)].also[ENERGY]
        lab.say(
            f"{side} x {side}: the largest quarter of the coefficients holds {sum(energy) / len(energy):.0f}% of the "
            f"energy, that of the weights {sum(inside) / len(inside):.0f}%."
        )


def of(name: str, side: int) -> str:
    """A name at a side of kernels."""
    return f"{name}, {side} x {side}"


class FiveByFive(nn.Module):
    """Three convolutions of 5 x 5, each normalized, and a linear head."""

    def __init__(self, channels: int, classes: int, width: int = WIDTH) -> None:
        super().__init__()
        sizes = (channels, width, 2 * width, 4 * width)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 5, padding=2, bias=False) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in sizes[1:])
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, channels, H, W) to logits (N, classes)."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = functional.max_pool2d(functional.relu(norm(layer(x))), 2)
        return self.head(x.mean((2, 3)))


@dataclass(frozen=True)
class OpenedLayer:
    """What is pruned of a weight, (rows, columns), and the form around what is left."""

    content: Tensor
    around: Callable[[Form], Form]


def opened(arm: str, weight: Tensor) -> OpenedLayer:
    """A convolution's weight in the domain of an arm."""
    matrix, block = weight.detach().flatten(1), (1, *weight.shape[2:])
    if arm == SPACE:
        return OpenedLayer(matrix, lambda form: form)
    coefficients = to_frequency(matrix, block)
    vectors = weight.shape[0] * weight.shape[1]
    if arm == COSINE or vectors < 16 * CENTRES:
        return OpenedLayer(coefficients, lambda form: Frequency(form, block))
    setting = {"step": float(coefficients.abs().max()), "threshold": 0.0, "centres": CENTRES}
    found = CNNpack(block=block).encode(matrix, setting, plain(len(matrix)))
    assert isinstance(found, Frequency) and isinstance(found.coefficients, Sum)
    base = found.coefficients.base
    return OpenedLayer(coefficients - base.dense(), lambda form: Frequency(Sum(base, form), block))


class Comparison:
    """All arms of one seed and one size of kernels."""

    def __init__(self, lab: Lab, split: Split, seed: int, side: int) -> None:
        self.lab, self.split, self.seed, self.side = lab, split, seed, side
        self.steps, self.tuned, self.width = (10, 3, 8) if lab.quick else (STEPS, TUNED, WIDTH)
        self.test, self.development = in_batches(split.test), in_batches(split.development)

    def net(self, width: int | None = None) -> nn.Module:
        """An untrained net."""
        width = width or self.width
        torch.manual_seed(self.seed)
        channels, classes = self.split.train[0].shape[1], self.split.classes
        return FiveByFive(channels, classes, width) if self.side == 5 else ResNet(1, classes, width, channels)

    def trained(self, model: nn.Module, arm: str | None, steps: int, lr: float = 0.1) -> nn.Module:
        """A model after its last steps."""
        return self.lab.train(
            model, augmented(*self.split.train, size=64, seed=self.seed), cross_entropy, steps=steps, seed=self.seed,
            arm=arm and of(arm, self.side), before=self.steps - steps, optimizer=momentum(lr),
        )  # fmt: skip

    def all(self) -> None:
        """Every arm."""
        lab = self.lab
        dense = self.trained(self.net(), DENSE, self.steps)
        begun = self.trained(self.net(), None, self.steps - self.tuned)
        size = sum(4 * weight.numel() for weight in dense.parameters()) // (3 if lab.quick else RATIOS[self.side])
        self.add(DENSE, dense, lab.stored(dense))
        pixels = nn.Sequential(nn.Flatten(), nn.Linear(self.split.train[0][0].numel(), self.split.classes))
        linear = self.trained(pixels, LINEAR, self.steps, 1e-3)
        self.add(LINEAR, linear, lab.stored(linear))
        width = lab.thinner(self.net, size, range(1, self.width + 1))
        thin = self.trained(self.net(width), THINNER, self.steps)
        self.add(THINNER, thin, lab.stored(thin))
        weights = {name: weight for name, weight in dense.named_parameters() if weight.ndim == 4}
        self.add(CODED, dense, lab.quantization_alone(dense, size, weights))
        self.add(
            STEPS_OF_COSINES, dense, lab.fit(lambda bits: lab.stored(dense, cosines(weights, bits)), size, 0.05, 16)[1]
        )
        for arm in (SPACE, COSINE, PACKED):
            self.pruned(arm, begun, size)

    def pruned(self, arm: str, begun: nn.Module, size: int) -> None:
        """Prune by magnitude in the arm's domain, train the survivors, and quantize them."""
        lab = self.lab
        parts = {n: opened(arm, weight) for n, weight in begun.named_parameters() if weight.ndim == 4}
        sizes = torch.cat([part.content.abs().flatten() for part in parts.values()]).sort(descending=True).values

        def forms(share: float) -> dict[str, Form]:
            least = float(sizes[min(round(share * len(sizes)), len(sizes) - 1)])
            return {name: part.around(survivors(part.content, least)) for name, part in parts.items()}

        share, _ = lab.fit(lambda share: lab.stored(begun, coded(forms(share), BITS)), size, 0.0, 1.0)

        def tuned(lr: float, name: str | None = None) -> tuple[nn.Module, Mapping[str, Form]]:
            model = copy.deepcopy(begun)
            formed(model, forms(share))
            self.trained(model, name, self.tuned, lr)
            return model, settle(model)

        lr = lab.choose(
            f"rate of {of(arm, self.side)}", lambda lr: accuracy(tuned(lr)[0], self.development), RATES
        )  # fmt: skip
        model, found = tuned(lr, arm)
        bits, stored = lab.fit(lambda bits: lab.stored(model, coded(found, bits)), size, 0.05, 16.0)
        quarter = float(sizes[: len(sizes) // 4].square().sum() / sizes.square().sum())
        also = {"share of survivors (%)": 100 * share, "bits of one": bits, ENERGY: 100 * quarter}
        self.add(arm, model, stored, **also)

    def add(self, arm: str, model: nn.Module, stored: Stored, **also: float) -> None:
        """Accuracy of what was read back."""
        read = stored.load(copy.deepcopy(model))
        self.lab.add(of(arm, self.side), 100 * accuracy(read, self.test), stored, **also)


def survivors(content: Tensor, least: float) -> Form:
    """The elements above a magnitude; the largest stays in any case."""
    mask = content.abs() > min(least, 0.999 * float(content.abs().max()))
    return Sparse(mask, Dense(content[mask][None]))


def coded(forms: Mapping[str, Form], bits: float) -> dict[str, Form]:
    """Forms whose survivors are quantized."""
    return {name: quantized(form, bits) for name, form in forms.items()}


def cosines(weights: Mapping[str, Tensor], bits: float) -> dict[str, Form]:
    """Kernels as quantized coefficients."""
    found: dict[str, Form] = {}
    for name, weight in weights.items():
        matrix, block = weight.detach().flatten(1), (1, *weight.shape[2:])
        found[name] = Frequency(quantized(Dense(to_frequency(matrix, block)), bits), block)
    return found


def plain(rows: int) -> Evidence:
    """No calibration: every row counts as much."""
    return Evidence(torch.ones(rows), None)
