"""Every form as nodes that compute its matrix from initializers of few bits.

A matrix only depends on initializers, so onnxruntime computes it once, when it opens the file. The file is small, but
the model takes as much memory and time as with float32 weights. For a token table only the codes are computed then, and
only the rows that are read become floats.

``DequantizeLinear`` is not used. onnxruntime fuses it with the following product and then rounds the inputs to 8 bits,
which changes outputs by half a percent. Where it does not fuse them, it decodes the matrix at every call.

Forms register how their matrix is computed with ``@by_rows`` or ``@whole``, and a product without the matrix with
``@multiplies``. Forms of other packages register in the same way. A form that registers nothing is stored decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo.forms import (
    E8,
    Affine,
    BlockScaled,
    Codebook,
    Dense,
    DenseSparse,
    Folded,
    Form,
    Frequency,
    Grid,
    GroupedLowRank,
    Hash,
    Hashed,
    LowRank,
    RowBlocks,
    Scaled,
    Separable,
    Sparse,
    Sum,
    TensorTrain,
    Trellis,
    Trimmed,
    Vectors,
)
from octavo.forms.folded import FOLDS
from octavo.forms.frequency import cosines
from octavo.forms.grid import exponent_steps
from octavo.forms.hashed import PRIME
from octavo.forms.trellis import LANES, PARITY_TAPS, QUANTIZER_TAPS
from octavo.runtimes.lowering import Lowering
from octavo.runtimes.onnx.codes import narrowest, store, window_of, zero_byte
from octavo.runtimes.onnx.nodes import Nodes
from octavo.system.notes import Note, warn

#: Fewer floats are stored unchanged, since the nodes would take more bytes than they save.
_FEW = 256
#: More floats are not searched for repeated values; a tensor this large is as large as a matrix.
_MANY = 1 << 18
_LARGEST = torch.finfo(torch.float16).max
#: Bytes of the nodes that compute the quantizers of a trellis, per doubling of the rows.
_DOUBLING_BYTES = 500


@dataclass(frozen=True)
class Rows:
    """The selected rows of a matrix: all, or those in ``tokens``, in the shape of ``tokens``."""

    tokens: str | None = None

    def of(self, nodes: Nodes, part: str) -> str:
        """The selected rows of a part that has the rows of the matrix."""
        return part if self.tokens is None else str(nodes.add("Gather", [part, self.tokens], axis=0))


ALL = Rows()


#: How forms are computed row by row: functions of nodes, name, form and :class:`Rows`, which give float32.
by_rows = Lowering[Callable[[Nodes, str, Any, Rows], str]]("matrix for ONNX")
#: Nodes for ``x @ dense().T`` without the matrix: from nodes, name and ``x``.
Multiply = Callable[[Nodes, str, str], str]
#: The same by form; None where the matrix takes no more multiplications.
multiplies = Lowering[Callable[[Any], Multiply | None]]("product for ONNX")


def whole(*kinds: type[Form]) -> Callable[[Callable], Callable]:
    """Register how these forms are computed as a whole: a function of nodes, name and form."""

    def register(decode: Callable[[Nodes, str, Any], str]) -> Callable[[Nodes, str, Any], str]:
        def lower(nodes: Nodes, name: str, form: Form, rows: Rows) -> str:
            return rows.of(nodes, nodes.once(("whole", name), lambda: decode(nodes, name, form)))

        by_rows(*kinds)(lower)
        return decode

    return register


def product(nodes: Nodes, name: str, x: str, form: Form, dtype: torch.dtype = torch.float32) -> str:
    """Nodes for ``x @ dense().T``, through the factors if that needs fewer multiplications."""
    multiply = _without_matrix(form)
    if multiply is not None:
        return multiply(nodes, name, x)
    return str(nodes.add("MatMul", [x, nodes.add("Transpose", [weight(nodes, name, form, dtype)], perm=[1, 0])]))


def _without_matrix(form: Form) -> Multiply | None:
    lower = multiplies.find(form)
    return None if lower is None else lower(form)


@multiplies(Scaled)
def _scaled_product(form: Scaled) -> Multiply | None:
    base = _without_matrix(form.base)
    if base is None:
        return None

    def multiply(nodes: Nodes, name: str, x: str) -> str:
        factors = floats(nodes, f"{name}/gains", form.factors)
        return str(nodes.add("Mul", [base(nodes, name, x), factors]))

    return multiply


@multiplies(LowRank)
def _low_rank_product(form: LowRank) -> Multiply | None:
    rows, columns = form.shape
    if form.left.shape[1] * (rows + columns) >= rows * columns:
        return None

    def multiply(nodes: Nodes, name: str, x: str) -> str:
        inner = product(nodes, f"{name}/right", x, form.right)
        return product(nodes, f"{name}/left", inner, form.left)

    return multiply


def weight(nodes: Nodes, name: str, form: Form, dtype: torch.dtype = torch.float32, tokens: str | None = None) -> str:
    """Nodes for the matrix, or for its rows ``tokens``, rounded to ``dtype``, in float32."""
    found = decoded(nodes, name, form, Rows(tokens))
    if dtype == torch.float32:
        return found
    if dtype == torch.float16:
        # Same as :func:`octavo.system.raw.narrowed`.
        ends = [nodes.once(("end", k), partial(nodes.constant, "end", torch.tensor(k * _LARGEST))) for k in (-1, 1)]
        found = nodes.add("Clip", [found, *ends])
    return nodes.cast(nodes.cast(found, dtype), torch.float32)


def decoded(nodes: Nodes, name: str, form: Form, rows: Rows) -> str:
    """Nodes for the selected rows of a form, in float32."""
    lower = by_rows.find(form)
    if lower is not None:
        return lower(nodes, name, form, rows)
    warn([Note(f"{name}: {by_rows.missing(form)}")], depth=1)
    return rows.of(nodes, nodes.once(("whole", name), lambda: floats(nodes, name, form.dense())))


def floats(nodes: Nodes, name: str, values: Tensor, rows: Rows = ALL) -> str:
    """Floats in the smallest exact precision or as a table of values; read as float32."""
    stored = narrow(values) if values.numel() >= _FEW else values.float()
    if _FEW <= values.numel() <= _MANY:
        table, index = values.float().unique(return_inverse=True)
        if 4 * len(table) + values.numel() * (1 if len(table) <= 256 else 2) < stored.nbytes and len(table) < 2**15:
            return _codebook(nodes, name, Codebook(index, table), rows)
    value = rows.of(nodes, nodes.once(("floats", name), lambda: nodes.constant(name, stored)))
    return value if stored.dtype == torch.float32 else nodes.cast(value, torch.float32)


def narrow(values: Tensor) -> Tensor:
    """The values in 16 bits if they hold them exactly, else in float32."""
    exact = (d for d in (torch.float16, torch.bfloat16) if torch.equal(values.to(d).float(), values.float()))
    return values.to(next(exact, torch.float32))


def _codes(nodes: Nodes, name: str, codes: Tensor, rows: Rows = ALL) -> tuple[str, int]:
    """Integers by rows, before their shift is added."""
    value, shift = nodes.once(("codes", name), lambda: store(nodes, f"{name}/codes", codes))
    return rows.of(nodes, value), shift


def _index(nodes: Nodes, name: str, index: Tensor, rows: Rows = ALL) -> str:
    """Integers by rows, as indices."""
    value, shift = _codes(nodes, name, index, rows)
    value = nodes.cast(value, torch.int32)
    if not shift:
        return value
    wanted = torch.tensor(shift, dtype=torch.int32)
    return str(nodes.add("Add", [value, nodes.once(("index", shift), lambda: nodes.constant("shift", wanted))]))


def _shifted(nodes: Nodes, value: str, shift: int) -> str:
    """A float tensor with an integer added, which is exact."""
    if not shift:
        return value
    wanted = torch.tensor(float(shift))
    return str(nodes.add("Add", [value, nodes.once(("shift", shift), lambda: nodes.constant("shift", wanted))]))


def _picked(part: Tensor, rows: Rows) -> Rows:
    """The index for a part that may have one row for all."""
    return rows if len(part) > 1 else ALL


def _spread(nodes: Nodes, value: str, groups: int, columns: int) -> str:
    """Per-group values expanded to per-column values."""
    if groups == 1:
        return value
    member = torch.arange(columns) // -(-columns // groups)
    index = nodes.once(("groups", groups, columns), lambda: _index(nodes, f"groups.{groups}x{columns}", member))
    return str(nodes.add("Gather", [value, index], axis=-1))


@by_rows(Grid)
def _grid(nodes: Nodes, name: str, form: Grid, rows: Rows) -> str:
    groups, columns = form.scale.shape[1], form.shape[1]
    value, shift = _codes(nodes, name, form.codes, rows)
    value = nodes.cast(value, torch.float32)
    if form.zero is not None:
        zero, low = _codes(nodes, f"{name}/zero", form.zero, _picked(form.zero, rows))
        zero, shift = nodes.cast(zero, torch.float32), shift - low
        value = str(nodes.add("Sub", [_shifted(nodes, value, shift), _spread(nodes, zero, groups, columns)]))
    else:
        value = _shifted(nodes, value, shift)
    steps = floats(nodes, f"{name}/scale", form.scale, _picked(form.scale, rows))
    if form.rows is not None:
        own = floats(nodes, f"{name}/rows", exponent_steps(form.rows)[:, None], rows)
        steps = str(nodes.add("Mul", [steps, own]))
    value = str(nodes.add("Mul", [value, _spread(nodes, steps, groups, columns)]))
    if form.columns is None:
        return value
    return str(nodes.add("Mul", [value, floats(nodes, f"{name}/columns", exponent_steps(form.columns))]))


@by_rows(Trellis)
def _trellis(nodes: Nodes, name: str, form: Trellis, rows: Rows) -> str:
    levels, doublings = form.levels(), max(1, len(form.grid.codes) // LANES).bit_length()
    if window_of(form.grid.codes).bytes + doublings * _DOUBLING_BYTES < window_of(levels.codes).bytes:
        # Levels have one bit more than the codes; it is computed if that is smaller.
        nodes.once(("codes", name), lambda: (_levels(nodes, name, form.grid.codes, levels.codes), 0))
    return _grid(nodes, name, levels, rows)


def _levels(nodes: Nodes, name: str, codes: Tensor, levels: Tensor) -> str:
    """``2 * codes + quantizer``, with the bits of :data:`octavo.forms.trellis.QUANTIZERS` as nodes."""
    value = _index(nodes, f"{name}/trellis", codes)
    one, two = (nodes.once(("int", k), partial(nodes.constant, "int", torch.tensor(k).int())) for k in (1, 2))
    parities = nodes.cast(nodes.add("BitwiseAnd", [value, one]), torch.uint8)
    rows, columns = codes.shape

    def delayed(part: str, steps: int) -> str | None:
        if steps * LANES >= rows:
            return None
        zeros = nodes.add("ConstantOfShape", [nodes.sizes(steps * LANES, columns)], value=zero_byte())
        early = nodes.add("Slice", [part, nodes.sizes(0), nodes.sizes(rows - steps * LANES)])
        return str(nodes.add("Concat", [zeros, early], axis=0))

    def added(total: str, part: str | None) -> str:
        return total if part is None else str(nodes.add("BitwiseXor", [total, part]))

    chosen = str(nodes.add("ConstantOfShape", [nodes.sizes(rows, columns)], value=zero_byte()))
    for tap in PARITY_TAPS:
        chosen = added(chosen, delayed(parities, tap))
    power = 1
    while power * LANES < rows:
        before = chosen
        for tap in QUANTIZER_TAPS:
            chosen = added(chosen, delayed(before, tap * power))
        power *= 2
    doubled = nodes.add("Mul", [value, two])
    return nodes.cast(nodes.add("Add", [doubled, nodes.cast(chosen, torch.int32)]), narrowest(levels))


@by_rows(Affine)
def _affine(nodes: Nodes, name: str, form: Affine, rows: Rows) -> str:
    groups, columns = form.step.shape[1], form.shape[1]
    value, shift = _codes(nodes, name, form.codes, rows)
    value = _shifted(nodes, nodes.cast(value, torch.float32), shift)
    for kind, part, values in (("Mul", "step", form.step), ("Add", "offset", form.offset)):
        if values is not None:
            own = _spread(nodes, floats(nodes, f"{name}/{part}", values, rows), groups, columns)
            value = str(nodes.add(kind, [value, own]))
    return value if form.rounded == torch.float32 else nodes.cast(nodes.cast(value, form.rounded), torch.float32)


@by_rows(E8)
def _e8(nodes: Nodes, name: str, form: E8, rows: Rows) -> str:
    # Twice a point is whole.
    return _grid(nodes, name, Grid((2 * form.dense()).to(torch.int32), torch.full((1, 1), 0.5)), rows)


@by_rows(Codebook)
def _codebook(nodes: Nodes, name: str, form: Codebook, rows: Rows) -> str:
    values = nodes.once(("values", name), lambda: nodes.constant(f"{name}/values", form.values.float()))
    found = str(nodes.add("Gather", [values, _index(nodes, name, form.codes, rows)], axis=0))
    if form.scale is None:
        return found
    return str(nodes.add("Mul", [found, floats(nodes, f"{name}/scale", form.scale, rows)]))


@by_rows(BlockScaled)
def _block_scaled(nodes: Nodes, name: str, form: BlockScaled, rows: Rows) -> str:
    own = decoded(nodes, f"{name}/scales", form.scales, rows)
    scales = _spread(nodes, own, form.scales.shape[1], form.shape[1])
    return str(nodes.add("Mul", [decoded(nodes, f"{name}/base", form.base, rows), scales]))


@by_rows(Vectors)
def _vectors(nodes: Nodes, name: str, form: Vectors, rows: Rows) -> str:
    books, subspaces, entries, width = form.values.shape
    groups, columns = 1 if form.scale is None else form.scale.shape[1], form.columns
    starts, whole = torch.arange(subspaces).int() * entries, ""
    for book in range(books):
        part = f"{name}/{book}"
        places = _index(nodes, part, form.codes[book], rows)
        if subspaces > 1:
            first = nodes.once(("starts", name), lambda: nodes.constant(f"{name}/starts", starts))
            places = str(nodes.add("Add", [places, first]))
        table = floats(nodes, f"{part}/values", form.values[book].reshape(-1, width))
        found = str(nodes.add("Gather", [table, places], axis=0))
        whole = str(nodes.add("Add", [whole, found])) if book else found
    value = _joined(nodes, whole, columns)
    if form.scale is None:
        return value
    steps = floats(nodes, f"{name}/scale", form.scale, _picked(form.scale, rows))
    return str(nodes.add("Mul", [value, _spread(nodes, steps, groups, columns)]))


@by_rows(Hashed)
def _hashed(nodes: Nodes, name: str, form: Hashed, rows: Rows) -> str:
    if rows.tokens is None:
        ends = [_scalar(nodes, n) for n in (0, form.rows, 1)]
        number = str(nodes.add("Range", ends))
    else:
        number = nodes.cast(rows.tokens, torch.int64)
    if form.pieces > 1:
        first = nodes.add("Mul", [nodes.add("Unsqueeze", [number, nodes.sizes(-1)]), _scalar(nodes, form.pieces)])
        number = str(nodes.add("Add", [first, nodes.add("Range", [_scalar(nodes, n) for n in (0, form.pieces, 1)])]))
    table, whole = decoded(nodes, f"{name}/table", form.table, ALL), ""
    for one in form.hashes:
        found = _taken(nodes, table, number, one)
        whole = str(nodes.add("Mul" if form.product else "Add", [whole, found])) if whole else found
    return _joined(nodes, whole, form.columns) if form.pieces > 1 else whole


def _taken(nodes: Nodes, table: str, number: str, one: Hash) -> str:
    """Pieces of a table by hash, (..., width), as in :meth:`octavo.forms.Hash.places`."""
    shifted = nodes.add("Div", [number, _scalar(nodes, one.divisor)])
    shifted = nodes.add("Add", [nodes.add("Mul", [shifted, _scalar(nodes, one.factor)]), _scalar(nodes, one.shift)])
    hashed = nodes.add("Mod", [shifted, _scalar(nodes, PRIME)])
    place = nodes.add("Add", [nodes.add("Mod", [hashed, _scalar(nodes, one.size)]), _scalar(nodes, one.start)])
    found = str(nodes.add("Gather", [table, place], axis=0))
    if not one.signed:
        return found
    odd = nodes.add("Mod", [nodes.add("Div", [hashed, _scalar(nodes, one.size)]), _scalar(nodes, 2)])
    sign = nodes.add("Sub", [_scalar(nodes, 1), nodes.add("Mul", [odd, _scalar(nodes, 2)])])
    return str(nodes.add("Mul", [found, nodes.add("Unsqueeze", [nodes.cast(sign, torch.float32), nodes.sizes(-1)])]))


def _scalar(nodes: Nodes, number: int) -> str:
    return nodes.once(("int64", number), lambda: nodes.constant("int64", torch.tensor(number)))


def _joined(nodes: Nodes, value: str, columns: int) -> str:
    """Pieces (..., pieces, width) next to each other, (..., columns), of which the last may be cut."""
    lead = nodes.add("Slice", [nodes.add("Shape", [value]), nodes.sizes(0), nodes.sizes(-2)])
    joined = nodes.add("Reshape", [value, nodes.add("Concat", [lead, nodes.sizes(-1)], axis=0)])
    return str(nodes.add("Slice", [joined, nodes.sizes(0), nodes.sizes(columns), nodes.sizes(-1)]))


@by_rows(Dense)
def _dense(nodes: Nodes, name: str, form: Dense, rows: Rows) -> str:
    return floats(nodes, name, form.weight, rows)


@by_rows(LowRank)
def _low_rank(nodes: Nodes, name: str, form: LowRank, rows: Rows) -> str:
    right = decoded(nodes, f"{name}/right", form.right, ALL)
    return str(nodes.add("MatMul", [decoded(nodes, f"{name}/left", form.left, rows), right]))


@by_rows(Sum)
def _sum(nodes: Nodes, name: str, form: Sum, rows: Rows) -> str:
    parts = (("base", form.base), ("correction", form.correction))
    return str(nodes.add("Add", [decoded(nodes, f"{name}/{part}", inner, rows) for part, inner in parts]))


@by_rows(Scaled)
def _scaled(nodes: Nodes, name: str, form: Scaled, rows: Rows) -> str:
    factors = floats(nodes, f"{name}/gains", form.factors[:, None], rows)
    return str(nodes.add("Mul", [decoded(nodes, name, form.base, rows), factors]))


@whole(Trimmed)
def _cut(nodes: Nodes, name: str, form: Trimmed) -> str:
    # Cut rows and columns read from an appended row and column of zeros.
    value = nodes.add("Pad", [decoded(nodes, name, form.inner, ALL), nodes.sizes(0, 0, 1, 1)])
    for axis, kept in enumerate((form.rows, form.columns)):
        places = torch.where(kept, kept.cumsum(0) - 1, kept.sum())
        value = nodes.add("Gather", [value, _index(nodes, f"{name}/axis{axis}", places)], axis=axis)
    return str(value)


@whole(Sparse)
def _sparse(nodes: Nodes, name: str, form: Sparse) -> str:
    import onnx

    zero = onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [1], [0.0])
    zeros = str(nodes.add("ConstantOfShape", [nodes.sizes(*form.shape)], value=zero))
    if not form.values.shape[1]:
        return zeros
    mask = _index(nodes, f"{name}/mask", form.mask.to(torch.uint8))
    places = nodes.add("Transpose", [nodes.add("NonZero", [mask])], perm=[1, 0])
    values = nodes.reshape(decoded(nodes, f"{name}/values", form.values, ALL), -1)
    return str(nodes.add("ScatterND", [zeros, places, values]))


@whole(DenseSparse)
def _dense_sparse(nodes: Nodes, name: str, form: DenseSparse) -> str:
    rows, columns = form.shape
    blocks = form.values.shape[1] // form.nonzeros
    atoms, width = form.dictionary.shape[0] // blocks, form.dictionary.shape[1]
    starts = nodes.constant(f"{name}/starts", torch.arange(blocks).repeat_interleave(form.nonzeros).int() * atoms)
    places = nodes.add("Add", [_index(nodes, f"{name}/index", form.index), starts])
    picked = nodes.add("Gather", [decoded(nodes, f"{name}/dictionary", form.dictionary, ALL), places], axis=0)
    shares = nodes.reshape(decoded(nodes, f"{name}/values", form.values, ALL), rows, -1, 1)
    parts = nodes.reshape(nodes.add("Mul", [picked, shares]), rows, blocks, form.nonzeros, width)
    whole = nodes.reshape(nodes.add("ReduceSum", [parts, nodes.sizes(2)], keepdims=0), rows, -1)
    return str(nodes.add("Slice", [whole, nodes.sizes(0), nodes.sizes(columns), nodes.sizes(1)]))


@whole(Folded)
def _folded(nodes: Nodes, name: str, form: Folded) -> str:
    order, _ = FOLDS[form.fold]
    sizes = (form.shape[0], *form.kernel)
    apart = nodes.reshape(decoded(nodes, name, form.inner, ALL), *(sizes[axis] for axis in order))
    back = nodes.add("Transpose", [apart], perm=[order.index(axis) for axis in range(4)])
    return nodes.reshape(back, *form.shape)


@whole(Frequency)
def _frequency(nodes: Nodes, name: str, form: Frequency) -> str:
    rows, height, width = form.block
    value = decoded(nodes, name, form.coefficients, ALL)
    if width > 1:
        value = nodes.reshape(value, -1, width)
        value = str(nodes.add("MatMul", [value, _cosines(nodes, width)]))
    for side, last in ((height, width), (rows, form.shape[1])):
        if side > 1:
            inverse = nodes.add("Transpose", [_cosines(nodes, side)], perm=[1, 0])
            value = str(nodes.add("MatMul", [inverse, nodes.reshape(value, -1, side, last)]))
    return nodes.reshape(value, *form.shape)


def _cosines(nodes: Nodes, size: int) -> str:
    return nodes.once(("cosines", size), lambda: nodes.constant(f"cosines.{size}", cosines(size)))


@whole(GroupedLowRank)
def _grouped(nodes: Nodes, name: str, form: GroupedLowRank) -> str:
    rank = form.left.shape[1] // form.groups
    left = nodes.reshape(decoded(nodes, f"{name}/left", form.left, ALL), -1, form.groups, rank)
    right = nodes.reshape(decoded(nodes, f"{name}/right", form.right, ALL), form.groups, rank, -1)
    return nodes.reshape(nodes.add("Einsum", [left, right], equation="rgj,gjw->rgw"), *form.shape)


@whole(RowBlocks)
def _row_blocks(nodes: Nodes, name: str, form: RowBlocks) -> str:
    blocks = [decoded(nodes, f"{name}/{number}", block, ALL) for number, block in enumerate(form.blocks)]
    whole = nodes.add("Concat", blocks, axis=0)
    places = form.member.argsort(stable=True).argsort()
    return str(nodes.add("Gather", [whole, _index(nodes, f"{name}/places", places)], axis=0))


@whole(Separable)
def _separable(nodes: Nodes, name: str, form: Separable) -> str:
    parts = [
        nodes.reshape(decoded(nodes, f"{name}/{part}", inner, ALL), form.terms, -1, inner.shape[1])
        for part, inner in (("c", form.channel), ("y", form.vertical), ("x", form.horizontal))
    ]
    return nodes.reshape(nodes.add("Einsum", parts, equation="tnc,tny,tnx->ncyx"), *form.shape)


@whole(TensorTrain)
def _tensor_train(nodes: Nodes, name: str, form: TensorTrain) -> str:
    rows, columns, value = 1, 1, ""
    modes = zip(form.cores, form.row_modes, form.column_modes, form.ranks, strict=False)
    for number, (core, o, i, rank) in enumerate(modes):
        part = nodes.reshape(decoded(nodes, f"{name}/{number}", core, ALL), rank, o, i, -1)
        if number:
            part = nodes.add("Einsum", [value, part], equation="RCa,aoib->RoCib")
        rows, columns = rows * o, columns * i
        value = nodes.reshape(part, rows, columns, -1)
    value = nodes.reshape(value, rows, columns)
    return str(nodes.add("Slice", [value, nodes.sizes(0, 0), nodes.sizes(form.rows, form.columns)]))
