"""The graph of a module with placeholders for its sites, so that each can get the kernel of its form.

``torch.onnx.export`` traces the module while every layer that holds a site emits a custom node: ``octavo.Site`` for a
matrix that is multiplied with, ``octavo.Lookup`` for a table that is read, ``octavo.Weight`` for the weight of any
other layer. So weights are found without matching node patterns, and never pass through the exporter.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.runtimes.onnx.given import Inputs, inputs_of
from octavo.runtimes.onnx.sessions import require
from octavo.sources.batches import run
from octavo.sources.modules import own_tensors
from octavo.sources.sites import Site
from octavo.sources.source import Source

DOMAIN = "octavo"
SITE, LOOKUP, WEIGHT, TIED = "Site", "Lookup", "Weight", "Tied"
#: The first opset with attention, root-mean-square norms and rotary embeddings as operations.
OPSET = 23
#: Outputs of transformers models to export; the first that a model has is used.
OUTPUTS = ("logits", "last_hidden_state")


def trace(source: Source, given: Inputs | None = None) -> tuple[Any, dict[str, str]]:
    """The graph of a ``transformers`` model, with its sites as placeholders.

    Parameters
    ----------
    source
        The model.
    given
        Its inputs; tokens by default.

    Returns
    -------
    model
        ``onnx.ModelProto``.
    sites
        Maps the names of sites that run to ``Site``, ``Lookup``, ``Weight``, or ``Tied`` if several apply.

    Raises
    ------
    RequestError
        If torch cannot export the source.
    """
    require()
    given = given or inputs_of(source)
    assert source.module is not None
    example = given.example()
    with torch.no_grad():
        found = run(source.module, example)
    output = next((name for name in OUTPUTS if isinstance(getattr(found, name, None), Tensor)), None)
    if output is None:
        kind = type(source.module).__name__
        raise RequestError(
            f"{source.title}: {kind} returns none of {', '.join(OUTPUTS)}, so it cannot be exported; export its base "
            "model"
        )
    sites = source.sites()[0]
    with _open_sites(source, sites), _quiet():
        try:
            program = torch.onnx.export(
                _Call(source.module, output, list(example)).eval(),
                tuple(example.values()),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=list(example),
                output_names=[output],
                dynamic_shapes=(tuple(given.axes for _ in example),),
            )
        except Exception as error:
            # The exporter raises many kinds of errors; the last line gives the reason.
            reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
            raise RequestError(
                f"{source.title}: torch.onnx.export cannot export {type(source.module).__name__}: "
                f"{type(error).__name__}: {reason.strip()}"
            ) from error
    assert program is not None
    model = program.model_proto
    _look_up(model)
    kinds: dict[str, str] = {}
    for node in model.graph.node:
        if node.domain == DOMAIN:
            node.name = sites[_index(node)].name
            kinds[node.name] = node.op_type if kinds.get(node.name, node.op_type) == node.op_type else TIED
    flatten_attention(model)
    widen_rotary(model)
    _without_origin(model.graph)
    return model, kinds


class _Call(nn.Module):
    """A model as a function of its ordered inputs with one output."""

    def __init__(self, module: nn.Module, output: str, names: list[str]) -> None:
        super().__init__()
        self.module, self.output, self.names = module, output, names
        # A cache of keys and values would be among the outputs.
        self.options = {"use_cache": False} if output == "logits" and "input_ids" in names else {}

    def forward(self, *values: Tensor) -> Tensor:
        batch = {**dict(zip(self.names, values, strict=True)), **self.options}
        return getattr(run(self.module, batch), self.output)


@contextlib.contextmanager
def _open_sites(source: Source, sites: list[Site]) -> Iterator[None]:
    """A context in which layers that hold the tensor of a site call a placeholder with its index."""
    assert source.module is not None
    state = own_tensors(source.module)
    index = {
        state[source.direct[site.name]].data_ptr(): number
        for number, site in enumerate(sites)
        if site.name in source.direct
    }
    opened = []
    try:
        for module in source.module.modules():
            held = {
                leaf: index[tensor.data_ptr()]
                for leaf, tensor in module._parameters.items()
                if tensor is not None and tensor.data_ptr() in index
            }
            forward = _FORWARDS.get(type(module).__name__)
            if held and "forward" not in vars(module):
                chosen = forward(held["weight"]) if forward and "weight" in held else _with_weights(held, sites)
                module.forward = MethodType(chosen, module)
                opened.append(module)
        yield
    finally:
        for module in opened:
            del module.forward


def _with_weights(held: dict[str, int], sites: list[Site]) -> Callable[..., Any]:
    """The forward of any layer, with its weights replaced by placeholders meanwhile."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        for leaf, number in held.items():
            site = sites[number]
            matrix = torch.onnx.ops.symbolic(
                f"{DOMAIN}::{WEIGHT}", (), {"index": number}, dtype=torch.float32, shape=(site.rows, site.columns),
                version=1,
            )  # fmt: skip
            # A module finds entries of its own dictionary before its parameters.
            vars(self)[leaf] = site.layout.from_matrix(matrix, site.shape)
        try:
            return type(self).forward(self, *args, **kwargs)
        finally:
            for leaf in held:
                del vars(self)[leaf]

    return forward


def _linear(index: int) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        rows = self.nf if type(self).__name__ == "Conv1D" else self.out_features
        y = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{SITE}", (x,), {"index": index}, dtype=x.dtype, shape=(*x.shape[:-1], rows), version=1
        )
        return y if self.bias is None else y + self.bias

    return forward


def _lookup(index: int) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(self: Any, tokens: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{LOOKUP}",
            (tokens,),
            {"index": index},
            dtype=torch.float32,
            shape=(*tokens.shape, self.embedding_dim),
            version=1,
        )

    return forward


#: By exact type, since a subclass may do something else.
_FORWARDS = {"Linear": _linear, "Conv1D": _linear, "Embedding": _lookup}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and remarks on other packages on several channels."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _index(node: Any) -> int:
    return int(next(attribute.i for attribute in node.attribute if attribute.name == "index"))


def _look_up(model: Any) -> None:
    """Make a table of every weight that is only read by its rows."""
    import onnx

    weights = {node.output[0]: node for node in model.graph.node if node.domain == DOMAIN and node.op_type == WEIGHT}
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[0] in weights and not any(a.i for a in node.attribute):
            number = _index(weights[node.input[0]])
            made = onnx.helper.make_node(LOOKUP, [node.input[1]], list(node.output), domain=DOMAIN, index=number)
            node.CopyFrom(made)
    prune(model.graph, types=True)


def _without_origin(graph: Any) -> None:
    """Remove metadata about the origin of nodes in the module and in files of this machine."""
    graph.ClearField("metadata_props")
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def flatten_attention(model: Any) -> None:
    """Let attention use (batch, tokens, heads * width) if heads were only split and merged for it.

    The operation is defined for both layouts, and onnxruntime's runs faster without the transposes: 27 against 44
    microseconds at 32 tokens of 12 heads of 32 (benchmarks/speed.py measures the whole).
    """
    import onnx

    graph = model.graph
    producer = {output: node for node in graph.node for output in node.output}
    shapes = {value.name: value.type.tensor_type.shape for value in graph.value_info}

    def split(name: str) -> str | None:
        """The value (batch, tokens, heads * width) before it became (batch, heads, tokens, width)."""
        transpose = producer.get(name)
        if transpose is None or transpose.op_type != "Transpose" or _perm(transpose) != [0, 2, 1, 3]:
            return None
        reshape = producer.get(transpose.input[0])
        if reshape is None or reshape.op_type != "Reshape" or len(shapes[reshape.input[0]].dim) != 3:
            return None
        return str(reshape.input[0])

    for node in graph.node:
        if node.op_type != "Attention" or len(node.output) != 1:
            continue
        before = [split(name) for name in node.input[:3]]
        after = [other for other in graph.node if node.output[0] in other.input]
        if None in before or len(after) != 1 or after[0].op_type != "Transpose" or _perm(after[0]) != [0, 2, 1, 3]:
            continue
        joined = [other for other in graph.node if after[0].output[0] in other.input]
        if len(joined) != 1 or joined[0].op_type != "Reshape" or len(shapes[joined[0].output[0]].dim) != 3:
            continue
        heads = [shapes[name].dim[1].dim_value for name in node.input[:2]]
        if not all(heads):
            continue
        for place, name in enumerate(before):
            node.input[place] = name
        node.output[0] = joined[0].output[0]
        joined[0].output[0] += "_unused"
        node.attribute.extend(
            onnx.helper.make_attribute(f"{side}_num_heads", count)
            for side, count in zip(("q", "kv"), heads, strict=True)
        )
    prune(graph)


def widen_rotary(model: Any) -> None:
    """Give every sequence its own copy of the rotary tables, as the operator requires.

    transformers makes one for all sequences, and torch exports it unchanged.
    """
    import onnx

    nodes: list[Any] = []
    wide: dict[str, str] = {}
    for node in list(model.graph.node):
        if node.op_type == "RotaryEmbedding" and len(node.input) == 3:
            if not wide:
                ones = onnx.numpy_helper.from_array(np.ones(2, np.int64), "rotary_ones")
                model.graph.initializer.append(ones)
                nodes += [
                    onnx.helper.make_node("Shape", [model.graph.input[0].name], ["rotary_batch"], start=0, end=1),
                    onnx.helper.make_node("Concat", ["rotary_batch", ones.name], ["rotary_shape"], axis=0),
                ]
            for place in (1, 2):
                table = node.input[place]
                if table not in wide:
                    wide[table] = f"{table}_wide"
                    nodes.append(onnx.helper.make_node("Expand", [table, "rotary_shape"], [wide[table]]))
                node.input[place] = wide[table]
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _perm(node: Any) -> list[int]:
    return next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), [])


def prune(graph: Any, *, types: bool = False) -> None:
    """Remove nodes and initializers that no output depends on, and value types unless ``types`` is set."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    initializers = [tensor for tensor in graph.initializer if tensor.name in needed]
    kept.reverse()
    del graph.node[:], graph.initializer[:]
    if not types:
        graph.ClearField("value_info")
    graph.node.extend(kept)
    graph.initializer.extend(initializers)


def is_placeholder(node: Any) -> bool:
    """Whether a node stands for a site."""
    return bool(node.domain == DOMAIN)


def open_inputs(model: Any) -> dict[str, str]:
    """Maps site names to the values that they read; sites that read the same value share its rounding."""
    return {node.name: node.input[0] for node in model.graph.node if is_placeholder(node) and node.op_type == SITE}
