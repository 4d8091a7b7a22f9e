"""The outputs of modules inside a model, captured by hooks while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.training.losses import logits_of


@contextmanager
def outputs_within(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Capture what modules inside a model return while the model runs in this context.

    Parameters
    ----------
    names
        Names as in ``named_modules()``. The empty name stands for the logits of the whole model.

    Yields
    ------
    dict
        By name, the output of the module's last call: a tensor, or the first tensor of a tuple. It is a copy, since
        models may change outputs in place.

    Raises
    ------
    RequestError
        If the model has no such module.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> with outputs_within(model, ["1", ""]) as seen:
    ...     _ = model(torch.zeros(5, 4))
    >>> {name: tuple(output.shape) for name, output in seen.items()}
    {'1': (5, 3), '': (5, 2)}
    """
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            close = get_close_matches(name, modules, n=3) or list(modules)[1:4]
            raise RequestError(
                f"{type(model).__name__}: has no module {name!r}; give a name of named_modules(), such as "
                f"{', '.join(map(repr, close))}"
            )
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            found = _tensor(output) if name else logits_of(output)
            if not isinstance(found, Tensor):
                raise RequestError(
                    f"{type(model).__name__}: {name or 'the model'!r} returns {type(output).__name__} and no "
                    f"{'tensor' if name else 'logits'}; compare a module inside it"
                )
            seen[name] = found.clone()

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in dict.fromkeys(names)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _tensor(output: Any) -> Any:
    """The output, or the first tensor in a tuple or mapping."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((value for value in values if isinstance(value, Tensor)), output)
