"""The residual networks of studies, and batches of images to train and measure them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Batches = Callable[[int], Iterable[Any]]


def shuffled(*tensors: Tensor, size: int, seed: int = 0) -> Batches:
    """Shuffled batches of an epoch, drawn from the seed and the epoch's number; the last one is left out."""

    def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        order = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for start in range(0, len(order) - size + 1, size):
            which = order[start : start + size]
            yield tuple(tensor[which] for tensor in tensors)

    return batches


def augmented(x: Tensor, y: Tensor, *, size: int = 128, seed: int = 0) -> Batches:
    """Shuffled batches of images, each mirrored or not, and shifted by up to two pixels.

    The draws are those of :func:`shuffled`, so they are the same on every device; the images stay where ``x`` is.
    """
    height, width = x.shape[-2:]
    most = 2

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        draws = torch.Generator().manual_seed(1000 * seed + epoch + 1)
        down, right = torch.randint(2 * most + 1, (2, len(x), 1), generator=draws)
        mirrored = torch.rand(len(x), 1, generator=draws) < 0.5
        rows = (down + torch.arange(height)).to(x.device)
        columns = (right + torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width))).to(x.device)
        for (which,) in shuffled(torch.arange(len(x)), size=size, seed=seed)(epoch):
            which = which.to(x.device)
            wide = functional.pad(x[which], (most,) * 4)
            one = torch.arange(size, device=x.device)[:, None, None]
            part = wide[one, :, rows[which][:, :, None], columns[which][:, None, :]]
            yield part.permute(0, 3, 1, 2).contiguous(), y[which]

    return batches


def in_batches(pair: tuple[Tensor, Tensor], size: int = 250) -> list[tuple[Tensor, Tensor]]:
    """All examples in order, for measuring."""
    return list(zip(pair[0].split(size), pair[1].split(size), strict=True))


class ResNet(nn.Module):
    """The residual network of CIFAR-10 (He et al., 2016) with ``6 n + 2`` layers of 16, 32 and 64 channels.

    Parameters
    ----------
    blocks
        ``n``: 1 for ResNet-8, 2 for ResNet-14, 3 for ResNet-20.
    channels
        Of the images: 1 or 3.
    """

    def __init__(self, blocks: int = 1, classes: int = 10, width: int = 16, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        layers: list[nn.Module] = []
        inputs = width
        for stage in range(3):
            for block in range(blocks):
                layers.append(_Residual(inputs, width << stage, 2 if stage and not block else 1))
                inputs = width << stage
        self.blocks, self.head = nn.Sequential(*layers), nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, channels, H, W) to logits (N, classes)."""
        return self.head(self.blocks(functional.relu(self.stem(x))).mean((2, 3)))


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(functional.relu(self.norm1(self.first(x)))))
        # The shortcut without parameters: every other pixel, and channels of zeros.
        short = functional.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        return functional.relu(y + short)


def momentum(lr: float, decay: float = 5e-4) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Stochastic gradient descent with Nesterov momentum, the standard for convolutional nets."""
    return lambda model: torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=decay, nesterov=True)
