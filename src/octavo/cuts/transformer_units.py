"""The units of ``transformers`` models, from the description of their architecture.

Units are coupled: a head goes with the rows of its query, key and value and the columns of the output projection that
read it. Where several query heads share a key and value head, all of them are one unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from octavo.cuts.base import Slice, Units
from octavo.cuts.descriptions import DESCRIPTIONS, Attention, Description, Stack
from octavo.cuts.layers import LAYER, layer_units
from octavo.errors import RequestError
from octavo.sources.encoders import SentenceEncoder

HEAD, NEURON, COLUMN, TOKEN = "head", "neuron", "column", "token"
#: What a transformer can lose.
KINDS = (HEAD, NEURON, COLUMN, LAYER, TOKEN)


@dataclass(frozen=True)
class Anatomy:
    """A described model inside of a module, which may be the module itself.

    Parameters
    ----------
    module
        The module.
    place
        Path of the model in it; empty if it is the model.
    """

    module: nn.Module
    place: str
    description: Description

    @property
    def model(self) -> nn.Module:
        """The described model."""
        return self.module.get_submodule(self.place)

    @property
    def config(self) -> Any:
        """Its config."""
        return self.model.config

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Its own parameters by name; tied ones once."""
        return dict(self.model.named_parameters())

    @property
    def stated_width(self) -> int:
        """Number of columns of the residual stream by the config, which cannot always say that columns went."""
        return int(getattr(self.config, self.description.hidden[0]))

    @property
    def width(self) -> int:
        """Number of columns that the tensors have."""
        for tensor, parameter in self.parameters.items():
            dims = self.streams(tensor)
            if len(dims) == 1:
                return int(parameter.shape[dims[0]])
        return self.stated_width

    def head_size(self, stack: Stack) -> int:
        """Dimensions of a head."""
        own = getattr(self.config, self.description.head_size or "", None)
        return int(own or self.stated_width // getattr(self.config, stack.heads))

    def list_of(self, stack: Stack) -> str:
        """Path of a stack's layers in the model; empty if it has none, as an encoder of a pair alone."""
        for name, part in self.model.named_modules():
            if isinstance(part, nn.ModuleList) and f".{name}".endswith(f".{stack.layers}"):
                return name
        return ""

    def layers(self, stack: Stack) -> Iterator[tuple[str, nn.Module]]:
        """Every layer of a stack with its path in the model."""
        path = self.list_of(stack)
        if path:
            layers: Any = self.model.get_submodule(path)
            yield from ((f"{path}.{number}", layer) for number, layer in enumerate(layers))

    def streams(self, tensor: str) -> tuple[int, ...]:
        """The dimensions of a tensor that are columns of the residual stream, by its description."""
        return next((dims for glob, dims in self.description.stream if fnmatchcase(tensor, glob)), ())

    def named(self, name: str) -> str:
        """The name in the module of what has this name in the model."""
        return f"{self.place}.{name}" if self.place else name


def anatomy(module: nn.Module) -> Anatomy | None:
    """The first described model in a module; None if there is none."""
    for name, part in module.named_modules():
        kind = getattr(getattr(part, "config", None), "model_type", None)
        if isinstance(kind, str) and kind in DESCRIPTIONS:
            return Anatomy(module, name, DESCRIPTIONS[kind])
    return None


def transformer_units(found: Anatomy, kinds: Sequence[str]) -> list[Units]:
    """The units of some of the :data:`KINDS`, first layer to last.

    Raises
    ------
    RequestError
        If a layer is built in another way than described, or layers or columns cannot go.
    """
    if LAYER in kinds and getattr(found.config, found.description.numbered or "", False):
        raise RequestError(
            f"{type(found.model).__name__}: layers cannot be cut, since {found.description.numbered} lets each compute "
            f"by its number, which changes; choose other kinds of units, such as {HEAD} or {NEURON}"
        )
    units: list[Units] = []
    for stack in found.description.stacks:
        for path, layer in found.layers(stack):
            if HEAD in kinds:
                units += (_heads(found, stack, path, layer, attention) for attention in stack.attentions)
            if NEURON in kinds:
                units.append(_neurons(found, stack, path, layer))
        if LAYER in kinds and found.list_of(stack):
            units.append(layer_units(found.module, found.named(found.list_of(stack))))
    if COLUMN in kinds:
        units.append(_columns(found))
    if TOKEN in kinds and (tokens := _tokens(found)).slices:
        units.append(tokens)
    return units


def _heads(found: Anatomy, stack: Stack, path: str, layer: nn.Module, attention: Attention) -> Units:
    """The heads of one attention: all query heads of a key and value head are one unit."""
    size, fused = found.head_size(stack), attention.query == attention.key
    query, key = _matrix(found, path, layer, attention.query), _matrix(found, path, layer, attention.key)
    value, output = _matrix(found, path, layer, attention.value), _matrix(found, path, layer, attention.output)
    width = query.outputs // 3 if fused else query.outputs
    count = (width if fused else key.outputs) // size
    own = torch.arange(count * size).view(count, size)
    asked = torch.arange(width).view(count, -1)
    if fused:
        together = torch.cat([own, own + width, own + 2 * width], 1)
        slices = query.written(together)
    else:
        slices = [*query.written(asked), *key.written(own), *value.written(own)]
    place = path if len(stack.attentions) == 1 else f"{path}.{attention.output.partition('.')[0]}"
    return Units(found.named(f"{place}:{HEAD}"), HEAD, count, (*slices, output.read(asked)))


def _neurons(found: Anatomy, stack: Stack, path: str, layer: nn.Module) -> Units:
    outer = _matrix(found, path, layer, stack.outer)
    places = torch.arange(outer.inputs)[:, None]
    slices = [piece for name in stack.inner for piece in _matrix(found, path, layer, name).written(places)]
    return Units(found.named(f"{path}:{NEURON}"), NEURON, outer.inputs, (*slices, outer.read(places)))


def _columns(found: Anatomy) -> Units:
    """The columns of the residual stream, in every tensor that reads or writes it."""
    name, width, model = type(found.model).__name__, found.width, found.model
    if not found.description.stream or getattr(found.config, "scale_embedding", False):
        raise RequestError(
            f"{name}: columns cannot be cut, since the model scales its embeddings by their number; choose other kinds "
            f"of units, such as {HEAD} or {NEURON}"
        )
    outside = next(_outside(found), None)
    if outside is not None or isinstance(found.module, SentenceEncoder):
        raise RequestError(
            f"{type(found.module).__name__}: columns cannot be cut, since {outside or 'the pooling'!r} reads them and "
            "lies outside of the described model; cut the model inside"
        )
    places, slices = torch.arange(width)[:, None], []
    covered = {(s.tensor, s.dim) for s in _slices(transformer_units(found, (HEAD, NEURON)))}
    covered |= {(s.tensor, s.dim) for s in _tokens(found).slices}
    tables = {f"{path}.weight".lstrip(".") for path, part in model.named_modules() if isinstance(part, nn.Embedding)}
    for tensor, parameter in found.parameters.items():
        dims = found.streams(tensor)
        for dim, size in enumerate(parameter.shape):
            if dim in dims and size == width:
                slices.append(Slice(found.named(tensor), dim, places))
            elif size % width == 0 and (found.named(tensor), dim) not in covered and not (tensor in tables and not dim):
                raise RequestError(
                    f"{name}: {tensor!r} of shape {tuple(parameter.shape)} may read or write the {width} columns, and "
                    f"nothing says that it goes with them, so the cut would break a residual; leave {COLUMN!r} out"
                )
    return Units(found.named(f"stream:{COLUMN}"), COLUMN, width, tuple(slices))


def _outside(found: Anatomy) -> Iterator[str]:
    """Tensors of the module that are not the described model's."""
    own = {id(parameter) for parameter in found.parameters.values()}
    return (name for name, parameter in found.module.named_parameters() if id(parameter) not in own)


def _tokens(found: Anatomy) -> Units:
    """The rows of the token tables."""
    count = int(getattr(found.config, "vocab_size", 0))
    names = [n for n in found.parameters if any(fnmatchcase(n, glob) for glob in found.description.tokens)]
    places = torch.arange(count)[:, None]
    slices = [Slice(found.named(name), 0, places) for name in names if len(found.parameters[name]) == count]
    return Units(found.named(f"vocabulary:{TOKEN}"), TOKEN, count, tuple(slices))


def _slices(units: Sequence[Units]) -> Iterator[Slice]:
    return (piece for part in units for piece in part.slices)


@dataclass(frozen=True)
class Matrix:
    """A linear layer, whichever way round its weight lies.

    Parameters
    ----------
    name
        Its path in the module.
    layer
        An ``nn.Linear``, or a ``Conv1D`` of ``transformers``, which holds (inputs, outputs).
    """

    name: str
    layer: Any

    @property
    def is_turned(self) -> bool:
        """Whether the weight is (inputs, outputs)."""
        return not isinstance(self.layer, nn.Linear)

    @property
    def inputs(self) -> int:
        """Number of inputs."""
        return int(self.layer.weight.shape[0 if self.is_turned else 1])

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return int(self.layer.weight.shape[1 if self.is_turned else 0])

    def written(self, places: Tensor) -> list[Slice]:
        """The slices of units that are outputs, (units, places of each)."""
        found = [Slice(f"{self.name}.weight", 1 if self.is_turned else 0, places)]
        return found if self.layer.bias is None else [*found, Slice(f"{self.name}.bias", 0, places)]

    def read(self, places: Tensor) -> Slice:
        """The slice of units that are inputs."""
        return Slice(f"{self.name}.weight", 0 if self.is_turned else 1, places)


def _matrix(found: Anatomy, path: str, layer: nn.Module, name: str) -> Matrix:
    parts = dict(layer.named_modules())
    if not (isinstance(parts.get(name), nn.Linear) or type(parts.get(name)).__name__ == "Conv1D"):
        raise RequestError(
            f"{found.named(path)}: {name} is not a linear layer, as the description of {found.config.model_type!r} "
            "says; cut a model before it is changed"
        )
    return Matrix(found.named(f"{path}.{name}"), parts[name])


def restate_config(found: Anatomy) -> None:
    """Let the config of a model say the sizes that its tensors have, as far as its fields can.

    Where layers differ in width, or the size of heads hangs on the number of columns, no config can. Then the fields
    keep what they said, and the shapes of the stored tensors decide (:func:`octavo.sources.shaped.fit_shapes`).
    """
    config, description = found.config, found.description
    size = {stack: found.head_size(stack) for stack in description.stacks}
    width, heads = found.width, dict[str, tuple[int, int]]()
    before = found.stated_width
    for stack in description.stacks:
        layers = list(found.layers(stack))
        if not layers:
            continue
        setattr(config, stack.depth, len(layers))
        neurons = {_matrix(found, path, layer, stack.outer).inputs for path, layer in layers}
        if stack.neurons and len(neurons) == 1:
            setattr(config, stack.neurons, neurons.pop())
        counts = {
            tuple(_matrix(found, path, layer, name).outputs // size[stack] for name in (each.query, each.key))
            for path, layer in layers
            for each in stack.attentions
        }
        if len(counts) == 1:
            queries, keys = counts.pop()
            fused = 3 if stack.attentions[0].query == stack.attentions[0].key else 1
            heads[stack.heads] = (queries // fused, keys // fused)
    if description.head_size is not None:
        for stack in description.stacks:
            if stack.heads in heads:
                setattr(config, description.head_size, size[stack])
                setattr(config, stack.heads, heads[stack.heads][0])
                if stack.shared:
                    setattr(config, stack.shared, heads[stack.heads][1])
    stated = description.head_size is not None or (
        len(heads) == len([stack for stack in description.stacks if found.list_of(stack)])
        and all(heads[stack.heads][0] * size[stack] == width for stack in description.stacks if stack.heads in heads)
    )
    if stated:
        for field in description.hidden:
            if getattr(config, field, None) == before:
                setattr(config, field, width)
        if description.head_size is None:
            for name, (queries, _) in heads.items():
                setattr(config, name, queries)
