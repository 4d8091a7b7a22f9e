"""Codes split into streams of similar distribution, which the scales and offsets of their groups determine.

The distribution of a group's codes follows from two numbers: the position of zero among them, ``-offset / step``, and
the fineness of the step relative to the usual weights of row and column. Both are known before the codes are read, so
they cost nothing. Codes of one *cell* (position of zero, fineness) stay together, and cells with similar distributions
share a stream, and with it a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.forms.base import expect, expect_integers

#: Largest number of streams, and the overhead of a stream in bits: its table, frame and manifest entry.
_STREAMS, _STREAM_BITS = 24, 1200
#: Cells differ by a quarter octave of fineness (at most this many steps) or by a whole level of zero.
_FINENESS, _ZEROS = 24, 16
#: The tables of wider alphabets cost more than streams save.
_LEVELS = 1024
#: Columns are distinguished if that saves this share of the codes, since it makes reading slower.
_WORTHWHILE = 0.004
#: Codes split at a time, and codes from which cells are chosen.
_ROWS, _SAMPLE = 1 << 20, 1 << 22


def at_once(shape: tuple[int, int]) -> int:
    """Codes of a matrix that are split at a time."""
    return min(shape[0] * shape[1], max(_ROWS, shape[1]))


class Cells:
    """The cell of every code, computed from steps, offsets and one small integer per column.

    Parameters
    ----------
    step, offset
        (rows, groups) float32; offset may be None.
    columns
        (columns,) usual magnitude of a column relative to others, in sixteenths of an octave.
    lowest
        Fineness of the first cell.
    count
        Number of distinct steps of fineness; values outside join the nearest.
    levels
        Largest code; codes begin at zero.
    """

    def __init__(
        self, step: Tensor, offset: Tensor | None, columns: Tensor, lowest: int, count: int, levels: int
    ) -> None:
        # Four bits of the mantissa: sixteenths of an octave, piecewise linear, the same on every machine.
        octaves = step.abs().contiguous().view(torch.int32) >> 19
        self._fineness = (octaves.median(1).values[:, None] - octaves).to(torch.int16)
        self._columns, self._lowest, self._count, self.levels = columns.to(torch.int16), lowest, count, levels
        self.mirrored = torch.zeros(step.shape, dtype=torch.bool)
        self._zero = torch.zeros(step.shape, dtype=torch.int16)
        if offset is not None:
            place = (-offset / torch.where(step == 0, torch.inf, step)).round().clamp(0, levels).to(torch.int16)
            # A group and its mirror image have one distribution, read from either end.
            self.mirrored = place > levels // 2
            place = torch.where(self.mirrored, levels - place, place)
            self._zero = (
                place
                if levels < 2 * _ZEROS
                else place.int().mul_(_ZEROS).div_(levels // 2 + 1, rounding_mode="floor").to(torch.int16)
            )
        self.width = len(columns) // step.shape[1]

    @property
    def of_groups(self) -> bool:
        """Whether all codes of a group are in one cell."""
        return bool((self._columns == self._columns[:1]).all())

    def rows(self, start: int, stop: int) -> Tensor:
        """Cells of some rows: (rows, groups, width), or (rows, groups, 1) where a group is in one cell."""
        columns = self._columns.reshape(1, -1, self.width)
        columns = columns[..., :1] if self.of_groups else columns
        fineness = (self._fineness[start:stop, :, None] + columns) >> 2
        fineness = fineness.sub_(self._lowest).clamp_(0, self._count - 1)
        return fineness.add_(self._zero[start:stop, :, None] * self._count)

    @property
    def count(self) -> int:
        """Number of cells."""
        return self._count * _ZEROS

    def mirror(self, codes: Tensor, start: int, stop: int) -> Tensor:
        """Codes (rows, groups, width) of some rows; those of mirrored groups are counted from the other end."""
        return torch.where(self.mirrored[start:stop, :, None], self.levels - codes, codes)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """First and last row of pieces that fit a cache."""
        height = max(1, _ROWS // max(len(self._columns), 1))
        rows = len(self._fineness)
        return ((start, min(start + height, rows)) for start in range(0, rows, height))


def split(codes: Tensor, step: Tensor, offset: Tensor | None) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Streams of codes, and the numbers that :func:`join` needs besides steps and offsets.

    Parameters
    ----------
    codes
        (rows, columns) int16; not negative if there are offsets.
    """
    low, levels = int(codes.min()), int(codes.max())
    if not 0 < levels - low < _LEVELS:
        return {"codes": _narrow(codes)}, {"streams": 0}
    best: tuple[float, Tensor, Cells, np.ndarray, dict[str, int]] | None = None
    for columns in (torch.zeros(codes.shape[1], dtype=torch.int8), _usual(codes, step, offset)):
        lowest, count = _range(step, columns)
        meta = {"lowest": lowest, "fineness": count, "levels": levels}
        cells = Cells(step, offset, columns, lowest, count, levels)
        table, bits = _merged(_counts(codes, cells, low, levels))
        if best is None or bits < best[0] * (1 - _WORTHWHILE):
            best = bits, columns, cells, table, meta
    assert best is not None
    _, columns, cells, table, meta = best
    streams: list[list[Tensor]] = [[] for _ in range(int(table.max()) + 1)]
    for start, stop in cells.chunks():
        order, sizes = _order(table[cells.rows(start, stop).numpy()], len(streams))
        piece = cells.mirror(codes[start:stop].reshape(stop - start, -1, cells.width), start, stop)
        # Groups in one cell are handled as a whole: many times faster, in the same order.
        parted = piece.reshape(len(order), -1)[order].split(sizes)
        for stream, part in zip(streams, parted, strict=True):
            stream.append(part.flatten())
    parts = {"columns": columns, "cells": torch.from_numpy(table)}
    parts.update({f"codes/{number}": _narrow(torch.cat(stream)) for number, stream in enumerate(streams)})
    return parts, {"streams": len(streams), **meta}


def join(
    parts: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int], step: Tensor, offset: Tensor | None
) -> Tensor:
    """Exact inverse of :func:`split`; everything is checked."""
    number = meta["streams"]
    expect(type(number) is int and 0 <= number <= _STREAMS, f"{number!r} is not a valid number of streams")
    if not number:
        return _widened(expect_integers(parts["codes"], shape, "codes"))
    lowest, count, levels = (meta[key] for key in ("lowest", "fineness", "levels"))
    fits = all(type(value) is int for value in (lowest, count, levels)) and 0 < count <= _FINENESS
    expect(fits and abs(lowest) < 1 << 14 and abs(levels) < 1 << 14, f"{dict(meta)} do not describe cells")
    columns = expect_integers(parts["columns"], (shape[1],), "columns")
    expect(bool((columns.long().abs() < 1 << 8).all()), "the usual magnitude of a column is out of range")
    cells = Cells(step, offset, columns, lowest, count, levels)
    table = expect_integers(parts["cells"], (cells.count,), "cells")
    expect(bool(((table >= 0) & (table < number)).all()), f"a cell belongs to none of {number} streams")
    streams = [_widened(parts[f"codes/{k}"]) for k in range(number)]
    expect(all(stream.ndim == 1 for stream in streams), "a stream of codes is not a vector")
    codes, at = torch.empty(shape, dtype=torch.int16), [0] * number
    for start, stop in cells.chunks():
        order, sizes = _order(table.numpy()[cells.rows(start, stop).numpy()], number)
        piece = codes[start:stop].view(stop - start, -1, cells.width)
        unit, parts_of = piece.numel() // len(order), []
        for k, size in enumerate(sizes):
            expect(at[k] + size * unit <= len(streams[k]), f"stream {k} of the codes ends too early")
            parts_of.append(streams[k][at[k] : at[k] + size * unit])
            at[k] += size * unit
        piece.view(-1, unit)[order] = torch.cat(parts_of).view(-1, unit)
        piece.copy_(cells.mirror(piece, start, stop))
    expect(at == [len(stream) for stream in streams], "streams hold more codes than the matrix")
    return codes


def _order(which: np.ndarray, streams: int) -> tuple[Tensor, list[int]]:
    """The units of a piece by the stream that they belong to, each stream's in their own order; and units by stream."""
    flat = which.reshape(-1)
    # Numbers of a byte are sorted by radix, in one pass.
    order = flat.astype(np.uint8, copy=False).argsort(kind="stable")
    return torch.from_numpy(order), np.bincount(flat, minlength=streams).tolist()


def _usual(codes: Tensor, step: Tensor, offset: Tensor | None) -> Tensor:
    """Magnitude of every column relative to others, in sixteenths of an octave."""
    rows = codes[:: -(-codes.numel() // _SAMPLE)]
    steps, low = (None if part is None else part[:: -(-codes.numel() // _SAMPLE), :, None] for part in (step, offset))
    assert steps is not None
    values = rows.reshape(len(rows), step.shape[1], -1) * steps + (0 if low is None else low)
    typical = steps.abs().median(1, keepdim=True).values.clamp_min(1e-30)
    size = (values / typical).square().mean(0).sqrt().flatten().clamp_min(1e-30).log2() * 16
    return (size - size.median()).round().clamp(-127, 127).to(torch.int8)


def _range(step: Tensor, columns: Tensor) -> tuple[int, int]:
    """Lowest fineness and number of its steps, without a thousandth of the values at either end."""
    every = Cells(step, None, columns, -(1 << 12), 1 << 13, 0)
    sample = every.rows(0, len(step)) if every.of_groups else every.rows(0, max(1, _SAMPLE // len(columns)))
    low, high = np.quantile(sample.flatten()[:: -(-sample.numel() // _SAMPLE)].numpy(), (0.001, 0.999)).astype(int)
    return int(low) - (1 << 12), min(int(high - low) + 1, _FINENESS)


def _counts(codes: Tensor, cells: Cells, low: int, levels: int) -> np.ndarray:
    """Count of each code in each cell, (cells, alphabet), scaled up from a sample of pieces."""
    alphabet = 2 * max(abs(low), levels) + 1
    counts = np.zeros(cells.count * alphabet, np.int64)
    pieces = list(cells.chunks())
    for start, stop in pieces[:: -(-len(pieces) * _ROWS // _SAMPLE) if len(pieces) > 1 else 1]:
        piece = cells.mirror(codes[start:stop].reshape(stop - start, -1, cells.width), start, stop)
        key = cells.rows(start, stop).int() * alphabet + piece + (alphabet // 2)
        counts += np.bincount(key.flatten().numpy(), minlength=len(counts))
    return counts.reshape(cells.count, alphabet) * (codes.numel() / max(int(counts.sum()), 1))


def _merged(counts: np.ndarray) -> tuple[np.ndarray, float]:
    """The stream of every cell, and the total bits. Similar cells are merged while that saves bits."""
    used = np.flatnonzero(counts.sum(1))
    merged = counts[used][:, counts.any(0)]
    bits, owner, alive = _bits(merged), np.arange(len(used)), np.ones(len(used), bool)
    loss = np.full((len(used), len(used)), np.inf)
    for cell in range(len(used) - 1):
        loss[cell, cell + 1 :] = _bits(merged[cell] + merged[cell + 1 :]) - bits[cell] - bits[cell + 1 :]
    while alive.sum() > 1:
        first, second = divmod(int(loss.argmin()), len(used))
        if loss[first, second] > _STREAM_BITS and alive.sum() <= _STREAMS:
            break
        merged[first] += merged[second]
        bits[first], owner[owner == second], alive[second] = _bits(merged[first]), first, False
        loss[second], loss[:, second] = np.inf, np.inf
        others = np.flatnonzero(alive & (np.arange(len(used)) != first))
        low, high = np.minimum(others, first), np.maximum(others, first)
        loss[low, high] = _bits(merged[first] + merged[others]) - bits[first] - bits[others]
    numbers = np.searchsorted(np.flatnonzero(alive), owner)
    # A cell that is not in the sample joins the next one that is.
    nearest = np.clip(np.searchsorted(used, np.arange(len(counts))), 0, len(used) - 1)
    return numbers[nearest].astype(np.uint8), float(bits[alive].sum()) + _STREAM_BITS * int(alive.sum())


def _bits(counts: np.ndarray) -> np.ndarray:
    """Bits of symbols of these counts, along the last axis."""
    total = counts.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(counts > 0, counts * np.log2(total / counts), 0.0).sum(-1)


def _narrow(codes: Tensor) -> Tensor:
    return codes.to(torch.int8) if codes.numel() == 0 or (codes.min() >= -128 and codes.max() < 128) else codes


def _widened(codes: Tensor) -> Tensor:
    expect(codes.dtype in (torch.int8, torch.int16), f"codes are {codes.dtype}, expected int8 or int16")
    return codes.short()
