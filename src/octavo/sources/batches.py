"""Batches: calling a module, counting examples and dividing batches."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import OctavoError, RequestError

Batch = Any


def run(module: nn.Module, batch: Batch) -> Any:
    """Call a module on a batch that is a tensor, a tuple of positional or a mapping of keyword arguments.

    If a tuple is longer than the arguments of ``forward``, such as inputs with labels, only the first element is
    passed. Keys that ``forward`` does not accept are left out of a mapping. The same batch gives the same outputs at
    every call: modules that change their inputs get copies, and random numbers are repeated. In training mode random
    numbers go on, so that dropout draws other masks.

    Raises
    ------
    RequestError
        If the module fails; the error has the shapes of the batch and the module's message.
    """
    args, keywords = _call(module, batch)
    try:
        with nullcontext() if module.training else repeatable(), _differentiable(module):
            return module(*copied(args), **copied(keywords))
    except (OctavoError, MemoryError):
        raise
    except Exception as error:
        # A module may raise any exception.
        raise RequestError(failure(module, batch, error)) from error


def _differentiable(module: nn.Module) -> AbstractContextManager[Any]:
    """A context without cuDNN if a gradient of recurrent layers may be asked for: it has none in evaluation mode."""
    wanted = torch.is_grad_enabled() and not module.training and torch.backends.cudnn.is_available()
    recurrent = wanted and any(isinstance(part, nn.RNNBase) for part in module.modules())
    return torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()


@contextmanager
def repeatable() -> Iterator[None]:
    """A context with repeatable random numbers that does not affect later ones."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield


def copied(batch: Batch) -> Batch:
    """A copy of the batch whose tensors may be changed."""
    return _mapped(batch, Tensor.clone)


def failure(module: nn.Module, batch: Batch, error: Exception, what: str = "a batch") -> str:
    """The message for a module that raised an error on a batch."""
    return (
        f"{type(module).__name__} fails on {what} of {described(batch)}: {type(error).__name__}: {error}; give batches "
        "that its forward accepts, or select the inputs with forward_args="
    )


def described(batch: Batch) -> str:
    """Shapes and dtypes of a batch, for messages: ``{x: (32, 64) float32, idx: list}``."""
    if isinstance(batch, Tensor):
        return f"{tuple(batch.shape)} {str(batch.dtype).removeprefix('torch.')}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key}: {described(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, tuple | list) and any(isinstance(value, Tensor | Mapping | tuple | list) for value in batch):
        return "[" + ", ".join(map(described, batch)) + "]"
    return type(batch).__name__


def left_out(module: nn.Module, batch: Batch) -> str | None:
    """A note on the parts of a batch that :func:`run` leaves out; None if all are used."""
    taken = _Taken.by(module)
    if isinstance(batch, Mapping):
        odd = [str(key) for key in batch if not taken.keyword(key)]
        if not odd:
            return None
        return (
            f"{type(module).__name__} does not take {', '.join(odd)}: left out of every batch (forward_args= changes "
            "this)"
        )
    if isinstance(batch, tuple | list) and len(batch) > taken.positions:
        return (
            f"{type(module).__name__} takes {taken.positions} of the {len(batch)} elements of a batch: the first one "
            "is used (forward_args= changes this)"
        )
    return None


@dataclass(frozen=True)
class _Taken:
    """The arguments of a ``forward``."""

    positions: float
    names: frozenset[str]
    any_name: bool

    @classmethod
    def by(cls, module: nn.Module) -> _Taken:
        try:
            parameters = list(inspect.signature(module.forward).parameters.values())
        except (TypeError, ValueError):
            # C functions have no signature: everything is passed.
            return cls(math.inf, frozenset(), True)
        kinds = [parameter.kind for parameter in parameters]
        placed = sum(kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
        named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
        return cls(
            math.inf if Parameter.VAR_POSITIONAL in kinds else placed,
            frozenset(parameter.name for parameter in parameters if parameter.kind in named),
            Parameter.VAR_KEYWORD in kinds,
        )

    def keyword(self, key: Any) -> bool:
        return isinstance(key, str) and (self.any_name or key in self.names)


def _call(module: nn.Module, batch: Batch) -> tuple[tuple, dict[str, Any]]:
    if isinstance(batch, Mapping):
        taken = _Taken.by(module)
        return (), {key: value for key, value in batch.items() if taken.keyword(key)}
    if not isinstance(batch, tuple | list):
        return (batch,), {}
    if len(batch) > _Taken.by(module).positions and batch:
        return _call(module, batch[0])
    return tuple(batch), {}


def mask_of(batch: Batch) -> Tensor | None:
    """The (sequences, tokens) mask of a batch that separates tokens from padding, or None."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


def tokens_alone(batch: Batch) -> int | None:
    """Length of the sequences of a batch of tokens and masks, (sequences, tokens) each; None for any other batch."""
    parts = list(batch.values()) if isinstance(batch, Mapping) else []
    if not all(isinstance(part, Tensor) and part.ndim == 2 and not part.is_floating_point() for part in parts):
        return None
    return max((part.shape[1] for part in parts), default=None)


def sequences_in(batch: Batch) -> int:
    """Number of examples in a batch: the rows of its first tensor.

    For a batch that cannot be divided, it is the rows of its tokens, beside which there are patches of images, or of
    its first floating tensor, such as the nodes of a graph.
    """
    tensors = [tensor for tensor in tensors_in(batch) if tensor.ndim]
    if not tensors:
        return 0
    if _indexed(tensors):
        tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if isinstance(tokens, Tensor) and tokens.ndim > 1:
            return len(tokens)
        tensors = [tensor for tensor in tensors if tensor.is_floating_point()] or tensors
    return len(tensors[0])


def has_rows(batch: Batch) -> bool:
    """Whether the rows of a batch may be examples.

    They are not if integers of another length, such as the edges of a graph, may point to rows. Other tensors of
    another length, such as a mask of positions by positions, apply to all rows.
    """
    return not _indexed([tensor for tensor in tensors_in(batch) if tensor.ndim])


class Whole:
    """Marks a batch that cannot be divided by rows."""


class _WholeTuple(Whole, tuple):
    """Positional arguments that must stay together."""


class _WholeMapping(Whole, dict):
    """Keyword arguments that must stay together."""


def whole(batch: Batch) -> Batch:
    """The batch, marked as indivisible."""
    if isinstance(batch, Mapping):
        return _WholeMapping(batch)
    return _WholeTuple(batch if isinstance(batch, tuple | list) else (batch,))


def divided(batch: Batch, size: int) -> list[Batch]:
    """A batch in parts with at most the given number of examples, if it can be divided."""
    total = sequences_in(batch)
    if isinstance(batch, Whole) or total <= size:
        return [batch]
    return [select(batch, slice(at, at + size)) for at in range(0, total, size)]


def select(batch: Batch, which: slice | Tensor) -> Batch:
    """Some of the examples of a batch; tensors without one row per example are unchanged."""
    if isinstance(batch, Whole):
        return batch
    size = sequences_in(batch)

    return _mapped(batch, lambda tensor: tensor[which] if tensor.ndim and len(tensor) == size else tensor)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a tree of tensors with a function applied to each."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        parts = [_mapped(inner, change) for inner in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _indexed(tensors: Sequence[Tensor]) -> bool:
    """Whether some integer tensors have a different length, so that they may be row indices."""
    if any(tensor.layout != torch.strided for tensor in tensors):
        return True
    floating = [len(tensor) for tensor in tensors if tensor.is_floating_point()]
    size = floating[0] if floating else len(tensors[0]) if tensors else 0
    return any(
        len(tensor) not in (1, size)
        for tensor in tensors
        if not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
    )


def tensors_in(batch: Batch) -> Iterator[Tensor]:
    """All tensors of a batch, which may be nested."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_in(value)


def converted(batches: Sequence[Batch], forward_args: Callable[[Batch], Any] | None) -> list[Batch]:
    """Apply ``forward_args`` to every batch: it returns a tuple of positional or a mapping of keyword arguments."""
    if forward_args is None:
        return list(batches)
    result = []
    for number, batch in enumerate(batches):
        try:
            made = forward_args(batch)
        except Exception as error:
            raise RequestError(
                f"data: forward_args fails on batch {number} of {described(batch)}: {type(error).__name__}: {error}; "
                "correct it"
            ) from error
        if not isinstance(made, Tensor | tuple | list | Mapping):
            raise RequestError(
                f"data: forward_args gives {type(made).__name__} for batch {number}; return a tuple of positional or a "
                "mapping of keyword arguments"
            )
        result.append(made)
    return result
