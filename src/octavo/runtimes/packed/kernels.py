"""Kernels for forms.

PyTorch has two matrix products for packed weights that are fast on a CPU, both for bfloat16 inputs: 4-bit codes in
groups of columns, and 8-bit codes with one scale a row. Other forms are multiplied without a kernel, decoding a few
rows at a time. ``torchao`` reaches the same two operators through more layers.

Kernels register for their forms with ``@runs(Grid)``. Kernels of other packages register in the same way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from octavo.forms import Dense, Form, Grid, LowRank, Sum
from octavo.forms.grid import exponent_steps
from octavo.runtimes.lowering import Lowering

#: Columns that share a scale in the int4 kernel.
GROUPS = (32, 64, 128, 256)
#: The int8 kernel reads this many columns at a time; with a remainder it silently gives wrong results.
INT8_COLUMNS = 16
#: Rows that the int4 kernel packs together.
_BLOCK = 64
#: Largest number of inputs for the int8 kernel; for many it is several times slower than a cast and a dense product.
_FEW = 16
#: Weights packed or cast at a time, since the packer needs int32.
_CHUNK = 1 << 22

F = TypeVar("F", bound=Form)


@dataclass(frozen=True)
class Geometry:
    """How a convolution of one group moves over its input; one number for every axis, or one for each.

    Padding may be ``"same"`` or ``"valid"``.
    """

    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] | str = 0
    dilation: int | Sequence[int] = 1


class Kernel(ABC, Generic[F]):
    """A matrix (rows, columns) in its in-memory representation, with its product.

    Parameters
    ----------
    form
        The form, for which :meth:`fits` must be true.
    """

    #: Name in reports.
    name: ClassVar[str]

    def __init__(self, form: F) -> None:
        self.shape = form.shape

    @classmethod
    def fits(cls, form: F) -> bool:
        """Whether this kernel can run a form that it is for, on this machine."""
        return True

    @classmethod
    @abstractmethod
    def bytes(cls, form: F, rows: int) -> int:
        """Bytes of :meth:`tensors` for the given number of rows, without creating them."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All tensors in memory."""

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """``x @ matrix.T`` for ``x`` (n, columns) of any floating dtype; the result has the same dtype."""

    @abstractmethod
    def lookup(self, index: Tensor) -> Tensor:
        """Rows of the matrix, (n, columns) in float32, for ``index`` (n,)."""

    def dense(self) -> Tensor:
        """The matrix in float32."""
        return self.lookup(torch.arange(self.shape[0]))

    def convolve(self, x: Tensor, shape: tuple[int, ...], bias: Tensor | None, geometry: Geometry) -> Tensor | None:
        """The convolution with the matrix as a weight of ``shape``; None if that needs the dense weight."""
        return None

    @property
    def convolves(self) -> bool:
        """Whether :meth:`convolve` returns a result."""
        return False

    @property
    def names(self) -> list[str]:
        """Names of all kernels used by a product."""
        return [self.name]


#: Kernels by the forms that they are for.
runs = Lowering[type[Kernel]]("packed kernel")


@runs(Dense)
class BFloat16(Kernel[Form]):
    """The matrix in bfloat16. Codes of more than 8 bits would take as much memory and run slower."""

    name = "bfloat16 dense"

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        self.weight = form.dense().bfloat16()

    @classmethod
    def bytes(cls, form: Form, rows: int) -> int:  # noqa: D102
        return 2 * rows * form.shape[1]

    def tensors(self) -> list[Tensor]:  # noqa: D102
        return [self.weight]

    def matmul(self, x: Tensor) -> Tensor:  # noqa: D102
        return torch.nn.functional.linear(x.bfloat16(), self.weight).to(x.dtype)

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        return self.weight[index].float()


@runs(Grid)
class Int4(Kernel[Grid]):
    """Codes of at most 16 levels in groups of columns: ``scale * (code - 8) + offset``, both bfloat16.

    A grid's column steps are multiplied into the inputs, row steps into the scales. Rows are padded to whole blocks.
    """

    name = "int4 (aten._weight_int4pack_mm_for_cpu)"

    def __init__(self, form: Grid) -> None:
        super().__init__(form)
        rows, columns = form.shape
        padded = -(-rows // _BLOCK) * _BLOCK
        self.group = _group(form)
        low = _lowest(form.codes)
        scale = _row_scaled(form).expand(rows, -1)
        zero = torch.zeros(1) if form.zero is None else form.zero.float()
        both = torch.stack([scale, scale * (8 + low - zero)], 2)
        # A grid with one scale per row has equal scales in all groups.
        both = both.expand(-1, columns // self.group, -1).transpose(0, 1)
        self.scales = torch.nn.functional.pad(both, (0, 0, 0, padded - rows)).bfloat16().contiguous()
        self.codes = torch.empty(padded, columns // 2, dtype=torch.uint8)
        step = max(1, _CHUNK // (columns * _BLOCK)) * _BLOCK
        for start in range(0, padded, step):
            chunk = form.codes[start : start + step].int() - low
            chunk = torch.nn.functional.pad(chunk, (0, 0, 0, min(step, padded - start) - len(chunk)), value=8)
            self.codes[start : start + step] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(chunk, 1)
        self.columns = None if form.columns is None else exponent_steps(form.columns)

    @classmethod
    def fits(cls, form: Grid) -> bool:  # noqa: D102
        if not _group(form) or int4_layout() is None:
            return False
        return int(form.codes.max()) - _lowest(form.codes) < 16

    @classmethod
    def bytes(cls, form: Grid, rows: int) -> int:  # noqa: D102
        columns, padded = form.shape[1], -(-rows // _BLOCK) * _BLOCK
        steps = 0 if form.columns is None else 4 * columns
        return padded * columns // 2 + padded * (columns // _group(form)) * 4 + steps

    def tensors(self) -> list[Tensor]:  # noqa: D102
        return [self.codes, self.scales] + ([] if self.columns is None else [self.columns])

    def matmul(self, x: Tensor) -> Tensor:  # noqa: D102
        inner = _inputs(x, self.columns)
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(inner, self.codes, self.group, self.scales)
        return out[:, : self.shape[0]].to(x.dtype)

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        layout, columns = int4_layout(), self.shape[1]
        assert layout is not None
        block, place, shift = layout
        inner = index % block
        first = (index - inner) * (columns // 2) + place[inner]
        bytes_ = self.codes.view(-1)[first[:, None] + torch.arange(columns) * (block // 2)]
        codes = ((bytes_ >> shift[inner][:, None]) & 15).float()
        scale, offset = self.scales[:, index].float().permute(2, 1, 0).repeat_interleave(self.group, 2)
        weight = (codes - 8).mul_(scale).add_(offset)
        return weight if self.columns is None else weight.mul_(self.columns)


@runs(Grid)
class Int8Kernel(Kernel[Grid]):
    """Codes of 8 bits with one bfloat16 scale per row. Column steps of a grid are multiplied into the inputs."""

    name = "int8 (aten._weight_int8pack_mm)"

    def __init__(self, form: Grid) -> None:
        super().__init__(form)
        zero = 0 if form.zero is None else form.zero.int()
        self.codes = (form.codes.int() - zero).to(torch.int8).contiguous()
        self.scale = _row_scaled(form)[:, 0].expand(form.shape[0]).bfloat16().contiguous()
        self.columns = None if form.columns is None else exponent_steps(form.columns)

    @classmethod
    def fits(cls, form: Grid) -> bool:  # noqa: D102
        if form.scale.shape[1] != 1 or form.shape[1] % INT8_COLUMNS or 0 in form.shape:
            return False
        low, high = form.codes.int().amin(1), form.codes.int().amax(1)
        zero = 0 if form.zero is None else form.zero.int().view(-1)
        return bool(((low - zero) >= -128).all() and ((high - zero) <= 127).all())

    @classmethod
    def bytes(cls, form: Grid, rows: int) -> int:  # noqa: D102
        columns = form.shape[1]
        return rows * columns + 2 * rows + (0 if form.columns is None else 4 * columns)

    def tensors(self) -> list[Tensor]:  # noqa: D102
        return [self.codes, self.scale] + ([] if self.columns is None else [self.columns])

    def matmul(self, x: Tensor) -> Tensor:  # noqa: D102
        inner = _inputs(x, self.columns)
        if len(x) <= _FEW:
            return torch.ops.aten._weight_int8pack_mm(inner, self.codes, self.scale).to(x.dtype)
        # 8 bits are exact in bfloat16, so the codes only need a cast.
        step = max(1, _CHUNK // self.shape[1])
        parts = (torch.nn.functional.linear(inner, codes.bfloat16()) for codes in self.codes.split(step))
        return (torch.cat(list(parts), 1) * self.scale).to(x.dtype)

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        weight = self.codes[index].float().mul_(self.scale[index].float()[:, None])
        return weight if self.columns is None else weight.mul_(self.columns)


class _Pair(Kernel[F]):
    """Two matrices, each with its own kernel."""

    parts: ClassVar[tuple[str, str]]

    def __init__(self, form: F) -> None:
        super().__init__(form)
        self.first, self.second = (kernel_for(getattr(form, part)) for part in self.parts)

    def tensors(self) -> list[Tensor]:
        return self.first.tensors() + self.second.tensors()

    @property
    def names(self) -> list[str]:
        return self.first.names + self.second.names


@runs(LowRank)
class Product(_Pair[LowRank]):
    """Two thin matrices, applied in sequence."""

    name, parts = "two thin products", ("left", "right")

    @classmethod
    def bytes(cls, form: LowRank, rows: int) -> int:  # noqa: D102
        return resident_bytes(form.left, rows) + resident_bytes(form.right)

    def matmul(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.first.matmul(self.second.matmul(x))

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        return self.first.lookup(index) @ self.second.dense()


@runs(Sum)
class Total(_Pair[Sum]):
    """Two matrices of one shape; their products are added."""

    name, parts = "sum of two products", ("base", "correction")

    @classmethod
    def bytes(cls, form: Sum, rows: int) -> int:  # noqa: D102
        return resident_bytes(form.base, rows) + resident_bytes(form.correction, rows)

    def matmul(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.first.matmul(x) + self.second.matmul(x)

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        return self.first.lookup(index) + self.second.lookup(index)


class DenseKernel(Kernel[Form]):
    """Any form on any machine: its unchanged parts, multiplied by :meth:`octavo.forms.Form.apply`."""

    name = "none (decoded while running)"

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        self.form = form

    @classmethod
    def bytes(cls, form: Form, rows: int) -> int:  # noqa: D102
        own = form.shape[0]
        sizes = (part.nbytes * (rows if len(part) == own else own) / own for part in form.held())
        return round(sum(sizes))

    def tensors(self) -> list[Tensor]:  # noqa: D102
        return self.form.held()

    def matmul(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.form.apply(x)

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        return self.form.lookup(index)

    def dense(self) -> Tensor:  # noqa: D102
        return self.form.dense()


def kernel_for(form: Form) -> Kernel:
    """Prepare a form for the best kernel available on this machine."""
    return _choose(form)(form)


def resident_bytes(form: Form, rows: int | None = None) -> int:
    """Bytes of a form while it runs, optionally for another number of ``rows``, without preparing it."""
    return _choose(form).bytes(form, form.shape[0] if rows is None else rows)


def _choose(form: Form) -> type[Kernel]:
    found = next((kernel for kernel in runs.every(form) if kernel.fits(form)), None)
    if found is not None:
        return found
    # Without a kernel of its own a form runs from its parts, unless the matrix takes no more memory and runs faster.
    rows = form.shape[0]
    return BFloat16 if BFloat16.bytes(form, rows) <= DenseKernel.bytes(form, rows) else DenseKernel


def _inputs(x: Tensor, steps: Tensor | None) -> Tensor:
    """Inputs in the dtype of the kernels, times the column steps."""
    return (x if steps is None else x * steps).bfloat16().contiguous()


def _group(form: Grid) -> int:
    """Group size if the int4 kernel supports it, else 0; one scale per row uses the widest supported group."""
    columns, groups = form.shape[1], form.scale.shape[1]
    if 0 in form.shape:
        return 0
    if groups == 1:
        return max((group for group in GROUPS if columns % group == 0), default=0)
    width = columns // groups
    return width if width in GROUPS and columns % groups == 0 else 0


def _lowest(codes: Tensor) -> int:
    """The code that becomes 0. Symmetric codes are centred, so that their offsets are exactly zero."""
    low, high = int(codes.min()), int(codes.max())
    return 0 if low >= 0 and high < 16 else -8 if low >= -8 and high < 8 else low


def _row_scaled(form: Grid) -> Tensor:
    """Scales times row steps, (rows or 1, groups) in float32."""
    scale = form.scale.float()
    return scale if form.rows is None else scale * exponent_steps(form.rows)[:, None]


@cache
def int4_layout() -> tuple[int, Tensor, Tensor] | None:
    """The layout of this machine's int4 packer: rows per block, and the byte and shift of each row.

    The layout differs between instruction sets. Looking up rows needs it, so it is determined from a packed block: code
    ``(r, k)`` is in byte ``k * rows / 2 + place[r]`` of its block. None if there is no such packer, or it differs.
    """
    columns = 32
    number = torch.arange(_BLOCK * columns, dtype=torch.int32).view(_BLOCK, columns)
    source = torch.zeros(_BLOCK * columns, dtype=torch.int64)
    try:
        for digit in range(3):
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(number >> (4 * digit) & 15, 1).flatten()
            both = torch.stack([packed & 15, packed >> 4], 1).flatten()
            source += both.long() << (4 * digit)
    except (AttributeError, RuntimeError):
        return None
    where = source.argsort().view(_BLOCK, columns)
    block = 2 * (int(where[0, 1]) // 2 - int(where[0, 0]) // 2)
    if block <= 0 or _BLOCK % block:
        return None
    row = torch.arange(_BLOCK)
    place, shift = where[:block, 0] // 2, (where[:block, 0] % 2 * 4).to(torch.uint8)
    start = (row - row % block) * (columns // 2) + place[row % block]
    expected = 2 * (start[:, None] + torch.arange(columns) * (block // 2)) + (shift[row % block] // 4).long()[:, None]
    return (block, place, shift) if torch.equal(where, expected) else None
