"""Scenes: garments on crops of photographs, and a small net with batch normalization that locates them.

What the net predicts is dense, as a detector's heat map is: the class of the garment whose middle lies in a cell.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.recipes.frame.data import Parts, Split, digest

#: Pixels of a scene and of a garment, garments of a scene, and pixels of a cell.
SIDE, GARMENT, COUNT, CELL = 48, 16, 4, 4
#: A garment is found if the peak of its class is at most so many cells away, in both directions.
NEAR = 1
Scenes = tuple[Tensor, Tensor]


def scenes(garments: Split, photos: Split, train: int, test: int) -> Parts[Scenes]:
    """Scenes (N, 1, side, side) and the class of the garment in the middle of each cell (N, cells, cells), or -1.

    Training scenes are made of training images, test scenes of test images, and those for choices of images for
    choices.

    Parameters
    ----------
    garments, photos
        Images of one channel, whose classes are to be found, and of any, that are the background.
    train, test
        How many scenes; an eighth of the training scenes more are for choices.
    """

    def made(part: tuple[Tensor, Tensor], behind: Tensor, count: int, seed: int) -> Scenes:
        draws = torch.Generator().manual_seed(seed)
        images, labels = part
        small = functional.interpolate(images, size=(GARMENT, GARMENT), mode="area")
        small = (small - small.amin()) / (small.amax() - small.amin())
        which = torch.randint(len(behind), (count,), generator=draws)
        ground = behind[which].mean(1, keepdim=True)
        ground = functional.interpolate(ground, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        ground = 0.35 * (ground - ground.amin()) / (ground.amax() - ground.amin())
        truth = torch.full((count, SIDE // CELL, SIDE // CELL), -1)
        # A place for each of nine; so garments touch, but none hides another one's middle.
        for number in range(count):
            places = torch.randperm((SIDE // GARMENT) ** 2, generator=draws)[:COUNT].tolist()
            shown = torch.randint(len(small), (COUNT,), generator=draws).tolist()
            shifts = torch.randint(-4, 5, (COUNT, 2), generator=draws).tolist()
            for place, image, shift in zip(places, shown, shifts, strict=True):
                corner = [
                    min(max(GARMENT * at + by, 0), SIDE - GARMENT)
                    for at, by in zip(divmod(place, SIDE // GARMENT), shift, strict=True)
                ]
                y, x = corner
                window = ground[number, 0, y : y + GARMENT, x : x + GARMENT]
                window.copy_(torch.maximum(window, small[image, 0]))
                truth[number, (y + GARMENT // 2) // CELL, (x + GARMENT // 2) // CELL] = labels[image]
        return 4 * (ground - 0.25), truth

    pairs = ((garments.train, photos.train[0], train, 0), (garments.development, photos.development[0], train // 8, 1),
             (garments.test, photos.test[0], test, 2))  # fmt: skip
    parts = [made(part, behind, count, seed) for part, behind, count, seed in pairs]
    made_of = digest(f"{garments.digest} {photos.digest} {train} {test}".encode())
    return Parts(parts[0], parts[1], parts[2], made_of)


class Locator(nn.Module):
    """A convolutional net with a neck that joins two resolutions, and one heat map of logits for each class.

    Parameters
    ----------
    width
        Channels of the first layer; deeper ones have two and four times as many.
    """

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = _layer(1, width)
        self.fine = nn.Sequential(
            _layer(width, 2 * width, 2), _layer(2 * width, 2 * width), _layer(2 * width, 4 * width, 2)
        )
        self.middle = _layer(4 * width, 4 * width)
        self.coarse = nn.Sequential(_layer(4 * width, 4 * width, 2), _layer(4 * width, 4 * width))
        self.neck = _layer(8 * width, 4 * width)
        self.head = nn.Conv2d(4 * width, classes, 1)
        # Most cells are empty.
        nn.init.constant_(self.head.bias, -4.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Scenes (N, 1, side, side) to logits (N, classes, cells, cells)."""
        fine = self.middle(self.fine(self.stem(x)))
        coarse = functional.interpolate(self.coarse(fine), scale_factor=2.0)
        return self.head(self.neck(torch.cat([fine, coarse], 1)))


def _layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    norm = nn.BatchNorm2d(outputs)
    # As network slimming starts: scales have a shorter way to zero.
    nn.init.constant_(norm.weight, 0.5)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm, nn.ReLU())


def heat(module: nn.Module, batch: Scenes) -> Tensor:
    """Binary cross entropy of all cells and classes, summed, for each garment."""
    x, truth = batch
    logits = module(x)
    target = functional.one_hot(truth + 1, logits.shape[1] + 1)[..., 1:].permute(0, 3, 1, 2).to(logits)
    return functional.binary_cross_entropy_with_logits(logits, target, reduction="sum") / (truth >= 0).sum()


@torch.inference_mode()
def average_precision(module: nn.Module, batches: Sequence[Scenes]) -> float:
    """Mean over classes, in percent, of the area under precision by recall of the heat maps' peaks."""
    module.eval()
    scores: dict[int, list[tuple[float, bool]]] = {}
    there: dict[int, int] = {}
    for x, truth in batches:
        chances = module(x).sigmoid()
        peaks = (chances == functional.max_pool2d(chances, 3, 1, 1)) & (chances > 0.01)
        for number, own in enumerate(truth):
            found = sorted(
                ((float(chances[number, c, y, x]), c, y, x) for c, y, x in peaks[number].nonzero().tolist()),
                reverse=True,
            )
            left = {(y, x): int(own[y, x]) for y, x in (own >= 0).nonzero().tolist()}
            for label in left.values():
                there[label] = there.get(label, 0) + 1
            for score, label, y, x in found:
                near = [
                    at for at, known in left.items() if known == label and max(abs(at[0] - y), abs(at[1] - x)) <= NEAR
                ]
                if near:
                    del left[near[0]]
                scores.setdefault(label, []).append((score, bool(near)))
    return 100 * sum(_area(scores.get(label, []), count) for label, count in there.items()) / len(there)


def _area(found: list[tuple[float, bool]], count: int) -> float:
    """The area under precision, made to fall, by recall."""
    hits = torch.tensor([hit for _, hit in sorted(found, reverse=True)], dtype=torch.float64)
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    best = precision.flip(0).cummax(0).values.flip(0) if len(hits) else precision
    return float((best * hits).sum()) / count
