"""Models of ``transformers`` in the shapes of the tensors that are to fill them, where their config says others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from octavo.sources.names import names_of
from octavo.sources.resizing import resize


def fit_shapes(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Give a model's tensors the shapes of a checkpoint's, in place; returns whether any had another shape.

    Parameters
    ----------
    model
        A model as its config says, with or without content. What was resized has none.
    shapes
        Shapes of the checkpoint's tensors by name; tied tensors under every name.

    Raises
    ------
    RequestError
        If the tensors of a layer do not fit together.
    """
    found = names_of(model, shapes).reshaped
    own = model.state_dict(keep_vars=True)
    resize(model, {name: own[name].new_empty(shape) for name, shape in found.items()})
    return bool(found)
