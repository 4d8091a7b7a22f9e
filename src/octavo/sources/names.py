"""Names and shapes that ``transformers`` changes while loading, by its own rules.

Since version 5 a checkpoint's tensors are renamed, and some fused or split, when they are loaded. The library's mapping
is used here too, so that calibration and measurements use the model that ``from_pretrained`` will load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from octavo.sources.conversions import Conversion


@dataclass
class Names:
    """The mapping of a checkpoint's tensors to a module.

    Parameters
    ----------
    parameters
        Unchanged tensors: name in the checkpoint to name in the module.
    conversions
        Tensors that change shape or are merged with others.
    unused
        Tensors that the module does not use.
    missing
        Parameter names that no tensor of the checkpoint fills.
    reshaped
        Shapes in the checkpoint by name in the module, of those unused tensors that only differ in shape.
    """

    parameters: dict[str, str] = field(default_factory=dict)
    conversions: list[Conversion] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    reshaped: dict[str, tuple[int, ...]] = field(default_factory=dict)


def names_of(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Names:
    """Match the tensors of a checkpoint with those of a ``transformers`` model, like its loader.

    Parameters
    ----------
    module
        The model, with or without its weights.
    shapes
        Shapes of the checkpoint's tensors; tied tensors appear under every name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    model: Any = module
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = module.state_dict(keep_vars=True), getattr(module, "base_model_prefix", "")
    result, groups = Names(), dict[str, _Group]()
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            result.unused.append(name)
        elif pattern is not None:
            groups.setdefault(target, _Group(by_pattern[pattern], target, model)).add(name, pattern)
        elif tuple(state[target].shape) == shapes[name]:
            result.parameters[name] = target
        else:
            result.unused.append(name)
            result.reshaped[target] = shapes[name]
    for group in groups.values():
        made = group([torch.empty(shapes[name], device="meta") for name in group.names])
        fitting = {key: value for key, value in made.items() if key in state and state[key].shape == value.shape}
        if fitting:
            result.conversions.append(Conversion(tuple(group.names), tuple(fitting), group))
        else:
            result.unused += group.names
    result.missing = _missing(state, result)
    return result


def _missing(state: Mapping[str, Tensor], names: Names) -> list[str]:
    """Unfilled parameters and buffers; tied ones are filled if one of them is."""
    filled: Iterable[str] = (
        *names.parameters.values(), *(target for item in names.conversions for target in item.targets)
    )  # fmt: skip
    objects = {id(state[name]) for name in filled}
    return [name for name, tensor in state.items() if id(tensor) not in objects]


class _Group:
    """Tensors that one converter of the library processes together."""

    def __init__(self, converter: Any, target: str, model: Any) -> None:
        self.converter, self.target, self.model = converter, target, model
        self.names: list[str] = []
        self.patterns: list[str] = []

    def add(self, name: str, pattern: str) -> None:
        self.names.append(name)
        self.patterns.append(pattern)

    def __call__(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The model's tensors, by name."""
        converter = deepcopy(self.converter)
        for pattern, tensor in zip(self.patterns, tensors, strict=True):
            converter.collected_tensors[pattern].append(tensor)
        made = converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
