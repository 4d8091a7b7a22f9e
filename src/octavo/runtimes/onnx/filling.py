"""Replacing the site placeholders of a traced graph by nodes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from octavo.errors import RequestError
from octavo.runtimes.onnx.graph import DOMAIN, is_placeholder, prune
from octavo.runtimes.onnx.nodes import MICROSOFT, Nodes
from octavo.runtimes.onnx.sessions import NOTE

#: A protobuf holds less than two gigabytes.
LARGEST = 2**31 - 2**20


def filled(
    model: Any,
    place: Callable[[Nodes, Any], str],
    kernels: Mapping[str, str],
    keep: Callable[[Nodes, Any], None] | None = None,
) -> Any:
    """A copy of a traced graph with its sites replaced by nodes.

    Parameters
    ----------
    model
        The result of :func:`octavo.runtimes.onnx.graph.trace`; it is not changed.
    place
        Adds the nodes for one placeholder, and returns the name of their result.
    kernels
        Maps site names to kernels, as recorded in the file.
    keep
        Adds an initializer that belongs to no site; unchanged by default.

    Raises
    ------
    RequestError
        If the file would be too large.
    """
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    nodes = Nodes(taken=[name for node in graph.node for name in (*node.input, *node.output)])
    for tensor in graph.initializer:
        if keep is None:
            nodes.initializers.append(tensor)
        else:
            keep(nodes, tensor)
    for node in graph.node:
        if is_placeholder(node):
            nodes.add("Identity", [place(nodes, node)], outputs=[node.output[0]])
        else:
            nodes.add_node(node)
    total = sum(tensor.ByteSize() for tensor in nodes.initializers)
    if total > LARGEST:
        raise RequestError(
            f"the weights take {total:,} bytes, but an ONNX file holds at most {LARGEST:,}; compress the model "
            "further, or use --prefer size"
        )
    del graph.node[:]
    graph.node.extend(nodes.nodes)
    graph.ClearField("initializer")
    graph.initializer.extend(nodes.initializers)
    prune(graph)
    versions = {entry.domain: entry.version for entry in result.opset_import if entry.domain != DOMAIN}
    del result.opset_import[:]
    versions |= {MICROSOFT: 1} if any(node.domain == MICROSOFT for node in graph.node) else {}
    result.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in versions.items())
    result.producer_name = "octavo"
    del result.metadata_props[:]
    onnx.helper.set_model_props(result, {NOTE: json.dumps({"kernels": dict(kernels)})})
    return result
