"""Processes that train one model together over loopback, and small nets for them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

#: A part of a program that every worker runs, with the folder that all share.
Job = Callable[[Path], None]


def together(job: Job, world: int, folder: Path) -> None:
    """Run a job in ``world`` new processes that form a gloo group; it is a function of a module.

    Raises
    ------
    torch.multiprocessing.ProcessRaisedException
        If it raises in one of them; the others are ended.
    """
    with tempfile.TemporaryDirectory(prefix="octavo-") as meeting:
        torch.multiprocessing.spawn(_joined, (world, f"file://{meeting}/store", job, folder), nprocs=world)


def _joined(rank: int, world: int, store: str, job: Job, folder: Path) -> None:
    # Workers share the cores of one machine.
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    try:
        job(folder)
    finally:
        dist.destroy_process_group()


def conv_net(
    image: Sequence[int], classes: int, widths: Sequence[int] = (8, 16), hidden: int = 0, stride: int = 2
) -> nn.Sequential:
    """A convolutional net of 5 x 5 kernels, and a linear head; without normalization, whose statistics nobody sends.

    Parameters
    ----------
    image
        Shape of an image: channels, height, width.
    hidden
        Units of a layer before the head; 0 for none.
    stride
        2 for fast convolutions; 1 has max pooling instead.
    """
    layers, inputs = list[nn.Module](), image[0]
    for width in widths:
        layers += [nn.Conv2d(inputs, width, 5, stride, 2), nn.ReLU(), *([nn.MaxPool2d(2)] if stride == 1 else [])]
        inputs = width
    with torch.no_grad():
        flat = nn.Sequential(*layers)(torch.zeros(1, *image)).numel()
    head: list[nn.Module] = [nn.Linear(flat, hidden), nn.ReLU()] if hidden else []
    return nn.Sequential(*layers, nn.Flatten(), *head, nn.Linear(hidden or flat, classes))


class SmallDecoder(nn.Module):
    """A decoder of two layers whose head is its embedding, untrained.

    Parameters
    ----------
    vocabulary, width
        Tokens, and elements of a token's vector.
    length
        The most tokens of a window.
    """

    def __init__(self, vocabulary: int, width: int = 64, length: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.place = nn.Parameter(torch.zeros(length, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // 32, 4 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (N, tokens) to logits (N, tokens, vocabulary)."""
        x = self.embedding(ids) + self.place[: ids.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        for layer in self.layers:
            x = layer(x, mask, is_causal=True)
        return functional.linear(self.norm(x), self.embedding.weight)


def nats_of(module: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """The mean cross entropy of the next token of windows ``(ids,)``."""
    (ids,) = batch
    return functional.cross_entropy(module(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
