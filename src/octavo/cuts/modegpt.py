"""MoDeGPT as a cut: neurons, pairs of rotated dimensions, and directions of values of decoders."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from octavo.cuts.base import Cut, Slice, Units, check_kept, cut
from octavo.cuts.decoder import DecoderBlock, Moments, blocks, observe
from octavo.cuts.decomposition import (
    TYPES,
    Decomposition,
    allocate,
    leverage,
    pair_scores,
    remove,
    value_factors,
)
from octavo.errors import RequestError
from octavo.forms import Trimmed
from octavo.sources.batches import Batch
from octavo.sources.resizing import resize


@cut("modegpt", source="MoDeGPT (Lin et al., 2024, arXiv 2408.09632)")
@dataclass(frozen=True)
class MoDeGPT(Cut[list[Moments]]):
    """Units of Llama-like decoders; the kept units compensate for the removed ones, without training.

    The formulas are in :mod:`octavo.cuts.decomposition`. Neurons really go: the MLPs become thinner and faster. The
    attention of ``transformers`` knows one size of heads, so pairs and directions of its heads become zeros. If all
    layers keep as many neurons, the model's config says so, and ``save_pretrained`` writes an ordinary model folder.

    Parameters
    ----------
    types
        Of ``mlp``, ``query-key`` and ``value-output``, those whose units may go.
    ridge
        Added to the diagonals of moments, as a share of their mean.
    temperature
        How alike layers give up their shares; with a low one those that change the stream least give up most.
    """

    types: tuple[str, ...] = TYPES
    ridge: float = 1e-4
    temperature: float = 0.06

    def __post_init__(self) -> None:
        if not self.types or (unknown := sorted(set(self.types) - set(TYPES))):
            what = repr(unknown[0]) if self.types else "an empty list"
            raise RequestError(f"modegpt: types has {what}; choose from {', '.join(TYPES)}")

    def units(self, model: nn.Module) -> list[Units]:
        """Units of every block: one group for its MLP, and one for each key and value head."""
        return [part for block in blocks(model) for kind in TYPES if kind in self.types for part in _units(block, kind)]

    def observe(self, model: nn.Module, batches: Iterable[Batch]) -> list[Moments]:
        """Moments of every block; one pass over the batches."""
        return observe(model, batches)

    def scores(self, model: nn.Module, units: Sequence[Units], evidence: list[Moments]) -> dict[str, Tensor]:
        """Ridge leverage of neurons, energy of rotated pairs, error that a direction of values would cost."""
        found: dict[str, Tensor] = {}
        for block, seen in zip(blocks(model), _of_blocks(model, evidence), strict=True):
            outputs = block.linear("self_attn.o_proj").weight.detach().double()
            heads = outputs.view(-1, block.shared, block.group, block.size)
            found[_name(block, "mlp")] = leverage(seen.neurons, self.ridge)
            for head, energy in enumerate(pair_scores(seen.queries, seen.keys)):
                found[_name(block, "query-key", head)] = energy
                values = value_factors(heads[:, head], seen.values[head], None, self.ridge).values.square()
                # Directions that the matrices do not have are worth nothing.
                found[_name(block, "value-output", head)] = pad(values, (0, block.size - len(values)))
        return {part.name: found[part.name] for part in units}

    def shares(self, units: Sequence[Units], evidence: list[Moments], mean: float) -> dict[str, float]:
        """By the influence of layers on the stream (:func:`octavo.cuts.decomposition.allocate`)."""
        layers = dict.fromkeys(_layer(part.name) for part in units)
        if len(layers) != len(evidence):
            raise RequestError(f"modegpt: units of {len(layers)} blocks, but moments of {len(evidence)}")
        given = allocate([seen.influence for seen in evidence], mean, self.temperature)
        by_layer = dict(zip(layers, given, strict=True))
        return {part.name: by_layer[_layer(part.name)] for part in units}

    @torch.no_grad()
    def apply(self, model: nn.Module, kept: Mapping[str, Tensor], evidence: list[Moments]) -> nn.Module:
        """The model with thinner MLPs, and with zeros for the rest of what goes."""
        check_kept(self.units(model), kept)
        thinner, found = copy.deepcopy(model), Decomposition({}, {})
        for block, seen in zip(blocks(thinner), _of_blocks(model, evidence), strict=True):
            for kind in self.types:
                device = block.linear("mlp.down_proj").weight.device
                masks = [
                    kept[part.name].to(device)
                    if part.name in kept
                    else torch.ones(part.count, dtype=torch.bool, device=device)
                    for part in _units(block, kind)
                ]
                if all(bool(mask.all()) for mask in masks):
                    continue
                together = masks[0] if kind == "mlp" else torch.stack(masks)
                together = together.repeat(1, 2) if kind == "query-key" else together
                remove(kind, block, seen, together, self.ridge, found)
        neurons = {name: form for name, form in found.forms.items() if ".mlp." in name and isinstance(form, Trimmed)}
        rest = {name: form for name, form in found.forms.items() if name not in neurons}
        biases = {name: bias for name, bias in found.biases.items() if ".mlp." in name}
        Decomposition(rest, {n: b for n, b in found.biases.items() if n not in biases}).load(thinner)
        own = dict(thinner.named_parameters())
        small = {name: form.inner.dense().to(own[name]) for name, form in neurons.items()}
        small |= {name: bias[neurons[name.replace(".bias", ".weight")].rows] for name, bias in biases.items()}
        resize(thinner, small)
        widths = {block.linear("mlp.down_proj").in_features for block in blocks(thinner)}
        if len(widths) == 1:
            thinner.config.intermediate_size = widths.pop()  # type: ignore[union-attr]
        return thinner


def _of_blocks(model: nn.Module, evidence: list[Moments]) -> list[Moments]:
    if len(evidence) != (count := len(blocks(model))):
        raise RequestError(f"modegpt: {count} blocks, but moments of {len(evidence)}; observe this model")
    return evidence


def _name(block: DecoderBlock, kind: str, head: int | None = None) -> str:
    return f"{block.name}:{kind}" if head is None else f"{block.name}:{kind}.{head}"


def _layer(name: str) -> str:
    return name.partition(":")[0]


def _units(block: DecoderBlock, kind: str) -> list[Units]:
    """The units of one type in a block, with the rows and columns that are theirs."""
    size, group, prefix = block.size, block.group, f"{block.name}.self_attn"
    if kind == "mlp":
        neurons = block.linear("mlp.down_proj").in_features
        places = torch.arange(neurons)[:, None]
        slices = [*_rows(block, "mlp.gate_proj", places), *_rows(block, "mlp.up_proj", places)]
        slices.append(Slice(f"{block.name}.mlp.down_proj.weight", 1, places))
        return [Units(_name(block, kind), "neuron", neurons, tuple(slices))]
    found = []
    for head in range(block.shared):
        # The first of each query head that reads this head.
        readers = torch.arange(head * group, (head + 1) * group) * size
        if kind == "query-key":
            own = torch.arange(size // 2)[:, None] + torch.tensor([0, size // 2])
            queries = (own[:, None] + readers[:, None]).flatten(1)
            slices = [*_rows(block, "self_attn.q_proj", queries), *_rows(block, "self_attn.k_proj", own + head * size)]
            found.append(Units(_name(block, kind, head), "pair of rotated dimensions", size // 2, tuple(slices), False))
        else:
            own = torch.arange(size)[:, None]
            slices = [*_rows(block, "self_attn.v_proj", own + head * size)]
            slices.append(Slice(f"{prefix}.o_proj.weight", 1, own + readers))
            found.append(Units(_name(block, kind, head), "direction of values", size, tuple(slices), False))
    return found


def _rows(block: DecoderBlock, path: str, places: Tensor) -> list[Slice]:
    leaves = ("weight",) if block.linear(path).bias is None else ("weight", "bias")
    return [Slice(f"{block.name}.{path}.{leaf}", 0, places) for leaf in leaves]
