"""Storing integers as initializers with the fewest exact bits, and the nodes that read them.

Most codes of a matrix are in a narrow window, especially if they were chosen for an entropy coder. Codes in the window
take 0 to 6, 8 or 16 bits. The few others are stored separately, with the gaps between their positions. ONNX
initializers of 4 bits hold two values per byte. There is no type of 1 or 2 bits, so bytes are split when read; 3, 5 and
6 bits combine two of these widths.

All of this only depends on initializers. So onnxruntime computes it once, when it opens the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.runtimes.onnx.nodes import UINT4, Nodes

#: Approximate bytes of an integer outside of the window: position and value.
_BEYOND_BYTES = 2.5
#: Bytes of the nodes that insert integers outside of the window.
_BEYOND_NODES = 700
#: Maps bits to the widths that are combined for them, and to the bytes of the nodes needed.
_WIDTHS = {
    16: ((16,), 0), 8: ((8,), 0), 6: ((4, 2), 1200), 5: ((4, 1), 2200), 4: ((4,), 0), 3: ((2, 1), 3200),
    2: ((2,), 1000), 1: ((1,), 2000), 0: ((), 0),
}  # fmt: skip
#: Gaps between positions are bytes: longer gaps are split at integers inside the window.
_LONGEST = 255
#: With more values, integers take 32 bits.
_MOST_VALUES = 1 << 16
_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class CodeWindow:
    """How integers are stored: ``bits`` each starting at ``low``, and the number ``beyond`` the window."""

    bits: int
    low: int
    beyond: int
    bytes: int


def window_of(integers: Tensor) -> CodeWindow:
    """The window in which integers take the fewest bytes."""
    low, high = (int(value) for value in torch.aminmax(integers))
    size, span = integers.numel(), high - low + 1
    if span > _MOST_VALUES:
        return CodeWindow(32, 0, 0, 4 * size)
    counts = sum(np.bincount(part.long() - low, minlength=span) for part in integers.flatten().split(_AT_ONCE))
    before = np.concatenate([[0], np.cumsum(counts)])
    return min(_windows(before, low, size), key=lambda window: window.bytes)


def _windows(before: np.ndarray, low: int, size: int) -> Iterator[CodeWindow]:
    """The best window of every number of bits; ``before`` counts integers below each value from ``low`` on."""
    for bits, (_, nodes) in _WIDTHS.items():
        width = min(2**bits, len(before) - 1)
        inside = before[width:] - before[:-width]
        start = int(inside.argmax())
        beyond = size - int(inside[start])
        apart = round(beyond * _BEYOND_BYTES) + _BEYOND_NODES if beyond else 0
        yield CodeWindow(bits, low + start, beyond, -(-size * bits // 8) + apart + nodes)


def store(nodes: Nodes, name: str, integers: Tensor) -> tuple[str, int]:
    """Add integers to a graph.

    Returns
    -------
    value
        The name of an integer tensor of the same shape, which only depends on initializers.
    shift
        The number to add to it.
    """
    window = window_of(integers)
    if window.bits == 32:
        return nodes.constant(name, integers.int()), 0
    codes = (integers.int() - window.low).flatten()
    outside = (codes < 0) | (codes >= 2**window.bits)
    dtype = narrowest(codes)
    value = _inside(nodes, name, codes.masked_fill(outside, 0), window.bits)
    value = value if dtype == torch.uint8 and window.bits < 16 else nodes.cast(value, dtype)
    if window.beyond:
        places = _divided(outside.nonzero()[:, 0])
        gaps = torch.diff(places, prepend=places.new_zeros(1))
        steps = nodes.constant(f"{name}/places", gaps.to(narrowest(gaps)))
        index = nodes.add("CumSum", [nodes.cast(steps, torch.int64), nodes.once("first", lambda: _first_axis(nodes))])
        beyond = nodes.constant(f"{name}/beyond", codes[places].to(dtype))
        value = str(nodes.add("ScatterElements", [value, index, beyond], axis=0))
    return nodes.reshape(value, *integers.shape), window.low


def _divided(places: Tensor) -> Tensor:
    """The positions, with additional ones in long gaps, if this makes all gaps small at little cost."""
    gaps = torch.diff(places, prepend=places.new_zeros(1))
    more = (gaps - 1).clamp_min(0) // _LONGEST
    if int(more.sum()) > len(places) // 2:
        return places
    owner = torch.arange(len(places)).repeat_interleave(more + 1)
    last = (more + 1).cumsum(0)[owner] - 1
    return places[owner] - (last - torch.arange(len(owner))) * _LONGEST


def zero_byte() -> Any:
    """The fill value of ``ConstantOfShape`` for a byte tensor."""
    import onnx

    return onnx.helper.make_tensor("", onnx.TensorProto.UINT8, [1], [0])


def _first_axis(nodes: Nodes) -> str:
    return nodes.constant("first", torch.zeros((), dtype=torch.int64))


def narrowest(integers: Tensor) -> torch.dtype:
    """The narrowest dtype that holds the values."""
    low, high = (int(value) for value in torch.aminmax(integers))
    kinds = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32)
    return next((k for k in kinds if torch.iinfo(k).min <= low and high <= torch.iinfo(k).max), torch.int64)


def _inside(nodes: Nodes, name: str, codes: Tensor, bits: int) -> str:
    """A flat tensor of unsigned integers of the given bits; uint16 for 16 bits, otherwise uint8."""
    widths, _ = _WIDTHS[bits]
    if not widths:
        return str(nodes.add("ConstantOfShape", [nodes.sizes(len(codes))], value=zero_byte()))
    value, below = "", 0
    for width in widths:
        part = _of_width(nodes, name, codes >> below & (2**width - 1), width)
        if below:
            shifted = nodes.add("BitShift", [part, _byte(nodes, below)], direction="LEFT")
            part = str(nodes.add("BitwiseOr", [value, shifted]))
        value, below = part, below + width
    return value


def _of_width(nodes: Nodes, name: str, codes: Tensor, width: int) -> str:
    if width == 4:
        whole = torch.nn.functional.pad(codes, (0, len(codes) % 2)).to(torch.uint8)
        packed = whole[::2] | whole[1::2] << 4
        return nodes.cast(nodes.raw(name, UINT4, codes.shape, packed.numpy().tobytes()), torch.uint8)
    if width < 4:
        return _planes(nodes, name, codes, width)
    return nodes.constant(name, codes.to(torch.uint8 if width == 8 else torch.uint16))


def _byte(nodes: Nodes, number: int) -> str:
    wanted = torch.tensor(number, dtype=torch.uint8)
    return nodes.once(("byte", number), lambda: nodes.constant("byte", wanted))


def _planes(nodes: Nodes, name: str, codes: Tensor, bits: int) -> str:
    """Codes of 1 or 2 bits: the lowest bits of all bytes first, then the next bits."""
    count = 8 // bits
    planes = torch.nn.functional.pad(codes, (0, -len(codes) % count)).to(torch.uint8).view(count, -1)
    packed = planes[0].clone()
    for place in range(1, count):
        packed |= planes[place] << bits * place

    stored = nodes.constant(name, packed)
    parts = []
    for place in range(count):
        shifted = nodes.add("BitShift", [stored, _byte(nodes, bits * place)], direction="RIGHT") if place else stored
        parts.append(nodes.add("BitwiseAnd", [shifted, _byte(nodes, 2**bits - 1)]))
    whole = nodes.add("Concat", parts, axis=0)
    return str(nodes.add("Slice", [whole, nodes.sizes(0), nodes.sizes(len(codes))]))
