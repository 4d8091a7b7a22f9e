"""Losses from labels, next tokens and a teacher's outputs: functions of a module and a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.sources.batches import Batch, mask_of, run
from octavo.system.modes import evaluating

#: Maps a module and a batch to a scalar.
LossFunction = Callable[[nn.Module, Batch], Tensor]


def outputs_of(module: nn.Module, inputs: Any) -> Tensor:
    """The logits of a module, or the tensor that it returns."""
    return logits_of(run(module, inputs))


def logits_of(result: Any) -> Tensor:
    """The logits in a module's result, or the tensor itself."""
    return getattr(result, "logits", result)


def cross_entropy(module: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of a batch ``(inputs, labels)``, averaged over examples."""
    inputs, labels = batch
    return functional.cross_entropy(outputs_of(module, inputs), labels)


def next_token(module: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of a language model on ``{"input_ids": (sequences, tokens)}``, averaged over predicted tokens."""
    logits, labels = outputs_of(module, batch)[:, :-1], batch["input_ids"][:, 1:]
    mask = mask_of(batch)
    if mask is not None:
        labels = labels.masked_fill(mask[:, 1:] == 0, -100)
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def distillation(
    teacher: nn.Module, loss: LossFunction | None = None, *, share: float = 0.5, temperature: float = 2.0
) -> LossFunction:
    """A teacher's distribution combined with the true labels (Hinton et al., 2015).

    ``share * T^2 * KL(teacher || student) + (1 - share) * loss``, both distributions softened by the temperature ``T``.

    Parameters
    ----------
    teacher
        The teacher module, with the same inputs as the student. It runs in evaluation mode and is not trained.
    loss
        Loss of the labels; without one only the teacher counts, and batches need no labels.
    """

    def combined(module: nn.Module, batch: Batch) -> Tensor:
        inputs = batch[0] if isinstance(batch, tuple | list) else batch
        with evaluating(teacher), torch.no_grad():
            target = outputs_of(teacher, inputs) / temperature
        value = divergence(target, outputs_of(module, inputs) / temperature) * temperature**2
        return value if loss is None else share * value + (1 - share) * loss(module, batch)

    return combined


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of the distributions of logits (..., classes), averaged over all other dimensions."""
    target, logs = teacher.log_softmax(-1), student.log_softmax(-1)
    return (target.exp() * (target - logs)).sum(-1).mean()


@torch.inference_mode()
def accuracy(module: nn.Module, batches: Iterable[Batch]) -> float:
    """Share of examples of ``(inputs, labels)`` whose label has the largest logit."""
    right = total = 0
    with evaluating(module):
        for inputs, labels in batches:
            right += int((outputs_of(module, inputs).argmax(-1) == labels).sum())
            total += labels.numel()
    return right / max(total, 1)
