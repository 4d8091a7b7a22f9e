"""The block types of ggml: integers and scales to the bytes that llama.cpp reads, and back.

A row is cut into blocks. Every weight of a group of ``group`` columns is

    level[code] * (d * scale)  +  offset        with  offset = m  or  offset = -(dmin * minimum)  or  0

where ``d``, ``m`` and ``dmin`` are float16, one a block, and ``scale`` and ``minimum`` are small integers, one a group.
Types of 32 columns have one group a block and no such integers. All products are float32, in this order, so decoded
weights equal those of llama.cpp bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from octavo.errors import ArtifactError

#: The uneven levels of the types whose names begin with ``iq4``.
_UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Fields:
    """What the blocks of a matrix hold.

    Parameters
    ----------
    codes
        (rows, columns) uint8, numbers of levels.
    d
        (rows, blocks) float16.
    base
        ``m`` or ``dmin``, (rows, blocks) float16; None for types without offsets.
    scales, minima
        (rows, groups) int16; None for types that have none.
    """

    codes: Tensor
    d: Tensor
    base: Tensor | None = None
    scales: Tensor | None = None
    minima: Tensor | None = None


@dataclass(frozen=True)
class BlockType:
    """A block type.

    Parameters
    ----------
    name
        As llama.cpp writes it, in lower case.
    number
        Its number in a GGUF file.
    block, group
        Columns of a block and of a group.
    bytes
        Bytes of a block.
    levels
        What codes stand for.
    scales, minima
        Bounds of a group's integers; None if there is none.
    offset
        Whether a block has ``m`` or ``dmin``.
    time
        Time of a weight while llama.cpp generates, relative to ``q4_0`` (docs/decisions.md).
    """

    name: str
    number: int
    block: int
    group: int
    bytes: int
    levels: tuple[int, ...]
    pack: Callable[[Fields], list[Tensor]]
    unpack: Callable[[Tensor], Fields]
    scales: tuple[int, int] | None = None
    minima: tuple[int, int] | None = None
    offset: bool = False
    time: float = 1.0

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.bytes / self.block

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row; columns are a multiple of the block."""
        return columns // self.block * self.bytes

    def packed(self, fields: Fields) -> Tensor:
        """Blocks (rows, bytes of a row), uint8."""
        rows, columns = fields.codes.shape
        parts = [part.reshape(rows, columns // self.block, -1) for part in self.pack(fields)]
        return torch.cat(parts, 2).flatten(1)

    def unpacked(self, blocks: Tensor) -> Fields:
        """The fields of blocks (rows, bytes of a row)."""
        return self.unpack(blocks.unflatten(1, (-1, self.bytes)))

    def affine(self, fields: Fields) -> tuple[Tensor, Tensor | None]:
        """Steps and offsets (rows, groups), float32, as llama.cpp multiplies them."""

        def spread(part: Tensor) -> Tensor:
            return part.float().repeat_interleave(self.block // self.group, 1)

        step = spread(fields.d)
        if fields.scales is not None:
            step = step * fields.scales.float()
        if fields.base is None:
            return step, None
        return step, spread(fields.base) if fields.minima is None else -(spread(fields.base) * fields.minima.float())

    def dense(self, blocks: Tensor) -> Tensor:
        """The matrix (rows, columns) of blocks, float32."""
        fields = self.unpacked(blocks)
        step, offset = self.affine(fields)
        values = torch.tensor(self.levels, dtype=torch.float32)[fields.codes.int()].unflatten(1, (-1, self.group))
        values = values * step[:, :, None]
        return (values if offset is None else values + offset[:, :, None]).flatten(1)


def _halves(d: Tensor) -> Tensor:
    """float16 (rows, blocks) as bytes (rows, blocks, 2)."""
    return d.contiguous().view(torch.uint8).unflatten(1, (-1, 2))


def _half(piece: Tensor) -> Tensor:
    """The inverse of :func:`_halves`."""
    return piece.contiguous().view(torch.float16).squeeze(2)


def _nibbles(codes: Tensor, width: int) -> Tensor:
    """Codes (rows, blocks, width) in half as many bytes: the second half of them in the high bits."""
    low, high = codes.unflatten(2, (-1, 2, width // 2)).unbind(3)
    return ((low & 15) | ((high & 15) << 4)).flatten(2)


def _from_nibbles(packed: Tensor, width: int) -> Tensor:
    parts = packed.unflatten(2, (-1, width // 2))
    return torch.stack([parts & 15, parts >> 4], 3).flatten(2)


def _fifth(codes: Tensor) -> Tensor:
    """The bits of value 16 of codes (rows, blocks, 32) as 4 bytes."""
    weights = (1 << torch.arange(8)).to(torch.uint8)
    return ((codes >> 4).unflatten(2, (4, 8)) * weights).sum(3).to(torch.uint8)


def _from_fifth(packed: Tensor) -> Tensor:
    return ((packed[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(2)


def _blocks(part: Tensor, width: int) -> Tensor:
    return part.unflatten(1, (-1, width))


def _pack_small(five: bool) -> Callable[[Fields], list[Tensor]]:
    """``q4_0 q4_1 q5_0 q5_1 iq4_nl``: d, m, fifth bits, nibbles."""

    def pack(fields: Fields) -> list[Tensor]:
        codes = _blocks(fields.codes, 32)
        heads = [_halves(fields.d), *([] if fields.base is None else [_halves(fields.base)])]
        return [*heads, *([_fifth(codes)] if five else []), _nibbles(codes, 32)]

    return pack


def _unpack_small(five: bool, offset: bool) -> Callable[[Tensor], Fields]:
    def unpack(blocks: Tensor) -> Fields:
        start = 4 if offset else 2
        codes = _from_nibbles(blocks[..., -16:], 32)
        if five:
            codes = codes | (_from_fifth(blocks[..., start : start + 4]) << 4)
        return Fields(codes.flatten(1), _half(blocks[..., :2]), _half(blocks[..., 2:4]) if offset else None)

    return unpack


def _pack_8(fields: Fields) -> list[Tensor]:
    return [_halves(fields.d), (_blocks(fields.codes, 32).short() - 128).to(torch.int8).view(torch.uint8)]


def _unpack_8(blocks: Tensor) -> Fields:
    codes = blocks[..., 2:].contiguous().view(torch.int8).short() + 128
    return Fields(codes.to(torch.uint8).flatten(1), _half(blocks[..., :2]))


def _pack_pairs(codes: Tensor) -> Tensor:
    """Two low bits of 256 codes in 64 bytes: four runs of 32 columns share 32 bytes."""
    runs = codes.unflatten(2, (2, 4, 32)) & 3
    shift = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    return (runs << shift).sum(3).to(torch.uint8).flatten(2)


def _from_pairs(packed: Tensor) -> Tensor:
    shift = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    return ((packed.unflatten(2, (2, 1, 32)) >> shift) & 3).flatten(2)


def _pack_bits(bits: Tensor) -> Tensor:
    """One bit of 256 columns in 32 bytes: run by run of 32."""
    shift = torch.arange(8, dtype=torch.uint8)[:, None]
    return (bits.unflatten(2, (8, 32)) << shift).sum(2).to(torch.uint8)


def _from_bits(packed: Tensor) -> Tensor:
    shift = torch.arange(8, dtype=torch.uint8)[:, None]
    return ((packed.unflatten(2, (1, 32)) >> shift) & 1).flatten(2)


def _pack_q2_k(fields: Fields) -> list[Tensor]:
    assert fields.scales is not None and fields.minima is not None and fields.base is not None
    small = (fields.scales | (fields.minima << 4)).to(torch.uint8)
    return [
        _blocks(small, 16), _pack_pairs(_blocks(fields.codes, 256)), _halves(fields.d), _halves(fields.base)
    ]  # fmt: skip


def _unpack_q2_k(blocks: Tensor) -> Fields:
    small = blocks[..., :16].flatten(1).short()
    codes = _from_pairs(blocks[..., 16:80]).flatten(1)
    return Fields(codes, _half(blocks[..., 80:82]), _half(blocks[..., 82:84]), small & 15, small >> 4)


def _pack_q3_k(fields: Fields) -> list[Tensor]:
    assert fields.scales is not None
    codes, small = _blocks(fields.codes, 256), _blocks((fields.scales + 32).to(torch.uint8), 16)
    low = (small[..., :8] & 15) | ((small[..., 8:] & 15) << 4)
    shift = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = ((small >> 4).unflatten(2, (4, 4)) << shift).sum(2).to(torch.uint8)
    return [_pack_bits(codes >> 2), _pack_pairs(codes), low, high, _halves(fields.d)]


def _unpack_q3_k(blocks: Tensor) -> Fields:
    codes = _from_pairs(blocks[..., 32:96]) | (_from_bits(blocks[..., :32]) << 2)
    low, high = blocks[..., 96:104], blocks[..., 104:108]
    shift = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    top = ((high.unflatten(2, (1, 4)) >> shift) & 3).flatten(2)
    small = torch.cat([low & 15, low >> 4], 2) | (top << 4)
    return Fields(codes.flatten(1), _half(blocks[..., 108:110]), scales=small.flatten(1).short() - 32)


def _pack_six(fields: Fields) -> Tensor:
    """8 scales and 8 minima of 6 bits in 12 bytes."""
    assert fields.scales is not None and fields.minima is not None
    s, m = _blocks(fields.scales, 8).to(torch.uint8), _blocks(fields.minima, 8).to(torch.uint8)
    first = s[..., :4] | ((s[..., 4:] >> 4) << 6)
    second = m[..., :4] | ((m[..., 4:] >> 4) << 6)
    return torch.cat([first, second, (s[..., 4:] & 15) | ((m[..., 4:] & 15) << 4)], 2)


def _from_six(packed: Tensor) -> tuple[Tensor, Tensor]:
    first, second, third = packed.split(4, 2)
    s = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], 2)
    m = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], 2)
    return s.flatten(1).short(), m.flatten(1).short()


def _pack_q4_k(fields: Fields) -> list[Tensor]:
    assert fields.base is not None
    return [_halves(fields.d), _halves(fields.base), _pack_six(fields), _nibbles(_blocks(fields.codes, 256), 64)]


def _pack_q5_k(fields: Fields) -> list[Tensor]:
    head, base, six, nibbles = _pack_q4_k(fields)
    return [head, base, six, _pack_bits(_blocks(fields.codes, 256) >> 4), nibbles]


def _unpack_q4_k(blocks: Tensor) -> Fields:
    s, m = _from_six(blocks[..., 4:16])
    return Fields(
        _from_nibbles(blocks[..., -128:], 64).flatten(1), _half(blocks[..., :2]), _half(blocks[..., 2:4]), s, m
    )


def _unpack_q5_k(blocks: Tensor) -> Fields:
    found = _unpack_q4_k(blocks)
    high = _from_bits(blocks[..., 16:48]).flatten(1) << 4
    return Fields(found.codes | high, found.d, found.base, found.scales, found.minima)


def _pack_q6_k(fields: Fields) -> list[Tensor]:
    assert fields.scales is not None
    # Halves of 128 columns are four runs of 32: the first two share bytes with the last two.
    runs = _blocks(fields.codes, 256).unflatten(2, (2, 4, 32))
    low = (runs[..., :2, :] & 15) | ((runs[..., 2:, :] & 15) << 4)
    shift = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = ((runs >> 4) << shift).sum(3).to(torch.uint8)
    small = _blocks(fields.scales, 16).to(torch.int8).view(torch.uint8)
    return [low.flatten(2), high.flatten(2), small, _halves(fields.d)]


def _unpack_q6_k(blocks: Tensor) -> Fields:
    low = blocks[..., :128].unflatten(2, (2, 2, 32))
    shift = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = (blocks[..., 128:192].unflatten(2, (2, 1, 32)) >> shift) & 3
    codes = torch.cat([low & 15, low >> 4], 3) | (high << 4)
    small = blocks[..., 192:208].contiguous().view(torch.int8).short().flatten(1)
    return Fields(codes.flatten(1), _half(blocks[..., 208:210]), scales=small)


def _pack_iq4_xs(fields: Fields) -> list[Tensor]:
    assert fields.scales is not None
    small = _blocks(fields.scales + 32, 8)
    low = ((small[..., ::2] & 15) | ((small[..., 1::2] & 15) << 4)).to(torch.uint8)
    pairs = (small >> 4).unflatten(2, (2, 4)) << torch.tensor([0, 2, 4, 6])
    high = pairs.sum(3).to(torch.uint8)
    return [_halves(fields.d), high, low, _nibbles(_blocks(fields.codes, 256), 32)]


def _unpack_iq4_xs(blocks: Tensor) -> Fields:
    high = ((blocks[..., 2:4, None] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)) & 3).flatten(2)
    low = torch.stack([blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4], 3).flatten(2)
    small = (low | (high << 4)).flatten(1).short() - 32
    return Fields(_from_nibbles(blocks[..., 8:], 32).flatten(1), _half(blocks[..., :2]), scales=small)


def _even(low: int, high: int) -> tuple[int, ...]:
    return tuple(range(low, high + 1))


#: All types by name, from the most to the fewest bits.
TYPES = {
    kind.name: kind
    for kind in (
        BlockType("q8_0", 8, 32, 32, 34, _even(-128, 127), _pack_8, _unpack_8, time=1.54),
        BlockType("q6_k", 14, 256, 16, 210, _even(-32, 31), _pack_q6_k, _unpack_q6_k, (-128, 127), time=1.01),
        BlockType(
            "q5_1", 7, 32, 32, 24, _even(0, 31), _pack_small(True), _unpack_small(True, True), offset=True, time=2.48
        ),
        BlockType(
            "q5_k", 13, 256, 32, 176, _even(0, 31), _pack_q5_k, _unpack_q5_k, (0, 63), (0, 63), offset=True, time=1.45
        ),
        BlockType("q5_0", 6, 32, 32, 22, _even(-16, 15), _pack_small(True), _unpack_small(True, False), time=2.0),
        BlockType(
            "q4_1", 3, 32, 32, 20, _even(0, 15), _pack_small(False), _unpack_small(False, True), offset=True, time=2.18
        ),
        BlockType(
            "q4_k", 12, 256, 32, 144, _even(0, 15), _pack_q4_k, _unpack_q4_k, (0, 63), (0, 63), offset=True, time=0.91
        ),
        BlockType("q4_0", 2, 32, 32, 18, _even(-8, 7), _pack_small(False), _unpack_small(False, False)),
        BlockType("iq4_nl", 20, 32, 32, 18, _UNEVEN, _pack_small(False), _unpack_small(False, False), time=1.02),
        BlockType("iq4_xs", 23, 256, 32, 136, _UNEVEN, _pack_iq4_xs, _unpack_iq4_xs, (-32, 31), time=1.28),
        BlockType("q3_k", 11, 256, 16, 110, _even(-4, 3), _pack_q3_k, _unpack_q3_k, (-32, 31), time=1.15),
        BlockType(
            "q2_k", 10, 256, 16, 84, _even(0, 3), _pack_q2_k, _unpack_q2_k, (0, 15), (0, 15), offset=True, time=0.73
        ),
    )
}  # fmt: skip


def block_type(name: object) -> BlockType:
    """The type of that name.

    Raises
    ------
    ArtifactError
        If there is none.
    """
    kind = TYPES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ArtifactError(f"{name!r} is not a block type; this version knows {', '.join(TYPES)}")
    return kind


@dataclass(frozen=True)
class StoredBlocks:
    """Where a file holds a matrix as blocks.

    Parameters
    ----------
    offset
        Where its first block begins in the file.
    kind
        Name of the block type, such as ``q4_k``.
    heads
        Heads whose rows are in another order in the file (:func:`row_order`); 0 for none.
    """

    file: Path
    offset: int
    kind: str
    heads: int = 0


def row_order(rows: int, heads: int) -> Tensor:
    """The order in which llama.cpp stores rows of queries and keys: it rotates neighbours, not halves of a head."""
    order = torch.arange(rows)
    return order.view(heads, 2, -1).transpose(1, 2).flatten() if heads else order
