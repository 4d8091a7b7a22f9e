"""Atomic feature mimicking of a whole module: layers and tables in two parts, with a ReLU between those of layers.

A linear layer becomes ``Sequential(Linear, ReLU, Linear)`` and a table ``Sequential(Embedding, Linear)``, so the result
is an ordinary module. It is fine-tuned like any other, since the closed form does not know of the ReLU. The second part
of tables costs nothing if it is folded into the layer that reads their rows.

Source: Yu et al. (2024), arXiv 2405.18146; the closed form is in :mod:`octavo.methods.factorize.afm`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from octavo.calibration.layers import is_layer
from octavo.calibration.outputs import leaves
from octavo.errors import RequestError
from octavo.methods.factorize.afm import Mimicked, OutputMoments, folded, mimicked, mimicked_table
from octavo.methods.factorize.factors import whitened
from octavo.sources.batches import Batch, run, sequences_in

#: The largest change of an output by a fold, relative to the largest output.
_SAME = 1e-3


@dataclass(frozen=True)
class Mimicking:
    """Which linear layers and tables of a module are split, and how.

    Parameters
    ----------
    ranks
        Ranks by the name of the layer or table, such as ``{"tables.0": 4, "mlp.0": 32}``.
    relu
        Whether there is a ReLU between the two parts of a layer.
    folds
        For the name of a linear layer, the names of the tables whose rows it reads, in the order in which they are
        concatenated. It then reads their codes. Nothing else may read the rows.

    Examples
    --------
    >>> import torch
    >>> from octavo.methods.factorize.mimicking import Mimicking
    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    >>> split = Mimicking({"0": 8}).of(net, [torch.randn(256, 64)])
    >>> split[0]
    Sequential(
      (0): Linear(in_features=64, out_features=8, bias=True)
      (1): ReLU()
      (2): Linear(in_features=8, out_features=64, bias=True)
    )
    """

    ranks: Mapping[str, int]
    relu: bool = True
    folds: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def of(self, module: nn.Module, batches: Sequence[Batch]) -> nn.Module:
        """A copy of the module whose parts mimic the outputs of its layers and the rows of its tables.

        Parameters
        ----------
        batches
            Inputs of the module, such as its training data.

        Raises
        ------
        RequestError
            If there are no batches, a name is not that of a linear layer or table, a layer is not used, a rank is not
            possible, or a fold changes the outputs.
        """
        if not batches:
            raise RequestError("batches: none are given to mimic outputs on; give some inputs of the module")
        parts = _mimicked(module, self.ranks, batches)
        split = self._split(module, parts)
        made = self._folded(split, parts)
        if self.folds:
            _check_same(split, made, batches[0])
        return made

    def by_weights(self, module: nn.Module) -> nn.Module:
        """A copy of the module with truncated SVDs of its weights in parts of the same shapes, for comparisons."""
        layers = _layers(module, self.ranks)
        parts = {name: _truncated(layers[name], rank) for name, rank in self.ranks.items()}
        return self._folded(self._split(module, parts), parts)

    def shaped(self, module: nn.Module) -> nn.Module:
        """A copy of the module with parts of the same shapes, all zeros, to load an artifact into."""
        parts = {}
        for name, layer in _layers(module, self.ranks).items():
            rank = self.ranks[name]
            inputs, outputs = layer.weight.shape if isinstance(layer, nn.Embedding) else layer.weight.shape[::-1]
            parts[name] = Mimicked(
                *(torch.zeros(*size) for size in ((rank, inputs), (rank,), (outputs, rank), (outputs,)))
            )
        return self._folded(self._split(module, parts), parts)

    @torch.no_grad()
    def _split(self, module: nn.Module, parts: Mapping[str, Mimicked]) -> nn.Module:
        """The module with the parts in place, nothing folded."""
        made = copy.deepcopy(module)
        for name, layer in _layers(module, self.ranks).items():
            part = _widened(parts[name], self.ranks[name])
            if isinstance(layer, nn.Embedding):
                inner: list[nn.Module] = [_table(part.inner.t(), layer.padding_idx)]
            else:
                inner = [_linear(part.inner, part.inner_bias), *([nn.ReLU()] if self.relu else [])]
            sequence = nn.Sequential(*inner, _linear(part.outer, part.outer_bias))
            _put(made, name, sequence.to(layer.weight).train(module.training))
        return made

    @torch.no_grad()
    def _folded(self, split: nn.Module, parts: Mapping[str, Mimicked]) -> nn.Module:
        """The module with the bases of some tables in the layers that read them."""
        made = copy.deepcopy(split)
        for reader, tables in self.folds.items():
            name = f"{reader}.0" if reader in self.ranks else reader
            layer = _layer(made, name)
            for table in tables:
                if table not in self.ranks or not isinstance(split.get_submodule(f"{table}.0"), nn.Embedding):
                    raise RequestError(f"{reader}: {table} is no table with a rank; give its rank, or do not fold it")
            bases = [_widened(parts[table], self.ranks[table]) for table in tables]
            bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
            _put(made, name, _linear(*folded(layer.weight, bias, bases)))
            for table in tables:
                _put(made, table, nn.Sequential(made.get_submodule(f"{table}.0")))
        return made


def _mimicked(module: nn.Module, ranks: Mapping[str, int], batches: Sequence[Batch]) -> dict[str, Mimicked]:
    """The parts of all layers and tables, from one pass over the batches."""
    layers = _layers(module, ranks)
    moments = {
        name: torch.zeros(len(layer.weight)) if isinstance(layer, nn.Embedding) else OutputMoments(len(layer.weight))
        for name, layer in layers.items()
    }
    handles = [layer.register_forward_hook(_watching(moments[name])) for name, layer in layers.items()]
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                run(module, batch)
    finally:
        for handle in handles:
            handle.remove()
        for part, flag in training.items():
            part.training = flag
    found = {}
    for name, layer in layers.items():
        weight, seen = layer.weight.detach(), moments[name]
        if isinstance(seen, Tensor):
            found[name] = mimicked_table(weight, seen, ranks[name])
        elif not seen.count:
            raise RequestError(
                f"{name}: no batch passes this layer; give batches that use it, or leave it out of ranks"
            )
        else:
            bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
            found[name] = mimicked(weight, bias, seen, ranks[name])
    return found


def _watching(seen: Tensor | OutputMoments) -> Callable[[nn.Module, Any, Tensor], None]:
    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        if isinstance(seen, OutputMoments):
            seen.add(output.flatten(0, -2))
        else:
            seen.add_(torch.bincount(args[0].flatten().cpu(), minlength=len(seen)))

    return watch


def _truncated(layer: nn.Linear | nn.Embedding, rank: int) -> Mimicked:
    """The truncated SVD of a weight, with the original bias."""
    parts = whitened(layer.weight.detach(), most=rank).first(rank)
    zeros = torch.zeros(len(parts.values))
    if isinstance(layer, nn.Embedding):
        return Mimicked(parts.left.t(), zeros, parts.right.t(), torch.zeros(layer.embedding_dim))
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
    return Mimicked(parts.right, zeros, parts.left, bias)


def _widened(part: Mimicked, rank: int) -> Mimicked:
    """The parts with zeros for directions without variance, so that shapes depend on the rank alone."""
    lack = rank - len(part.inner)
    return Mimicked(
        pad(part.inner, (0, 0, 0, lack)), pad(part.inner_bias, (0, lack)), pad(part.outer, (0, lack)), part.outer_bias
    )


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    made.weight.copy_(weight)
    made.bias.copy_(bias)
    return made


def _table(codes: Tensor, padding: int | None) -> nn.Embedding:
    return nn.Embedding.from_pretrained(codes.contiguous(), freeze=False, padding_idx=padding)


def _layers(module: nn.Module, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The linear layers and tables of these names."""
    found = {name: _layer(module, name) for name in ranks}
    for name, rank in ranks.items():
        if not 0 < rank <= (most := min(found[name].weight.shape)):
            raise RequestError(f"{name}: rank {rank} is not possible; choose from 1 to {most}")
    return found


def _layer(module: nn.Module, name: str) -> Any:
    """The linear layer or table of that name."""
    try:
        found = module.get_submodule(name)
    except AttributeError as error:
        known = [name for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Embedding)]
        raise RequestError(
            f"{type(module).__name__}: has no module {name!r}; choose from {', '.join(known)}"
        ) from error
    if not isinstance(found, nn.Linear | nn.Embedding) or not is_layer(found, "weight"):
        raise RequestError(f"{name}: is {type(found).__name__}; give the names of linear layers and embeddings")
    return found


def _put(module: nn.Module, name: str, part: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, part)


@torch.no_grad()
def _check_same(split: nn.Module, made: nn.Module, batch: Batch) -> None:
    """Refuse folds after which the module computes something else."""
    advice = "something beside that layer reads the rows, or in another order; leave the fold out"
    split, made, count = copy.deepcopy(split).eval(), copy.deepcopy(made).eval(), sequences_in(batch)
    try:
        found = leaves(run(made, batch), count)
    except RequestError as error:
        raise RequestError(f"folds: the module no longer runs, so {advice}") from error
    for name, expected in leaves(run(split, batch), count).items():
        if not float((found[name] - expected).abs().max()) <= _SAME * float(expected.abs().max()):
            raise RequestError(f"folds: the outputs {name} change, so {advice}")
