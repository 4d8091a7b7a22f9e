"""Waves by finite differences, and simulators that learn them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Points of the grid in both directions, and steps of the finite differences from one snapshot to the next.
GRID, BETWEEN = 24, 6
#: Snapshots of a run; the first two are given, the others are to be predicted.
SNAPSHOTS = 12

#: Fields (runs, snapshots, grid, grid) and velocities (runs, grid, grid).
Waves = tuple[Tensor, Tensor]


def waves(runs: int, seed: int) -> Waves:
    """Fields of unit root mean square, and the velocities in which they move.

    ``u_tt = v(x, y)^2 (u_xx + u_yy)`` with ``u = 0`` at the edges, by central differences at a Courant number of up to
    1/2, from one to three round pulses at rest. Velocities are smooth, between 0.5 and 1.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(runs, 1, 5, 5, generator=generator)
    velocity = 0.5 + 0.5 * functional.interpolate(coarse, size=GRID, mode="bilinear", align_corners=True)
    axis = torch.arange(GRID, dtype=torch.float32)
    places = 4 + (GRID - 9) * torch.rand(runs, 3, 2, 1, 1, generator=generator)
    widths = 1.5 + 1.5 * torch.rand(runs, 3, 1, 1, generator=generator)
    heights = torch.randn(runs, 3, 1, 1, generator=generator)
    heights[:, 1:] *= torch.rand(runs, 2, 1, 1, generator=generator) < 0.5
    distance = (axis[:, None] - places[:, :, 0]).square() + (axis - places[:, :, 1]).square()
    now = (heights * torch.exp(-distance / (2 * widths**2))).sum(1, keepdim=True)
    fields = snapshots(now, velocity)
    return fields / fields.square().mean((1, 2, 3), keepdim=True).sqrt(), velocity[:, 0]


def snapshots(start: Tensor, velocity: Tensor) -> Tensor:
    """Fields (runs, snapshots, grid, grid) that start from rest; ``start`` and velocity are (runs, 1, grid, grid)."""
    stencil = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    speed = (0.5 * velocity).square()

    def pull(field: Tensor) -> Tensor:
        return speed * functional.conv2d(field, stencil, padding=1)

    # At rest: the first step is half of one.
    before, now = start, start + pull(start) / 2
    taken = [start]
    for step in range(1, BETWEEN * (SNAPSHOTS - 1) + 1):
        if step % BETWEEN == 0:
            taken.append(now)
        before, now = now, 2 * now - before + pull(now)
    return torch.cat(taken, 1)


def pairs(runs: Waves) -> tuple[Tensor, Tensor]:
    """Inputs (N, 3, grid, grid), two snapshots and the velocity, and the snapshot (N, 1, grid, grid) after them."""
    fields, velocity = runs
    count = fields.shape[1] - 2
    inputs = torch.stack([fields[:, :-2], fields[:, 1:-1], velocity[:, None].expand(-1, count, -1, -1)], 2)
    return inputs.flatten(0, 1), fields[:, 2:].flatten(0, 1)[:, None]


class Simulator(nn.Module):
    """Two snapshots and the velocity to the next snapshot: an encoder and a decoder with 5 x 5 filters.

    Parameters
    ----------
    width, deep
        Channels at full and at half resolution.
    depthwise
        Whether a filter is depthwise, followed by 1 x 1.
    """

    def __init__(self, width: int, deep: int, *, depthwise: bool = False) -> None:
        super().__init__()

        def layer(inputs: int, outputs: int, kernel: int = 5, kind: type = nn.Conv2d, **options: int) -> nn.Module:
            if not depthwise:
                return kind(inputs, outputs, kernel, **options)
            by_channel = kind(inputs, inputs, kernel, groups=inputs, bias=False, **options)
            return nn.Sequential(by_channel, nn.Conv2d(inputs, outputs, 1))

        self.inner = layer(3, width, padding=2)
        self.down = layer(width, deep, stride=2, padding=2)
        self.deep = layer(deep, deep, padding=2)
        self.up = layer(deep, width, 4, nn.ConvTranspose2d, stride=2, padding=1)
        self.outer = layer(width, 1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 1, H, W): the present snapshot and its change."""
        full = functional.relu(self.inner(x))
        half = functional.relu(self.deep(functional.relu(self.down(full))))
        return x[:, 1:2] + self.outer(functional.relu(self.up(half) + full))


@torch.inference_mode()
def error(model: nn.Module, runs: Waves) -> float:
    """Relative L2 error of one step, over all steps of these runs."""
    inputs, targets = pairs(runs)
    outputs = torch.cat([model(part) for part in inputs.split(64)])
    return float((outputs - targets).norm() / targets.norm())


@torch.inference_mode()
def error_of_last(model: nn.Module, runs: Waves) -> float:
    """Relative L2 error of the last snapshot, predicted from the first two alone."""
    fields, velocity = runs
    before, now = fields[:, 0], fields[:, 1]
    for _ in range(fields.shape[1] - 2):
        before, now = now, model(torch.stack([before, now, velocity], 1))[:, 0]
    return float((now - fields[:, -1]).norm() / fields[:, -1].norm())
