"""The blocks of Llama-like decoders, and moments of their activations from forward passes only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from octavo.errors import RequestError
from octavo.sources.batches import Batch, mask_of, run
from octavo.system.matmul import fast_matmul, gram
from octavo.system.modes import evaluating

#: Their rotary embedding rotates dimension ``i`` of a head with ``i + head / 2``, and there is no norm or clipping
#: between the projections and the attention.
KINDS = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class DecoderBlock:
    """One layer of a decoder.

    Parameters
    ----------
    name
        Prefix of its parameters, such as ``model.layers.0``.
    heads, shared, size
        Number of query heads, of key and value heads, and the dimensions of each.
    """

    name: str
    module: nn.Module
    heads: int
    shared: int
    size: int

    def linear(self, path: str) -> nn.Linear:
        """The name of a projection, such as ``self_attn.q_proj``."""
        found = self.module.get_submodule(path)
        assert isinstance(found, nn.Linear)
        return found

    @property
    def group(self) -> int:
        """Number of query heads per key and value head."""
        return self.heads // self.shared


PROJECTIONS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def blocks(model: nn.Module) -> list[DecoderBlock]:
    """The blocks of a causal language model of ``transformers``, first to last.

    Raises
    ------
    RequestError
        If the model is not one of :data:`KINDS`, or its blocks are built differently.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in KINDS:
        raise RequestError(
            f"{type(model).__name__}: cannot cut the blocks of a model of type {kind!r}, since rotary embeddings and "
            f"norms in attention differ; choose a model of type {', '.join(KINDS)}"
        )
    lists = ((name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList))
    prefix, layers = next(lists, ("", nn.ModuleList()))
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    found = []
    for number, layer in enumerate(layers):
        name = f"{prefix}.{number}"
        parts = dict(layer.named_modules())
        absent = [path for path in PROJECTIONS if not isinstance(parts.get(path), nn.Linear)]
        if absent:
            raise RequestError(f"{name}: {absent[0]} is not an nn.Linear; cut blocks before compressing them")
        found.append(DecoderBlock(name, layer, heads, shared, parts["self_attn.q_proj"].out_features // heads))
    return found


@dataclass(frozen=True)
class Moments:
    """Statistics of one block: means over the positions of all sequences.

    Parameters
    ----------
    queries, keys
        (heads, size) and (shared, size) mean squares before the rotary embedding.
    values
        (shared, size, size) second moments of values; without their bias if the output projection can absorb it.
    neurons
        (neurons, neurons) second moment of the inputs of the MLP's last matrix.
    influence
        ``1 - E[cos(input, output)]`` of the block.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    neurons: Tensor
    influence: float


@fast_matmul()
@torch.no_grad()
def observe(model: nn.Module, batches: Iterable[Batch]) -> list[Moments]:
    """The moments of all blocks from one forward pass over ``batches``; ``attention_mask`` excludes padding.

    Sums are kept in float64 and take eight bytes times the squared number of neurons per block.

    Raises
    ------
    RequestError
        If there are no batches, or an activation is not finite.
    """
    found = [_Sums(block) for block in blocks(model)]
    with evaluating(model), _hooked(found):
        for batch in batches:
            mask = mask_of(batch)
            for sums in found:
                sums.keep = None if mask is None else mask.bool()
            run(model, batch)
    return [sums.moments() for sums in found]


class _Sums:
    """Running sums of one block, fed by hooks."""

    def __init__(self, block: DecoderBlock) -> None:
        self.block = block
        self.keep: Tensor | None = None
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def hooks(self) -> Iterator[tuple[nn.Module, Callable[..., None]]]:
        """Every watched module with its forward hook."""
        block = self.block
        for name, heads in (("q", block.heads), ("k", block.shared)):
            yield block.linear(f"self_attn.{name}_proj"), self._squares(name, heads)
        yield block.linear("self_attn.v_proj"), self._values
        yield block.linear("mlp.down_proj"), self._neurons
        yield block.module, self._block

    def moments(self) -> Moments:
        """The means."""
        if not self.count:
            raise RequestError(
                "batches: there is nothing to observe; give at least one batch with a token that is not padding"
            )
        mean = {name: total / self.count for name, total in self.sums.items()}
        for name, value in mean.items():
            if not bool(torch.isfinite(value).all()):
                raise RequestError(
                    f"{self.block.name}: the moments of {name!r} are not finite; check the model and the data"
                )
        return Moments(mean["q"], mean["k"], mean["v"], mean["neurons"], 1 - float(mean["cosine"]))

    def _add(self, name: str, value: Tensor) -> None:
        value = value.double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _kept(self, flow: Tensor) -> Tensor:
        return (flow.flatten(0, -2) if self.keep is None else flow[self.keep]).float()

    def _squares(self, name: str, heads: int) -> Callable[..., None]:
        def seen(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            self._add(name, self._kept(output).double().square().sum(0).view(heads, -1))

        return seen

    def _values(self, module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        bias = module.bias if self.block.linear("self_attn.o_proj").bias is not None else None
        flow = self._kept(output if bias is None else output - bias).view(-1, self.block.shared, self.block.size)
        self._add("v", torch.einsum("nhi,nhj->hij", flow, flow))

    def _neurons(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        flow = self._kept(args[0])
        self._add("neurons", gram(flow))

    def _block(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = self._kept(args[0] if args else kwargs["hidden_states"])
        after = self._kept(output[0] if isinstance(output, tuple) else output)
        self._add("cosine", cosine_similarity(before, after, dim=-1).double().sum())
        self.count += len(before)


@contextmanager
def _hooked(found: list[_Sums]) -> Iterator[None]:
    pairs = [pair for sums in found for pair in sums.hooks()]
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
