"""Trial runs of a module on its batches, before any other work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibration.inmemory import replaced
from octavo.calibration.objective import Objective
from octavo.errors import OctavoError, RequestError
from octavo.sources.batches import Batch, described, failure, has_rows, run, select, sequences_in

#: Relative tolerance (rounding) between outputs of some rows alone and of the same rows in a larger batch.
_ROUNDING = 1e-3


def try_batches(objective: Objective, module: nn.Module, batches: Sequence[Batch]) -> None:
    """Run every batch once, so that a failing batch is named before any work is done.

    Raises
    ------
    RequestError
        With the number of the batch, its shapes and the module's own message.
    """
    _refuse_inference(module)
    with _idle(module):
        for number, batch in enumerate(batches):
            try:
                for piece in objective.pieces(module, [batch]):
                    if not bool(objective.outputs(module, piece).isfinite().all()):
                        raise RequestError(
                            f"data: {type(module).__name__} gives NaN or Inf on a batch of {described(batch)}; check "
                            "the data and the module"
                        )
            except OctavoError as error:
                raise RequestError(f"data: batch {number}: {error}") from error
            except Exception as error:
                # A user's loss calls the module itself.
                raise RequestError(f"data: {failure(module, batch, error, f'batch {number}')}") from error


def _refuse_inference(module: nn.Module) -> None:
    """Refuse a module through which no gradient can pass."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_inference():
            raise RequestError(
                f"{type(module).__name__}: {name!r} was created in inference mode, so no gradient passes through it; "
                "create or load the module outside of torch.inference_mode()"
            )


def returned(module: nn.Module, batch: Batch) -> Any:
    """Run a module on a batch.

    Raises
    ------
    RequestError
        With the batch's shapes and the module's own message, if it fails.
    """
    with _idle(module):
        try:
            return run(module, batch)
        except OctavoError as error:
            raise RequestError(f"data: batch 0: {error}") from error
        except Exception as error:
            raise RequestError(f"data: {failure(module, batch, error, 'batch 0')}") from error


def rows_are_examples(objective: Objective, module: nn.Module, batches: Sequence[Batch]) -> bool:
    """Whether a module gives the same results on some rows of a batch as on all rows.

    It does not for graphs, whose edges point to rows, nor for modules built for one batch size.
    """
    batch = next((batch for batch in batches if sequences_in(batch) > 1), None)
    if batch is None:
        return all(map(has_rows, batches))
    some = slice(0, sequences_in(batch) // 2)
    with _idle(module):
        try:
            outputs = objective.outputs(module, select(batch, some))
        except Exception:
            return False
        whole = objective.outputs(module, batch)
    return len(outputs) < len(whole) and (has_rows(batch) or _equal(outputs, whole[some]))


def _equal(outputs: Tensor, others: Tensor) -> bool:
    if outputs.shape != others.shape:
        return False
    return bool((outputs - others).norm() <= _ROUNDING * others.norm())


@contextmanager
def _idle(module: nn.Module) -> Iterator[None]:
    """A context in which a module can be run without changing its state or the random number generator.

    Not in inference mode: tensors that a module keeps from a call must allow gradients later.
    """
    with replaced(module, {}), torch.random.fork_rng(devices=[]), torch.no_grad():
        yield
