"""A form of another package registers with every runtime from outside; one that does not runs decoded, with a reason."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from octavo.forms import Form
from octavo.runtimes.lowering import Lowering
from octavo.runtimes.packed import PackedWeight, packed_weight, resident_bytes
from octavo.runtimes.packed.kernels import Kernel, runs
from octavo.runtimes.packed.staged import Stage, chains, convolves
from octavo.sources.sites import Layout
from octavo.system.notes import OctavoWarning

VALUES = torch.arange(1.0, 9.0)


@dataclass(frozen=True)
class Diagonal(Form):
    """A square matrix with nothing beside its diagonal."""

    name = "diagonal"
    values: torch.Tensor

    @property
    def shape(self):
        return (len(self.values), len(self.values))

    def tensors(self):
        return {"values": self.values}

    def meta(self):
        return {"form": self.name}

    @classmethod
    def restore(cls, tensors, meta, shape):
        return cls(tensors["values"])

    @classmethod
    def work(cls, tensors, meta, shape):
        return 8 * shape[0] * shape[1]

    def dense(self):
        return torch.diag(self.values)


class Lowered(Diagonal):
    """The same, and every runtime knows it."""


@runs(Lowered)
class Elementwise(Kernel[Lowered]):
    name = "elementwise"

    def __init__(self, form):
        super().__init__(form)
        self.values = form.values

    @classmethod
    def bytes(cls, form, rows):
        return 4 * rows

    def tensors(self):
        return [self.values]

    def matmul(self, x):
        return x * self.values

    def lookup(self, index):
        return torch.diag(self.values)[index]


@convolves(Lowered)
def _by_channel(form, shape):
    channels = len(form.values)
    return [[Stage(form.values.reshape(channels, 1, 1, 1), channels, (True, True))]]


def test_the_first_that_is_registered_for_the_class_or_one_above_it_is_taken():
    lowering = Lowering[str]("way")
    lowering(Diagonal)("any diagonal")
    lowering(Lowered)("one")
    lowering(Lowered)("another")
    assert lowering.every(Lowered(VALUES)) == ["one", "another", "any diagonal"]
    assert lowering.find(Diagonal(VALUES)) == "any diagonal"
    assert lowering.missing(Diagonal(VALUES)) is None
    empty = Lowering[str]("way")
    assert empty.find(Diagonal(VALUES)) is None
    assert "no way is registered for the form 'diagonal'" in str(empty.missing(Diagonal(VALUES)))


def test_a_packed_weight_runs_by_a_kernel_of_another_package():
    x = torch.randn(3, 8)
    for form, name in ((Lowered(VALUES), "elementwise"), (Diagonal(VALUES), "none (decoded while running)")):
        weight = packed_weight(form, Layout(), form.shape, torch.float32)
        assert isinstance(weight, PackedWeight)
        assert weight.kernel.name == name
        torch.testing.assert_close(torch.nn.functional.linear(x, weight), x @ form.dense().T)
    assert resident_bytes(Lowered(VALUES)) == 32


def test_a_convolution_runs_in_stages_of_another_package():
    assert chains(Diagonal(VALUES), (8, 8, 1, 1)) is None
    [[stage]] = chains(Lowered(VALUES), (8, 8, 1, 1))
    x = torch.randn(2, 8, 3, 3)
    found = stage(x, None, [(1, 1), (0, 0), (1, 1)])
    torch.testing.assert_close(found, torch.nn.functional.conv2d(x, Lowered(VALUES).dense().reshape(8, 8, 1, 1)))


def test_a_graph_has_the_nodes_of_another_package():
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    from octavo.runtimes.onnx.graph import OPSET
    from octavo.runtimes.onnx.kernels import FLOAT, GraphRun, multiply, runs_in_graph
    from octavo.runtimes.onnx.nodes import Nodes, finished
    from octavo.runtimes.onnx.sessions import Session
    from octavo.runtimes.onnx.weights import multiplies, product

    @multiplies(Lowered)
    def _product(form):
        return lambda nodes, name, x: nodes.add("Mul", [x, nodes.constant(name, form.values)])

    @runs_in_graph(Lowered)
    class OfDiagonal(GraphRun[Lowered]):
        def multiply(self, nodes, name, x, kernel):
            return nodes.add("Mul", [x, nodes.constant(name, self.form.values)])

    def by(form, lower):
        nodes = Nodes(["x", "y"])
        nodes.add("Identity", [lower(nodes, form)], outputs=["y"])
        session = Session(finished(nodes, 8, 8, OPSET), threads=1).session
        return [node.op_type for node in nodes.nodes], torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    x = torch.randn(3, 8)
    for lower in (lambda n, form: product(n, "w", "x", form), lambda n, form: multiply(n, "w", "x", form, FLOAT)):
        kinds, found = by(Lowered(VALUES), lower)
        assert kinds == ["Mul", "Identity"]
        torch.testing.assert_close(found, x * VALUES)
    # Nobody said how to work this one out.
    with pytest.warns(OctavoWarning, match="w: no .* is registered for the form 'diagonal'"):
        _, found = by(Diagonal(VALUES), lambda n, form: product(n, "w", "x", form))
    torch.testing.assert_close(found, x * VALUES)
