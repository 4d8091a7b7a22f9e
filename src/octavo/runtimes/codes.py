"""Integers as initializers of the fewest bits that hold them exactly, and the nodes that read them again.

Most codes of a matrix lie in a narrow window, the more so if they were chosen for an entropy coder. What lies in the
window takes 1, 2, 4, 8 or 16 bits; the few beyond it are stored apart, by the steps between their places. Of 4 bits
an initializer of ONNX holds two to a byte. Of 1 and 2 bits there is no type, so bytes are taken apart when they are
read.

All of this depends on nothing but initializers. So onnxruntime works it out once, when it opens the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.runtimes.nodes import UINT4, Nodes

#: Bytes that one integer beyond the window takes, about: two for its place and one or two for itself.
_BEYOND_BYTES = 4
#: Bytes of the nodes that put integers beyond the window where they belong, and of those that take bytes apart.
_BEYOND_NODES, _PLANE_NODES = 700, 250
#: Beyond so many values integers take 32 bits.
_MOST_VALUES = 1 << 16
_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Window:
    """How integers are stored: ``bits`` each from ``low`` on, and so many ``beyond`` that."""

    bits: int
    low: int
    beyond: int
    bytes: int


def window_of(integers: Tensor) -> Window:
    """The window in which integers take the fewest bytes."""
    low, high = (int(value) for value in torch.aminmax(integers))
    size, span = integers.numel(), high - low + 1
    if span > _MOST_VALUES:
        return Window(32, 0, 0, 4 * size)
    counts = sum(np.bincount(part.long() - low, minlength=span) for part in integers.flatten().split(_AT_ONCE))
    before = np.concatenate([[0], np.cumsum(counts)])
    return min(_windows(before, low, size), key=lambda window: window.bytes)


def _windows(before: np.ndarray, low: int, size: int) -> Iterator[Window]:
    """The best window of every number of bits; ``before`` counts integers below each value from ``low`` on."""
    for bits in (16, 8, 4, 2, 1, 0):
        width = min(2**bits, len(before) - 1)
        inside = before[width:] - before[:-width]
        start = int(inside.argmax())
        beyond = size - int(inside[start])
        nodes = _PLANE_NODES * (8 // bits) if bits in (1, 2) else 0
        nodes += _BEYOND_NODES if beyond else 0
        yield Window(bits, low + start, beyond, -(-size * bits // 8) + beyond * _BEYOND_BYTES + nodes)


def store(nodes: Nodes, name: str, integers: Tensor) -> tuple[str, int]:
    """Add integers to a graph.

    Returns
    -------
    value
        The name of an integer tensor of the same shape, which only depends on initializers.
    shift
        What is to be added to it.
    """
    window = window_of(integers)
    if window.bits == 32:
        return nodes.constant(name, integers.int()), 0
    codes = (integers.int() - window.low).flatten()
    outside = (codes < 0) | (codes >= 2**window.bits)
    dtype = narrowest(codes)
    value = _dense(nodes, name, codes.masked_fill(outside, 0), window.bits, dtype)
    if window.beyond:
        places = outside.nonzero()[:, 0]
        gaps = torch.diff(places, prepend=places.new_zeros(1))
        steps = nodes.constant(f"{name}/places", gaps.to(narrowest(gaps)))
        index = nodes.add("CumSum", [nodes.cast(steps, torch.int64), nodes.once("first", lambda: _first_axis(nodes))])
        beyond = nodes.constant(f"{name}/beyond", codes[outside].to(dtype))
        value = str(nodes.add("ScatterElements", [value, index, beyond], axis=0))
    return nodes.reshape(value, *integers.shape), window.low


def zero_byte() -> Any:
    """What ``ConstantOfShape`` fills a tensor of bytes with."""
    import onnx

    return onnx.helper.make_tensor("", onnx.TensorProto.UINT8, [1], [0])


def _first_axis(nodes: Nodes) -> str:
    return nodes.constant("first", torch.zeros((), dtype=torch.int64))


def narrowest(integers: Tensor) -> torch.dtype:
    """The narrowest dtype that holds them."""
    low, high = (int(value) for value in torch.aminmax(integers))
    kinds = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32)
    return next((k for k in kinds if torch.iinfo(k).min <= low and high <= torch.iinfo(k).max), torch.int64)


def _dense(nodes: Nodes, name: str, codes: Tensor, bits: int, dtype: torch.dtype) -> str:
    """A flat tensor of unsigned integers of so many bits, as ``dtype``."""
    if bits == 0:
        value = str(nodes.add("ConstantOfShape", [nodes.sizes(len(codes))], value=zero_byte()))
    elif bits == 4:
        whole = torch.nn.functional.pad(codes, (0, len(codes) % 2)).to(torch.uint8)
        packed = whole[::2] | whole[1::2] << 4
        return nodes.cast(nodes.raw(name, UINT4, codes.shape, packed.numpy().tobytes()), dtype)
    elif bits < 8:
        value = _planes(nodes, name, codes, bits)
    else:
        stored = torch.uint8 if bits == 8 else torch.uint16
        value = nodes.constant(name, codes.to(stored))
        return value if stored == dtype else nodes.cast(value, dtype)
    return value if dtype == torch.uint8 else nodes.cast(value, dtype)


def _planes(nodes: Nodes, name: str, codes: Tensor, bits: int) -> str:
    """Codes of 1 or 2 bits: the lowest bits of all bytes first, then those above them."""
    count = 8 // bits
    planes = torch.nn.functional.pad(codes, (0, -len(codes) % count)).to(torch.uint8).view(count, -1)
    packed = planes[0].clone()
    for place in range(1, count):
        packed |= planes[place] << bits * place

    def byte(number: int) -> str:
        wanted = torch.tensor(number, dtype=torch.uint8)
        return nodes.once(("byte", number), lambda: nodes.constant("byte", wanted))

    stored = nodes.constant(name, packed)
    parts = []
    for place in range(count):
        shifted = nodes.add("BitShift", [stored, byte(bits * place)], direction="RIGHT") if place else stored
        parts.append(nodes.add("BitwiseAnd", [shifted, byte(2**bits - 1)]))
    whole = nodes.add("Concat", parts, axis=0)
    return str(nodes.add("Slice", [whole, nodes.sizes(0), nodes.sizes(len(codes))]))
