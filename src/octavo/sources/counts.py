"""Checks of the part counts in a configuration: a model with more parts than its tensors fill is refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError

#: Keys with the number of layers, heads, experts or labels to build.
_COUNTS = re.compile(r"(^|_)(num|n)_|layers?$|depths?$|labels$|^attention_types$")
_DEEP = re.compile(r"layers?$|depths?$")
#: Layers that a model may have beyond those with their own tensors, since some share tensors.
_LAYERS = 128
#: Larger numbers are refused unless a tensor has as many rows or columns.
_MANY = 65_536


def check_counts(
    file: Path, config: Mapping[str, Any], shapes: Collection[tuple[int, ...]], error: type[OctavoError]
) -> None:
    """Refuse a configuration with more layers, labels or heads than the tensors can fill, since all would be built.

    Parameters
    ----------
    shapes
        Shapes of the tensors.
    error
        The exception class to raise.
    """
    largest = max((_MANY, *(size for shape in shapes for size in shape)))
    for key, value in entries(config):
        most = _LAYERS + len(shapes) if _DEEP.search(key) else largest
        numbers = [one for one in _leaves(value) if isinstance(one, int | float)]
        if _COUNTS.search(key) and not all(number <= most for number in numbers):
            raise error(
                f"{file}: {key} is {str(value)[:80]}, but {len(shapes)} tensors can fill at most {most}; copy the "
                "artifact again"
            )
        if isinstance(value, list) and len(value) > largest:
            raise error(
                f"{file}: {key} has {len(value)} entries, but these tensors allow at most {largest}; copy the artifact "
                "again"
            )


def _leaves(value: Any) -> Iterator[Any]:
    """A value, or all values of nested lists."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, list):
            todo += item
        else:
            yield item


def entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values at every level."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            yield from item.items()
            todo += item.values()
        elif isinstance(item, list):
            todo += [one for one in item if isinstance(one, dict | list)]
