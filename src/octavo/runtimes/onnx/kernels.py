"""Kernels of onnxruntime's CPU provider, and the nodes by which a form runs on each.

========== ============================================================ ====================================
kernel     nodes                                                        forms
========== ============================================================ ====================================
float32    MatMul, or Gather of a table                                 all, as dense
int8       DynamicQuantizeLinear, MatMulInteger: inputs rounded to 8    Grid with one step a row and codes
           bits with one step for the whole tensor                      that span at most 8 bits
blocks     MatMulNBits: inputs rounded to 8 bits with one step for      Grid with groups of 16, 32, 64, 128
           every group of every row                                     or 256 columns and 4 or 8 bits
========== ============================================================ ====================================

The factors of a ``LowRank`` and the terms of a ``Sum`` run one after another, each on its own kernel. All nodes but
MatMulNBits are plain ONNX; onnxruntime fuses those around MatMulInteger into one when it loads the file.

A class that is decorated with ``@runs_in_graph`` says how a form runs otherwise than dense; so does one of another
package.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from octavo.errors import RequestError
from octavo.forms import Dense, Form, Grid, LowRank, Sum
from octavo.forms.grid import exponent_steps
from octavo.runtimes.lowering import Lowering
from octavo.runtimes.onnx.filling import filled
from octavo.runtimes.onnx.graph import LOOKUP, WEIGHT, is_placeholder
from octavo.runtimes.onnx.nodes import MICROSOFT, Nodes
from octavo.runtimes.onnx.weights import product, weight

FLOAT, INT8, BLOCKS = "float32", "int8", "blocks"
KERNELS = (FLOAT, INT8, BLOCKS)

BLOCK_WIDTHS = (16, 32, 64, 128, 256)
#: MatMulNBits with inputs rounded to 8 bits, the only level at which it is faster than float32.
_ACCURACY_INT8 = 4


F = TypeVar("F", bound=Form)


class GraphRun(Generic[F]):
    """How a form runs in a graph: here decoded to a dense matrix, in float32."""

    def __init__(self, form: F) -> None:
        self.form = form

    @property
    def kernel(self) -> str:
        """The integer kernel that the form can run on, or ``float32``."""
        return FLOAT

    def steps(self, kernel: str) -> tuple[Form, ...]:
        """The forms inside it that run on a kernel by themselves, in this order; none if it runs as one."""
        return ()

    def detail(self, kernel: str) -> str:
        """What its latency on a kernel depends on, beside its shape."""
        return ""

    def multiply(self, nodes: Nodes, name: str, x: str, kernel: str) -> str:
        """Nodes for ``x @ dense().T``; returns the name of the product."""
        return str(nodes.add("MatMul", [x, nodes.constant(name, self.form.dense().t())]))

    def lookup(self, nodes: Nodes, name: str, tokens: str) -> str:
        """Nodes for the rows that tokens name; returns the name of the rows."""
        return str(nodes.add("Gather", [nodes.constant(name, self.form.dense()), tokens], axis=0))


#: Ways to run by the forms that they are for.
runs_in_graph = Lowering[type[GraphRun]]("way to run in a graph")


def graph_run(form: Form) -> GraphRun:
    """How a form runs."""
    return (runs_in_graph.find(form) or GraphRun)(form)


def kernel_of(form: Form) -> str:
    """The integer kernel that a form can run on, or ``float32``; for nested forms the kernel of any part."""
    return graph_run(form).kernel


def multiply(nodes: Nodes, name: str, x: str, form: Form, kernel: str) -> str:
    """Nodes for ``x @ dense().T``; returns the name of the product."""
    return graph_run(form).multiply(nodes, name, x, kernel)


def _shared(*parts: Form) -> str:
    """The one integer kernel that any of the parts can run on."""
    found = {kernel_of(part) for part in parts} - {FLOAT}
    return found.pop() if len(found) == 1 else FLOAT


@runs_in_graph(Dense)
class _OfDense(GraphRun[Dense]):
    """Half as large in a file if it is a table in float16."""

    def lookup(self, nodes: Nodes, name: str, tokens: str) -> str:
        if self.form.weight.dtype != torch.float16:
            return super().lookup(nodes, name, tokens)
        row = nodes.add("Gather", [nodes.constant(name, self.form.weight), tokens], axis=0)
        return str(nodes.add("Cast", [row], to=1))


@runs_in_graph(LowRank)
class _OfLowRank(GraphRun[LowRank]):
    """Factor after factor."""

    @property
    def kernel(self) -> str:
        return _shared(self.form.left, self.form.right)

    def steps(self, kernel: str) -> tuple[Form, ...]:
        return (self.form.right, self.form.left)

    def multiply(self, nodes: Nodes, name: str, x: str, kernel: str) -> str:
        inner = multiply(nodes, f"{name}/right", x, self.form.right, kernel)
        return multiply(nodes, f"{name}/left", inner, self.form.left, kernel)


@runs_in_graph(Sum)
class _OfSum(GraphRun[Sum]):
    """Term after term, but in float32 as one matrix."""

    @property
    def kernel(self) -> str:
        return _shared(self.form.base, self.form.correction)

    def steps(self, kernel: str) -> tuple[Form, ...]:
        return () if kernel == FLOAT else (self.form.base, self.form.correction)

    def multiply(self, nodes: Nodes, name: str, x: str, kernel: str) -> str:
        parts = self.steps(kernel)
        if not parts:
            return super().multiply(nodes, name, x, kernel)
        return str(nodes.add("Add", [multiply(nodes, f"{name}/{k}", x, part, kernel) for k, part in enumerate(parts)]))


@runs_in_graph(Grid)
class _OfGrid(GraphRun[Grid]):
    """Codes of one step a row, or of steps a group, as integers."""

    @property
    def kernel(self) -> str:
        grid = self.form
        if grid.scale.shape[1] == 1:
            return INT8 if _fits_a_byte(grid) else FLOAT
        width = grid.codes.shape[1] // grid.scale.shape[1]
        whole = width * grid.scale.shape[1] == grid.codes.shape[1] and width in BLOCK_WIDTHS
        return BLOCKS if whole and _block_bits(grid) else FLOAT

    def detail(self, kernel: str) -> str:
        if kernel == FLOAT:
            return ""
        marks = ("s" if self.form.columns is not None else "") + ("z" if self.form.zero is not None else "")
        return f"/{self.form.scale.shape[1]}{marks}"

    def multiply(self, nodes: Nodes, name: str, x: str, kernel: str) -> str:
        if kernel == FLOAT or kernel != self.kernel:
            return super().multiply(nodes, name, x, kernel)
        return (_integer if kernel == INT8 else _blocks)(nodes, name, x, self.form)

    def lookup(self, nodes: Nodes, name: str, tokens: str) -> str:
        """Codes of 8 bits that are scaled as they are read, if there is one step a row."""
        grid = self.form
        if grid.scale.shape[1] > 1 or not _fits_a_byte(grid):
            return super().lookup(nodes, name, tokens)
        shift = _shift(grid)
        codes = nodes.once(("bytes", name), lambda: nodes.constant(name, _bytes(grid)))
        row = nodes.add("Cast", [nodes.add("Gather", [codes, tokens], axis=0)], to=1)
        zeros = (torch.zeros(len(grid.codes), 1) if grid.zero is None else grid.zero.float()) - shift
        if bool(zeros.any()):
            table = nodes.constant(f"{name}/zero", zeros.expand(len(grid.codes), 1))
            row = nodes.add("Sub", [row, nodes.add("Gather", [table, tokens], axis=0)])
        scale = nodes.constant(f"{name}/scale", _row_scale(grid))
        row = nodes.add("Mul", [row, nodes.add("Gather", [scale, tokens], axis=0)])
        return _smoothed(nodes, row, grid)


def _bounds(grid: Grid) -> tuple[int, int]:
    """Smallest and largest of the codes and zero points."""
    parts = [part for part in (grid.codes, grid.zero) if part is not None and part.numel()]
    low, high = (min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)) if parts else (0, 0)
    return (min(low, 0), max(high, 0)) if grid.zero is None else (low, high)


def _fits_a_byte(grid: Grid) -> bool:
    low, high = _bounds(grid)
    return high - low < 256


def _shift(grid: Grid) -> int:
    """The number subtracted from codes to make them signed bytes, which the fast kernel needs."""
    low, high = _bounds(grid)
    return 0 if low >= -128 and high <= 127 else low + 128


def _block_bits(grid: Grid) -> int:
    """4 or 8 if all codes and zero points, after a shift, are that many unsigned bits; else 0."""
    low, high = _bounds(grid)
    return next((bits for bits in (4, 8) if high - min(low, 0) < 2**bits), 0)


def lower(model: Any, forms: Mapping[str, Form], kernels: Mapping[str, str]) -> Any:
    """A copy of a traced graph with every site replaced by the nodes of its kernel.

    Parameters
    ----------
    model
        The result of :func:`octavo.runtimes.onnx.graph.trace`; it is not changed.
    forms
        The form of every site in the graph.
    kernels
        Maps site names to kernels; ``float32`` for the others.

    Raises
    ------
    RequestError
        If a form cannot run on the kernel named for it, or the file would be too large.
    """
    count = Counter(node.name for node in model.graph.node if is_placeholder(node))
    used = {name: kernels.get(name, FLOAT) for name in count}
    for name, kernel in used.items():
        if kernel not in (FLOAT, kernel_of(forms[name])):
            raise RequestError(
                f"site {name!r}: its form {forms[name].name} cannot run on the kernel {kernel!r}; choose float32"
            )

    def place(nodes: Nodes, node: Any) -> str:
        form, kernel = forms[node.name], used[node.name]
        # A table that is also the head is stored once, and both are decoded from it.
        shared = count[node.name] > 1 and kernel != INT8
        if node.op_type == LOOKUP:
            tokens = node.input[0]
            return (
                weight(nodes, node.name, form, tokens=tokens)
                if shared
                else graph_run(form).lookup(nodes, node.name, tokens)
            )
        if node.op_type == WEIGHT:
            return weight(nodes, node.name, form) if shared else nodes.constant(node.name, form.dense())
        if shared and kernel == FLOAT:
            return product(nodes, node.name, node.input[0], form)
        return multiply(nodes, node.name, node.input[0], form, kernel)

    return filled(model, place, used)


def _smoothed(nodes: Nodes, x: str, grid: Grid) -> str:
    """``x`` multiplied by the column steps of a grid; sites with the same input and steps share it."""
    if grid.columns is None:
        return x
    steps = exponent_steps(grid.columns)
    key = ("smoothed", x, grid.columns.short().numpy().tobytes())
    return nodes.once(key, lambda: [nodes.add("Mul", [x, nodes.constant("column_steps", steps)])])[0]


def _row_scale(grid: Grid) -> Tensor:
    """Steps (rows, groups), float32, with the row steps in them."""
    scale = grid.scale.float().expand(len(grid.codes), -1)
    return scale if grid.rows is None else scale * exponent_steps(grid.rows)[:, None]


def _integer(nodes: Nodes, name: str, x: str, grid: Grid) -> str:
    smoothed = _smoothed(nodes, x, grid)
    rounded, step, zero = nodes.once(
        ("rounded", smoothed), lambda: nodes.add("DynamicQuantizeLinear", [smoothed], count=3)
    )
    shift = _shift(grid)
    table = nodes.shared(("bytes", name))
    # The codes of a table that is also the head are transposed when the file is opened.
    codes = nodes.add("Transpose", [table], perm=[1, 0]) if table else nodes.constant(name, _bytes(grid).t())
    zeros = (torch.zeros(1) if grid.zero is None else grid.zero[:, 0].float()) - shift
    inputs = [rounded, codes, zero]
    if bool(zeros.any()):
        inputs.append(nodes.constant(f"{name}/zero", zeros.expand(len(grid.codes)).to(torch.int8)))
    summed = nodes.add("Cast", [nodes.add("MatMulInteger", inputs)], to=1)
    scale = nodes.add("Mul", [step, nodes.constant(f"{name}/scale", _row_scale(grid)[:, 0])])
    return str(nodes.add("Mul", [summed, scale]))


def _bytes(grid: Grid) -> Tensor:
    """The codes as signed bytes."""
    return (grid.codes.to(torch.int16) - _shift(grid)).to(torch.int8)


def _blocks(nodes: Nodes, name: str, x: str, grid: Grid) -> str:
    rows, columns = grid.codes.shape
    groups, bits = grid.scale.shape[1], _block_bits(grid)
    zero = torch.zeros(rows, groups, dtype=torch.int16) if grid.zero is None else grid.zero.to(torch.int16)
    shift = min(_bounds(grid)[0], 0)
    codes = (grid.codes.to(torch.int16) - shift).to(torch.uint8).reshape(rows, groups, columns // groups)
    zeros = (zero.expand(rows, groups) - shift).to(torch.uint8)
    if bits == 4:
        # Two to a byte, the first in the low half; an odd last zero point is alone in its byte.
        codes = codes[..., ::2] | codes[..., 1::2] << 4
        zeros = torch.nn.functional.pad(zeros, (0, groups % 2))
        zeros = zeros[:, ::2] | zeros[:, 1::2] << 4
    inputs = [
        _smoothed(nodes, x, grid),
        nodes.constant(name, codes),
        nodes.constant(f"{name}/scale", _row_scale(grid).reshape(-1)),
        nodes.constant(f"{name}/zero", zeros.reshape(-1)),
    ]
    return str(
        nodes.add(
            "MatMulNBits", inputs, domain=MICROSOFT, K=columns, N=rows, bits=bits, block_size=columns // groups,
            accuracy_level=_ACCURACY_INT8,
        )
    )  # fmt: skip
