"""Convolutions in stages: a sequence of small convolutions that equals one with a factored weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn import functional

from octavo.forms import Dense, Folded, Form, GroupedLowRank, LowRank, Scaled, Separable, Sum
from octavo.runtimes.lowering import Lowering
from octavo.runtimes.packed.kernels import Geometry

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


@dataclass(frozen=True)
class Stage:
    """One stage of a convolution.

    Parameters
    ----------
    weight
        (outputs, inputs / groups, *kernel).
    along
        The axes along which this stage applies the whole kernel's stride, padding and dilation.
    """

    weight: Tensor
    groups: int
    along: tuple[bool, ...]

    def __call__(self, x: Tensor, bias: Tensor | None, moves: Sequence[tuple[int, ...]]) -> Tensor:
        """Convolve with the stride, padding and dilation of ``moves`` along this stage's axes."""
        own = [
            tuple(value if mine else still for value, mine in zip(values, self.along, strict=True))
            for values, still in zip(moves, (1, 0, 1), strict=True)
        ]
        return _CONVOLUTIONS[len(self.along)](x, self.weight, bias, *own, self.groups)


def staged(
    x: Tensor, chains: Sequence[Sequence[Stage]], kernel: Sequence[int], bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """The sum of the results of all chains of stages, plus the bias.

    Parameters
    ----------
    x
        (examples, channels, *positions), or without the first dimension.
    kernel
        Size of the whole kernel along every axis.
    """
    inputs, moves = _padded(x, kernel, geometry)
    total: Tensor | None = None
    for chain in chains:
        out = inputs
        for stage in chain:
            # The last stage of one chain adds the bias.
            out = stage(out, bias if stage is chain[-1] and total is None else None, moves)
        total = out if total is None else total + out
    assert total is not None
    return total


def _padded(x: Tensor, kernel: Sequence[int], geometry: Geometry) -> tuple[Tensor, list[tuple[int, ...]]]:
    """The input, and stride, padding and dilation by axis; ``"same"`` padding is applied here."""
    stride, dilation = (_by_axis(value, len(kernel)) for value in (geometry.stride, geometry.dilation))
    if not isinstance(geometry.padding, str):
        return x, [stride, _by_axis(geometry.padding, len(kernel)), dilation]
    if geometry.padding == "same":
        spare = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        x = functional.pad(x, [side for width in reversed(spare) for side in (width // 2, width - width // 2)])
    return x, [stride, (0,) * len(kernel), dilation]


def _by_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


Chains = list[list[Stage]]
#: Convolutions by the form of their weight: functions of the form and of the weight's shape, which give None where
#: there is no such convolution.
convolves = Lowering[Callable[[Any, tuple[int, ...]], Chains | None]]("convolution in stages")
#: The same by the form inside a spatial fold, ``(c h) x (n w)``.
_unfolds = Lowering[Callable[[Any, tuple[int, ...]], Chains | None]]("convolution in stages")


def chains(form: Form, shape: tuple[int, ...]) -> Chains | None:
    """Chains of convolutions whose sum equals the convolution with the form's weight."""
    lower = convolves.find(form)
    return None if lower is None else lower(form, shape)


@convolves(Dense)
def _dense(form: Dense, shape: tuple[int, ...]) -> Chains:
    return [[Stage(form.weight.reshape(shape), 1, (True,) * len(shape[2:]))]]


@convolves(LowRank)
def _low_rank(form: LowRank, shape: tuple[int, ...]) -> Chains | None:
    return _grouped(GroupedLowRank(form.left, form.right, 1), shape)


@convolves(GroupedLowRank)
def _grouped(form: GroupedLowRank, shape: tuple[int, ...]) -> Chains | None:
    """All of the kernel over the channels of every group, then 1 x 1."""
    rows, channels, *kernel = shape
    if channels % form.groups:
        return None
    here, nowhere = (True,) * len(kernel), (False,) * len(kernel)
    right = form.right.dense().reshape(-1, channels // form.groups, *kernel)
    left = form.left.dense().reshape(rows, -1, *(1 for _ in kernel))
    return [[Stage(right, form.groups, here), Stage(left, 1, nowhere)]]


@convolves(Sum)
def _sum(form: Sum, shape: tuple[int, ...]) -> Chains | None:
    parts = [chains(part, shape) for part in (form.base, form.correction)]
    return None if parts[0] is None or parts[1] is None else parts[0] + parts[1]


@convolves(Scaled)
def _scaled(form: Scaled, shape: tuple[int, ...]) -> Chains | None:
    gains, base = form.factors.reshape(-1, *(1 for _ in shape[1:])), chains(form.base, shape)
    return base and [[*chain[:-1], replace(chain[-1], weight=chain[-1].weight * gains)] for chain in base]


@convolves(Folded)
def _folded(form: Folded, shape: tuple[int, ...]) -> Chains | None:
    lower = _unfolds.find(form.inner)
    whole = form.fold == "spatial" and list(form.kernel) == list(shape[1:])
    return lower(form.inner, shape) if whole and lower is not None else None


@_unfolds(LowRank)
def _spatial_low_rank(form: LowRank, shape: tuple[int, ...]) -> Chains | None:
    return _spatial(GroupedLowRank(form.left, form.right, 1), shape)


@_unfolds(GroupedLowRank)
def _spatial(form: GroupedLowRank, shape: tuple[int, ...]) -> Chains | None:
    """``(c h) x (n w)``: h x 1 filters over all channels, then 1 x w, each group of filters on its own input."""
    rows, channels, height, width = shape
    if rows % form.groups:
        return None
    down = form.left.dense().t().reshape(-1, channels, height, 1).contiguous()
    across = form.right.dense().reshape(form.groups, -1, rows // form.groups, width)
    across = across.transpose(1, 2).reshape(rows, -1, 1, width).contiguous()
    return [[Stage(down, 1, (True, False)), Stage(across, form.groups, (False, True))]]


@convolves(Separable)
def _separable(form: Separable, shape: tuple[int, ...]) -> Chains | None:
    """1 x 1 over the channels, then vertical, then horizontal; the last adds the terms of every filter."""
    if len(shape) != 4:
        return None
    rows, channels, height, width = shape
    parts = [part.dense() for part in (form.channel, form.vertical, form.horizontal)]
    if [part.shape[1] for part in parts] != [channels, height, width]:
        return None
    # Reordered from term-major to filter-major, so that the terms of a filter form one group.
    channel, down, across = (part.unflatten(0, (form.terms, rows)).transpose(0, 1).contiguous() for part in parts)
    each = rows * form.terms
    return [[
        Stage(channel.reshape(each, channels, 1, 1), 1, (False, False)),
        Stage(down.reshape(each, 1, height, 1), each, (True, False)),
        Stage(across.reshape(rows, form.terms, 1, width), rows, (False, True)),
    ]]  # fmt: skip
