"""Folding batch normalisation into the preceding layer.

In evaluation mode, batch normalisation scales and shifts every channel by constants. If its input is the output of a
convolution or linear layer, and nothing else reads that output, the scales can move into the layer's rows. Five vectors
become one vector and four constants, and the scales no longer amplify errors of the weights (Jacob et al., 2018, arXiv
1712.05877, section 3.2). The module keeps its structure: the normalisation stays and only adds its bias.

Names and order do not determine which layers are adjacent. With data this is read from the autograd graph of one batch,
and the outputs are compared after folding. Without data ``torch.fx`` must be able to trace the module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from octavo.calibration.inmemory import replaced
from octavo.calibration.objective import Objective
from octavo.sources.batches import Batch
from octavo.sources.sites import Layout
from octavo.sources.source import Source

#: Tolerated change of outputs, as a share of the largest output, or one rounding of the stored dtype.
_TOLERANCE = 1e-4
#: Layers that a normalisation may follow in a traced graph. Without data it is unknown whether the channels of a linear
#: layer or a 1-d convolution are the normalised ones.
_TRACED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: nn.BatchNorm2d, nn.ConvTranspose2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d, nn.ConvTranspose3d: nn.BatchNorm3d,
}  # fmt: skip


@dataclass(frozen=True)
class _Pair:
    """A normalisation and the only layer that feeds it."""

    norm: nn.Module
    weight: Tensor
    bias: Tensor | None
    layout: Layout


def fold(
    source: Source, module: nn.Module | None, batch: Batch, objective: Objective, untouched: Collection[str]
) -> Source:
    """A source with batch normalisations folded into other tensors, as far as its graph allows.

    The module and the digests of the source are unchanged: quality is measured against the original.

    Parameters
    ----------
    module
        The source's module, with weights if there is a batch.
    batch
        A batch to run it on; None to trace it without data.
    untouched
        Names of tensors that must not change.
    """
    if module is None or not has_norms(module):
        return source
    pairs = list(_traced(module) if batch is None else _differentiated(module, batch, objective))
    parameters = {parameter: name for name, parameter in source.direct.items()}
    state = module.state_dict(keep_vars=True)
    shared = {*source.aliases, *source.aliases.values(), *untouched}
    seen = Counter(map(id, state.values()))
    names = {id(tensor): parameters.get(name, "") for name, tensor in state.items() if seen[id(tensor)] == 1}
    found: dict[str, Tensor] = {}
    count = 0
    for pair in pairs:
        new = _folded(pair, source, names)
        if new and shared.isdisjoint(new) and all(bool(torch.isfinite(tensor).all()) for tensor in new.values()):
            found |= new
            count += 1
    if not found or not (batch is None or _agree(module, batch, objective, source, found)):
        return source
    read = source.read
    return replace(
        source,
        read=lambda name: found[name] if name in found else read(name),
        folded=found,
        notes=[
            *source.notes,
            f"{count} batch normalisation{'s were' if count > 1 else ' was'} folded into the preceding layer: the "
            "module computes the same outputs from other weights",
        ],
    )


def has_norms(module: nn.Module) -> bool:
    """Whether anything may be folded."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def _folded(pair: _Pair, source: Source, names: Mapping[int, str]) -> dict[str, Tensor]:
    """New values of the tensors of a pair, by name in the source; empty if a tensor is missing."""
    norm = pair.norm
    held = [pair.weight, pair.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var]
    given = [names.get(id(tensor), "") if isinstance(tensor, Tensor) else None for tensor in held]
    if "" in given or (norm.weight is None) != (norm.bias is None):
        return {}
    old = {name: source.read(name) for name in given if name is not None}
    weight, bias, gain, shift, mean, variance = given
    assert weight is not None and mean is not None and variance is not None

    def wide(name: str | None, default: float) -> Tensor:
        return torch.full_like(old[mean], default, dtype=torch.float64) if name is None else old[name].double()

    eps = float(norm.eps)  # type: ignore[arg-type]
    scale = wide(gain, 1.0) / (wide(variance, 1.0) + eps).sqrt()
    # The remaining division is by 1, or by the nearest number in the dtype of the variance.
    unit = torch.full_like(old[variance], 1 - eps)
    remaining = (unit.double() + eps).sqrt()
    offset = (wide(bias, 0.0) - wide(mean, 0.0)) * scale
    matrix = pair.layout.to_matrix(old[weight].double()) * (scale * remaining)[:, None]
    new = {weight: pair.layout.from_matrix(matrix, tuple(old[weight].shape)), variance: unit}
    if gain is not None and shift is not None:
        new |= {gain: torch.ones_like(scale), shift: wide(shift, 0.0) + offset, mean: torch.zeros_like(scale)}
    else:
        new[mean] = -offset * remaining
    if bias is not None:
        new[bias] = torch.zeros_like(scale)
    return {name: tensor.to(old[name].dtype).contiguous() for name, tensor in new.items()}


def _differentiated(module: nn.Module, batch: Batch, objective: Objective) -> Iterator[_Pair]:
    """Pairs in the autograd graph of a batch's outputs."""
    wanted = {parameter: parameter.requires_grad for parameter in module.parameters()}
    norms: dict[int, list[nn.Module]] = {}
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
            norms.setdefault(part.running_mean.data_ptr(), []).append(part)
    try:
        for parameter in wanted:
            parameter.requires_grad_(parameter.is_floating_point())
        with replaced(module, {}), torch.enable_grad():
            outputs = _outputs(module, batch, objective)
    finally:
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
    uses = _uses(outputs)
    nodes = [node for node in uses if node.name().endswith("BatchNormBackward0") and not node._saved_training]
    calls = Counter(node._saved_running_mean.data_ptr() for node in nodes)
    for node in nodes:
        place = node._saved_running_mean.data_ptr()
        before = node.next_functions[0][0]
        own = [edge for edge, _ in node.next_functions[1:] if edge is not None]
        layer = None if before is None else _layer(before)
        if layer is None or calls[place] > 1 or len(norms.get(place, ())) != 1:
            continue
        leaves = [edge for edge in _leaves(before) if edge is not None]
        if uses[before] == 1 and all(uses[edge] == 1 for edge in (*own, *leaves)):
            yield _Pair(norms[place][0], *layer)


def _uses(outputs: list[Tensor]) -> Counter[Any]:
    """How often every node of a graph is read, including outputs of the graph."""
    uses = Counter(tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None)
    waiting = list(uses)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None:
                if node not in uses:
                    waiting.append(node)
                uses[node] += 1
    return uses


def _leaves(node: Any) -> list[Any]:
    """The nodes for weight and bias of a layer's node, including the weight's transposition."""
    edges = [edge for edge, _ in node.next_functions]
    if node.name() == "ConvolutionBackward0":
        return edges[1:]
    weight, bias = edges[-1], edges[0] if node.name() == "AddmmBackward0" else None
    return (
        [weight, bias]
        if weight is None or weight.name() != "TBackward0"
        else [weight, bias, weight.next_functions[0][0]]
    )


def _layer(node: Any) -> tuple[Tensor, Tensor | None, Layout] | None:
    """Weight, bias and layout of the layer of a node; None for a node of another kind."""
    name = node.name()
    if name == "ConvolutionBackward0":
        weight, bias = _leaves(node)
        layout = Layout("transposed", node._saved_groups) if node._saved_transposed else Layout()
    elif name == "MmBackward0" or (name == "AddmmBackward0" and node._saved_alpha == node._saved_beta == 1):
        weight, bias, *turned = _leaves(node)
        layout = Layout() if turned else Layout("columns_first")
        weight = turned[0] if turned else weight
    else:
        return None
    tensors = [getattr(leaf, "variable", None) for leaf in (weight, bias)]
    if tensors[0] is None or (bias is not None and (tensors[1] is None or tensors[1].ndim != 1)):
        return None
    return tensors[0], tensors[1], layout


def _traced(module: nn.Module) -> Iterator[_Pair]:
    """Pairs in the ``torch.fx`` graph of a module; empty if it cannot be traced."""
    try:
        with replaced(module, {}):
            graph = fx.Tracer().trace(module)
    except Exception:
        # The module's code runs on proxies for tensors and may raise any exception.
        return
    parts = dict(module.named_modules(remove_duplicate=False))
    calls = Counter(id(parts[node.target]) for node in graph.nodes if node.op == "call_module")
    read = [str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"]
    alone = {id(part) for name, part in parts.items() if name not in read and not _hooked(part)}
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        layer, norm = parts[before.target], parts[node.target]
        fits = type(norm) is _TRACED.get(type(layer)) and norm.running_mean is not None
        if fits and all(calls[id(part)] == 1 and id(part) in alone for part in (layer, norm)):
            transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
            yield _Pair(norm, layer.weight, layer.bias, Layout("transposed", layer.groups) if transposed else Layout())


def _hooked(part: nn.Module) -> bool:
    return bool(part._forward_hooks or part._forward_pre_hooks)


def _agree(
    module: nn.Module, batch: Batch, objective: Objective, source: Source, tensors: Mapping[str, Tensor]
) -> bool:
    """Whether a module's outputs stay equal when tensors of its source are replaced."""
    coarse = max(torch.finfo(tensor.dtype).eps for tensor in tensors.values())
    found = []
    for new in ({}, source.placed(tensors)):
        with replaced(module, new), torch.inference_mode():
            found.append(_outputs(module, batch, objective))
    return len(found[0]) == len(found[1]) and all(
        old.shape == new.shape and bool((old - new).abs().max() <= max(_TOLERANCE, coarse) * old.abs().max())
        for old, new in zip(*found, strict=True)
        if old.numel()
    )


def _outputs(module: nn.Module, batch: Batch, objective: Objective) -> list[Tensor]:
    """All floating tensors that a module returns, and the outputs of the objective."""
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        seen.append(objective.outputs(module, batch))
    finally:
        handle.remove()
    return [tensor for tensor in _tensors(seen) if tensor.is_floating_point()]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple) or is_dataclass(value):
        for part in (
            value.values() if isinstance(value, Mapping) else vars(value).values() if is_dataclass(value) else value
        ):
            yield from _tensors(part)
