"""Layer-wise relevance propagation with the z+ rule: how much of a network's decisions goes through each unit."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from octavo.errors import RequestError
from octavo.sources.batches import Batch, described

#: What is traced: relevance is counted at the outputs of these layers.
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = nn.modules.batchnorm._BatchNorm
#: No share of their outputs can be told for each input by the rule.
_UNFIT = (nn.LayerNorm, nn.GroupNorm, nn.RNNBase, nn.MultiheadAttention, nn.modules.conv._ConvTransposeNd, nn.Embedding)
#: Added to sums of positive contributions, of which some are zero.
_EPS = 1e-12
#: Outputs nearer to zero than this count as this far from it, where relevance begins.
_NEAREST = 1e-6


@dataclass(frozen=True)
class Propagated:
    """Where the relevance of a network's decisions went. Every example begins with 1 at its class.

    Parameters
    ----------
    outputs
        (channels,) sums of ``|R|`` over examples and positions, by the name of the layer.
    arrived
        Share of the relevance that arrived at the inputs. The rest was lost where an output has no positive
        contribution, so that only its bias explains it.
    """

    outputs: dict[str, Tensor]
    arrived: float


def propagated(model: nn.Module, batches: Iterable[Batch]) -> Propagated:
    """Trace decisions back through a network of rectified layers.

    With activations ``a_i`` and weights ``w_ij`` the inputs of a layer get ``R_i = sum_j (a_i w_ij)^+ / sum_k (a_k
    w_kj)^+ R_j``, the z+ rule; for activations that are not negative this is the rule with positive weights. Batch norm
    is first merged into the layer before it. Pooling, sums and all else pass relevance on in proportion to what they
    took from each input; maxima give it to the winner, and rectifiers to their input. Relevance is conserved.

    Few examples suffice: the paper takes ten of each class.

    Parameters
    ----------
    model
        Returns logits (examples, classes). It is not changed.
    batches
        Inputs with labels (examples,), whose decisions are traced; without labels, those that the model makes itself.

    Raises
    ------
    RequestError
        If the network has layers for which the rule does not hold, such as layer norms and attention, or a batch norm
        that does not follow a layer; if inputs are not one tensor, or there are none.

    Source: Yeom et al. (2021), "Pruning by explaining", Pattern Recognition 115; arXiv 1912.08881. This code follows
    the published rule. The authors mark their method as patent pending; check that before you use it commercially.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    >>> with torch.no_grad():
    ...     _ = net[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    ...     _ = net[2].weight.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    >>> found = propagated(net, [(torch.tensor([[3.0, 1.0]]), torch.tensor([0]))])
    >>> [round(float(value), 3) for value in found.outputs["0"]]
    [0.75, 0.25, 0.0]
    """
    examples, arrived, merged = 0, 0.0, None
    found: dict[str, Tensor] = {}
    for batch in batches:
        inputs, labels = _split(batch)
        if merged is None:
            merged = _merged(model, inputs)
            for name, layer in merged.named_modules():
                if isinstance(layer, _LAYERS):
                    layer.register_forward_hook(_Traced(name, found))
        given = inputs.detach().clone().requires_grad_()
        logits = merged(given)
        chosen = logits.gather(1, (logits.argmax(1) if labels is None else labels)[:, None])
        # All else passes on relevance divided by activation as if it were a gradient.
        away = torch.where(chosen < 0, -1.0, 1.0) * chosen.detach().abs().clamp_min(_NEAREST)
        (ratio,) = torch.autograd.grad((chosen / away).sum(), given)
        arrived += float((ratio * given.detach()).sum())
        examples += len(given)
    if not examples:
        raise RequestError("relevance: there is nothing to observe; give at least one batch")
    return Propagated(found, arrived / examples)


def _split(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Inputs, and labels if there are any."""
    inputs, labels = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (batch, None)
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        raise RequestError(
            f"relevance: the inputs are {described(inputs)}; it is traced to one tensor of floats, so give such batches"
        )
    return inputs, labels if isinstance(labels, Tensor) and not labels.is_floating_point() else None


class _Traced:
    """A hook that applies the z+ rule to a layer, and counts the relevance of its outputs."""

    def __init__(self, name: str, found: dict[str, Tensor]) -> None:
        self.name, self.found = name, found

    def __call__(self, layer: Any, given: tuple[Tensor, ...], result: Tensor) -> Any:
        return _Rule.apply(given[0], result.detach(), layer, self.count)

    def count(self, relevance: Tensor, channels: int) -> None:
        """Add up ``|R|`` over examples and positions."""
        dims = [k for k in range(relevance.ndim) if k != channels]
        total = relevance.abs().sum(dims)
        self.found[self.name] = self.found[self.name] + total if self.name in self.found else total


class _Rule(torch.autograd.Function):
    """The result of a layer, whose gradient is ``R / a`` of its inputs, given that of its outputs."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, result: Tensor, layer: Any, count: Any) -> Tensor:
        ctx.save_for_backward(given, result)
        ctx.layer, ctx.count = layer, count
        return result.clone()

    @staticmethod
    def backward(ctx: Any, ratio: Tensor) -> Any:
        given, result = ctx.saved_tensors
        relevance = ratio * result
        ctx.count(relevance, relevance.ndim - 1 if isinstance(ctx.layer, nn.Linear) else 1)
        signs = [(given.clamp_min(0), ctx.layer.weight.clamp_min(0))]
        if bool((given < 0).any()):
            signs.append((given.clamp_max(0), ctx.layer.weight.clamp_max(0)))
        with torch.enable_grad():
            leaves = [part.detach().requires_grad_() for part, _ in signs]
            positive = torch.stack(
                [_linear(ctx.layer, leaf, weight) for leaf, (_, weight) in zip(leaves, signs, strict=True)]
            ).sum(0)
        passed = torch.autograd.grad(positive, leaves, relevance / (positive + _EPS))
        if len(passed) == 1:
            return passed[0], None, None, None
        return torch.where(given > 0, passed[0], passed[1]), None, None, None


def _linear(layer: Any, given: Tensor, weight: Tensor) -> Tensor:
    """A layer with another weight and without its bias."""
    if isinstance(layer, nn.Linear):
        return functional.linear(given, weight)
    return layer._conv_forward(given, weight, None)


def _merged(model: nn.Module, inputs: Any) -> nn.Module:
    """A copy for evaluation, in which batch norms are part of the layers before them."""
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    made: dict[int, tuple[str, Tensor]] = {}
    pairs: dict[str, str] = {}
    handles = []

    def seen(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], result: Any) -> None:
            if isinstance(module, _NORMS) and id(given[0]) in made:
                pairs[name] = made[id(given[0])][0]
            elif isinstance(module, _LAYERS):
                # The tensor is kept, so that its number is not given to another.
                made[id(result)] = name, result

        return hook

    for name, module in copied.named_modules():
        if isinstance(module, _UNFIT):
            raise RequestError(
                f"relevance: the z+ rule does not hold for {name!r} ({type(module).__name__}); it is for networks of "
                "linear layers, convolutions, batch norms, pooling and sums"
            )
        if isinstance(module, (*_LAYERS, _NORMS)):
            handles.append(module.register_forward_hook(seen(name)))
    with torch.no_grad():
        copied(inputs)
    for handle in handles:
        handle.remove()
    norms = {name: module for name, module in copied.named_modules() if isinstance(module, _NORMS)}
    for name, norm in norms.items():
        if name not in pairs:
            raise RequestError(f"relevance: batch norm {name!r} follows no linear layer or convolution directly")
        layer = copied.get_submodule(pairs[name])
        fuse: Any = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        copied.set_submodule(pairs[name], fuse(layer, norm))
        copied.set_submodule(name, nn.Identity())
    return copied
