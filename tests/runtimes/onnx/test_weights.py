"""Every form in an ONNX graph is bit for bit, or to the rounding of a product, the matrix that it stands for."""

import numpy as np
import pytest
import torch

import octavo.forms
from octavo.forms import (
    E8,
    Affine,
    BlockScaled,
    Codebook,
    Dense,
    DenseSparse,
    Exact,
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
)  # fmt: skip
from octavo.runtimes.onnx.codes import store, window_of
from octavo.runtimes.onnx.graph import OPSET
from octavo.runtimes.onnx.nodes import TYPES, Nodes
from octavo.runtimes.onnx.sessions import Session
from octavo.runtimes.onnx.weights import product, weight

ROWS, COLUMNS = 24, 48


def whole(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(low + 7 * high))


def real(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def heavy(*shape: int) -> torch.Tensor:
    """Codes for an entropy coder: few far from zero."""
    return (real(*shape) * 1.5).round().where(real(*shape) < 2.5, 90 * torch.ones(())).to(torch.int16)


GRID = Grid(
    heavy(ROWS, COLUMNS), torch.full((1, 1), 0.01), None, whole(-9, 9, ROWS).short(), whole(-9, 9, COLUMNS).short()
)
GRID_OF_ROWS = Grid(heavy(10, COLUMNS), real(10, 1))
FORMS: dict[str, tuple[Form, bool]] = {
    "grid with row and column steps": (GRID, True),
    "grid in groups": (Grid(whole(0, 15, ROWS, COLUMNS).to(torch.uint8), real(ROWS, 3).half(), whole(0, 15, ROWS, 3).to(torch.uint8)), True),
    "grid with a narrower last group": (Grid(whole(-8, 7, ROWS, COLUMNS).to(torch.int8), real(ROWS, 5)), True),
    "grid of 16 bits": (Grid(whole(-9000, 9000, ROWS, COLUMNS).short(), real(ROWS, 1), whole(-300, 300, ROWS, 1).short()), True),
    "grid of one group for all rows": (Grid(whole(-1, 1, ROWS, COLUMNS).to(torch.int8), real(1, 2)), True),
    "affine": (Affine(whole(0, 15, ROWS, COLUMNS).short(), real(ROWS, 3).abs(), real(ROWS, 3)), True),
    "affine in bfloat16": (Affine(whole(-8, 7, ROWS, COLUMNS).short(), real(ROWS, 3).abs(), None, torch.bfloat16), True),
    "affine in float16": (Affine(whole(-8, 7, ROWS, COLUMNS).short(), real(ROWS, 3).abs(), real(ROWS, 3), torch.float16), True),
    "codebook": (Codebook(whole(0, 3, ROWS, COLUMNS).to(torch.uint8), real(4), real(ROWS, 1)), True),
    "block scaled": (BlockScaled(Codebook(whole(0, 3, ROWS, COLUMNS).to(torch.uint8), real(4)), Dense(real(ROWS, 3))), True),
    "e8": (E8(heavy(ROWS, 7 * -(-COLUMNS // 8)), heavy(ROWS, -(-COLUMNS // 8)), whole(0, 1, ROWS, -(-COLUMNS // 8)).bool(), COLUMNS), True),
    "dense": (Dense(real(ROWS, COLUMNS)), True),
    "dense in bfloat16": (Dense(real(ROWS, COLUMNS).bfloat16()), True),
    "dense in float16": (Dense(real(ROWS, COLUMNS).half()), True),
    "exact": (Exact.of(real(ROWS, COLUMNS)), True),
    "exact in bfloat16": (Exact.of(real(ROWS, COLUMNS).bfloat16().float()), True),
    "scaled": (Scaled(GRID, whole(-9, 9, ROWS)), True),
    "trellis": (Trellis(Grid(heavy(ROWS, COLUMNS), real(ROWS, 1))), True),
    "trellis of many rows": (Trellis(Grid(heavy(2000, COLUMNS), real(2000, 1))), True),
    "sparse": (Sparse(whole(0, 3, ROWS, COLUMNS) == 0, Grid(heavy(1, int((whole(0, 3, ROWS, COLUMNS) == 0).sum())), real(1, 1))), True),
    "sparse, all zero": (Sparse(torch.zeros(ROWS, COLUMNS, dtype=torch.bool), Dense(torch.zeros(1, 0))), True),
    "vectors": (Vectors(whole(0, 5, 2, ROWS, 10).to(torch.uint8), real(2, 10, 6, 5).half(), COLUMNS, real(ROWS, 3)), True),
    "vectors shared by all blocks": (Vectors(whole(0, 5, 1, ROWS, 12).to(torch.uint8), real(1, 1, 6, 4), COLUMNS), True),
    "hashed": (Hashed(Dense(real(7, COLUMNS)), (Hash(7, 0, 1, 48271, 5), Hash(7, 0, 1, 40014, 3)), ROWS, COLUMNS), True),
    "hashed pieces": (Hashed(Dense(real(30, 5)), (Hash(30, 0, 1, 2**31 - 5, 99, 1),), ROWS, COLUMNS), True),
    "hashed remainder and quotient": (Hashed(GRID_OF_ROWS, (Hash(5), Hash(5, 5, 5)), ROWS, COLUMNS, True), True),
    "cut": (Trimmed(Grid(heavy(ROWS - 2, COLUMNS - 3), real(1, 1)), torch.arange(ROWS) > 1, torch.arange(COLUMNS) % 16 > 0), True),
    "row blocks": (RowBlocks((torch.arange(ROWS) % 3).to(torch.uint8), tuple(Grid(heavy(ROWS // 3, COLUMNS), real(1, 1) * k) for k in (1, 2, 3))), True),
    "folded": (Folded(Dense(real(32, ROWS * COLUMNS // 32)), "spatial", (16, 2, COLUMNS // 32 or 1)), True)
    if COLUMNS % 32 == 0
    else (Folded(Dense(real(12, ROWS * COLUMNS // 12)), "spatial", (4, 3, 4)), True),
    "frequency of kernels": (Frequency(Dense(real(ROWS, COLUMNS)), (1, 3, 4)), False),
    "frequency of tiles": (Frequency(Sum(GRID, Dense(real(ROWS, COLUMNS))), (8, 1, 6)), False),
    "factors": (LowRank(Grid(heavy(ROWS, 5), real(ROWS, 1)), Dense(real(5, COLUMNS).half())), False),
    "factors of full rank": (LowRank(Trellis(Grid(heavy(ROWS, ROWS), real(ROWS, 1))), Dense(real(ROWS, COLUMNS).half())), False),
    "scaled factors": (Scaled(LowRank(Dense(real(ROWS, 5)), Dense(real(5, COLUMNS))), whole(-9, 9, ROWS)), False),
    "sum": (Sum(GRID, LowRank(Dense(real(ROWS, 2)), Dense(real(2, COLUMNS)))), False),
    "grouped factors": (GroupedLowRank(Dense(real(ROWS, 8)), Dense(real(8, COLUMNS // 4)), 4), False),
    "dictionaries": (
        DenseSparse(Dense(real(ROWS, 4 * 2)), whole(0, 5, ROWS, 4 * 2).short(), Dense(real(4 * 6, 13)), 2, COLUMNS),
        False,
    ),
    "separable": (Separable(Dense(real(2 * ROWS, 4)), Dense(real(2 * ROWS, 3)), Dense(real(2 * ROWS, 4)), 2), False),
    "tensor train": (
        TensorTrain(tuple(Dense(real(*s)) for s in ((1 * 4 * 7, 3), (3 * 3 * 7, 2), (2 * 2 * 1, 1))), (4, 3, 2), (7, 7, 1), ROWS, COLUMNS),
        False,
    ),
}  # fmt: skip


def run(nodes: Nodes, feed: np.ndarray, result: str) -> torch.Tensor:
    import onnx

    nodes.add("Identity", [result], outputs=["y"])
    kind = onnx.helper.np_dtype_to_tensor_dtype(feed.dtype)
    ends = [
        onnx.helper.make_tensor_value_info("x", kind, list(feed.shape)),
        onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None),
    ]
    graph = onnx.helper.make_graph(nodes.nodes, "form", ends[:1], ends[1:], nodes.initializers)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=10)
    return torch.from_numpy(Session(model.SerializeToString(), threads=1).session.run(None, {"x": feed})[0])


def test_every_form_is_in_the_table() -> None:
    known = {kind for kind in vars(octavo.forms).values() if isinstance(kind, type) and issubclass(kind, Form)}
    assert {type(form) for form, _ in FORMS.values()} == known - {Form}


@pytest.mark.parametrize("name", FORMS)
def test_a_matrix_is_decoded_in_the_graph(name: str) -> None:
    form, exact = FORMS[name]
    wanted = form.dense()
    tokens = np.array([[0, 3, ROWS - 1], [7, 7, 1]])
    for dtype in (torch.float32, torch.bfloat16):
        nodes = Nodes(["x", "y"])
        found = run(nodes, tokens, weight(nodes, "w", form, dtype, "x"))
        rows = wanted.to(dtype).float()[torch.from_numpy(tokens)]
        assert found.shape == rows.shape
        assert (
            torch.equal(found, rows)
            if exact
            else torch.allclose(found, rows, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5)
        )
    nodes = Nodes(["x", "y"])
    x = torch.eye(form.shape[1])
    found = run(nodes, x.numpy(), product(nodes, "w", "x", form)).t()
    assert torch.equal(found, wanted) if exact else torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("integers", "bits", "most"),
    [
        (whole(0, 1, 65536), 1, 65536 // 8),
        (whole(-1, 2, 65536), 2, 65536 // 4),
        (whole(5, 20, 4095), 4, 2048),
        (whole(0, 7, 65536), 3, 3 * 65536 // 8),
        (whole(0, 31, 65535), 5, 5 * 65536 // 8),
        (whole(0, 63, 65536), 6, 6 * 65536 // 8),
        (whole(-100, 100, 4096), 8, 4096),
        (whole(-1000, 1000, 4096), 16, 8192),
        (whole(-100000, 100000, 4096), 32, 16384),
        (heavy(64, 1000), 3, 30000),
        (torch.zeros(50000, dtype=torch.int8).index_fill_(0, torch.tensor([7, 40000]), 9), 0, 100),
        (torch.full((9, 9), -3), 0, 0),
    ],
)  # fmt: skip
def test_integers_take_few_bytes(integers: torch.Tensor, bits: int, most: int) -> None:
    assert window_of(integers).bits == bits
    nodes = Nodes(["x", "y"])
    value, shift = store(nodes, "codes", integers)
    stored = sum(len(tensor.raw_data) for tensor in nodes.initializers)
    found = run(nodes, np.array([float(shift)], np.float32), nodes.add("Add", [nodes.cast(value, torch.float32), "x"]))
    assert torch.equal(found.long(), integers.long())
    assert stored <= most + 128
    assert all(tensor.data_type in (*TYPES.values(), 21) for tensor in nodes.initializers)
