"""Forms run by onnxruntime give what they stand for, up to the rounding that their kernel states."""

import numpy as np
import pytest
import torch

from octavo.calibration.evidence import Evidence
from octavo.errors import ArtifactError
from octavo.forms import Codebook, Dense, Form, Grid, LowRank, Sum
from octavo.runtimes.onnx.activations import Ranges, rounding_loss
from octavo.runtimes.onnx.graph import OPSET
from octavo.runtimes.onnx.kernels import BLOCKS, FLOAT, INT8, graph_run, kernel_of, multiply
from octavo.runtimes.onnx.nodes import Nodes, finished
from octavo.runtimes.onnx.sessions import Session


def codes(low: int, high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 0.05 + 0.01


ROWS, COLUMNS = 24, 64
STEPS = codes(-20, 20, COLUMNS, seed=2).short()
SIGNED = Grid(codes(-127, 127, ROWS, COLUMNS).to(torch.int8), scales(ROWS, 1))
FORMS: dict[str, tuple[Form, str]] = {
    "one step a row": (SIGNED, INT8),
    "column steps": (Grid(SIGNED.codes, SIGNED.scale, None, None, STEPS), INT8),
    "one step, row and column steps": (
        Grid(codes(-90, 100, ROWS, COLUMNS).short(), torch.full((1, 1), 0.01), None, codes(-9, 9, ROWS).short(), STEPS),
        INT8,
    ),
    "unsigned with zero points": (
        Grid(codes(0, 255, ROWS, COLUMNS).to(torch.uint8), scales(ROWS, 1), codes(90, 150, ROWS, 1).to(torch.uint8)),
        INT8,
    ),
    "codes off the middle": (Grid(codes(60, 200, ROWS, COLUMNS).short(), scales(ROWS, 1)), INT8),
    "wide codes": (Grid(codes(-400, 400, ROWS, COLUMNS).short(), scales(ROWS, 1)), FLOAT),
    "8 bits in groups": (
        Grid(codes(0, 255, ROWS, COLUMNS).to(torch.uint8), scales(ROWS, 2), codes(0, 255, ROWS, 2).to(torch.uint8)),
        BLOCKS,
    ),
    "4 bits in groups": (
        Grid(codes(0, 15, ROWS, 48).to(torch.uint8), scales(ROWS, 3), codes(0, 15, ROWS, 3).to(torch.uint8)),
        BLOCKS,
    ),
    "signed in groups": (Grid(codes(-100, 100, ROWS, COLUMNS).to(torch.int8), scales(ROWS, 2)), BLOCKS),
    "groups of 24": (Grid(codes(0, 15, ROWS, 48).to(torch.uint8), scales(ROWS, 2)), FLOAT),
    "dense": (Dense(torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)).bfloat16()), FLOAT),
    "codebook": (
        Codebook(codes(0, 3, ROWS, COLUMNS).to(torch.uint8), torch.tensor([-1.0, 0.0, 0.5, 2.0])),
        FLOAT,
    ),
    "factors": (LowRank(Grid(codes(-9, 9, ROWS, 8).to(torch.int8), scales(ROWS, 1)), Grid(SIGNED.codes[:8], scales(8, 1))), INT8),
    "factors on two kernels": (
        LowRank(Dense(torch.ones(ROWS, 8)), Grid(SIGNED.codes[:8], scales(8, 1))),
        INT8,
    ),
    "sum": (Sum(SIGNED, LowRank(Dense(torch.ones(ROWS, 1)), Dense(torch.ones(1, COLUMNS)))), INT8),
}  # fmt: skip


def product(form: Form, kernel: str, x: torch.Tensor) -> torch.Tensor:
    nodes = Nodes(["x", "y"])
    nodes.add("Identity", [multiply(nodes, "w", "x", form, kernel)], outputs=["y"])
    session = Session(finished(nodes, form.shape[1], form.shape[0], OPSET), threads=1).session
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("name", FORMS)
def test_a_form_runs_as_what_it_stands_for(name: str) -> None:
    form, kernel = FORMS[name]
    assert kernel_of(form) == kernel
    x = torch.randn(7, form.shape[1], generator=torch.Generator().manual_seed(4))
    wanted = x @ form.dense().t()
    assert torch.allclose(product(form, FLOAT, x), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    if kernel != FLOAT:
        error = (product(form, kernel, x) - wanted).norm() / wanted.norm()
        # Something was rounded, and to 8 bits: column steps that differ 5 octaves cost more than others.
        assert 1e-5 < error < 0.05


@pytest.mark.parametrize("name", ["one step a row", "column steps", "8 bits in groups", "4 bits in groups", "factors"])
def test_the_loss_of_rounded_inputs_is_foreseen(name: str) -> None:
    form, kernel = FORMS[name]
    x = torch.randn(400, form.shape[1], generator=torch.Generator().manual_seed(5)) * 0.5 + 0.1
    ranges = Ranges()
    ranges.add(x)
    evidence = Evidence(torch.full((form.shape[0],), 2.0), x.t() @ x / len(x), len(x))
    error = product(form, kernel, x) - x @ form.dense().t()
    # Rows of weight two: the loss of a position is its squared error.
    measured = float(error.square().sum(1).mean())
    # Inner values of factors are taken as wider than a few hundred of them are.
    assert measured / 1.5 < rounding_loss(form, kernel, evidence, ranges) < 2 * measured
    assert rounding_loss(form, FLOAT, evidence, ranges) == 0


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ArtifactError, match="onnxruntime cannot load it"):
        Session(b"no model")


def test_tables_are_read_in_codes() -> None:
    tokens = np.array([[0, 3, 23]])
    for form in (FORMS["unsigned with zero points"][0], FORMS["one step, row and column steps"][0], FORMS["dense"][0]):
        import onnx

        nodes = Nodes(["x", "y"])
        nodes.add("Identity", [graph_run(form).lookup(nodes, "w", "x")], outputs=["y"])
        ends = [
            onnx.helper.make_tensor_value_info("x", onnx.TensorProto.INT64, [1, 3]),
            onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 3, COLUMNS]),
        ]
        graph = onnx.helper.make_graph(nodes.nodes, "table", ends[:1], ends[1:], nodes.initializers)
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=10)
        found = Session(model.SerializeToString()).session.run(None, {"x": tokens})[0]
        assert torch.allclose(torch.from_numpy(found)[0], form.dense()[[0, 3, 23]], rtol=1e-5)
