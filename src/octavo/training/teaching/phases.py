"""Teaching in phases: one lesson after another, each with maps of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from octavo.errors import RequestError
from octavo.sources.batches import Batch
from octavo.sources.source import StepProgress
from octavo.training.loop import fit
from octavo.training.teaching.lesson import Lesson


@dataclass(frozen=True)
class Phase:
    """A lesson, and how long it is taught.

    Parameters
    ----------
    lr
        Peak learning rate of the phase.
    """

    lesson: Lesson
    epochs: int = 1
    lr: float = 1e-3


def teach(
    student: nn.Module,
    batches: Callable[[int], Iterable[Batch]],
    phases: Sequence[Phase],
    *,
    seed: int = 0,
    progress: StepProgress = lambda done, total: None,
) -> list[list[float]]:
    """Teach a student in place, one phase after another; learned maps are dropped at the end of each.

    A usual order is inner layers first and logits last (FitNets, Romero et al., 2015; TinyBERT, Jiao et al., 2020). A
    teacher assistant is two calls: the assistant learns from the teacher, then the student from the assistant.

    Parameters
    ----------
    batches
        Returns the batches of an epoch, by its number within a phase.
    progress
        Called with the number of steps done in the phase and their total.

    Returns
    -------
    list of list of float
        The mean loss of every epoch, phase by phase.

    Raises
    ------
    RequestError
        As :class:`Lesson` and :func:`octavo.training.fit` do.

    Examples
    --------
    >>> import torch
    >>> from octavo.training.teaching import HiddenStates, Logits
    >>> teacher = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> student = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> batches = list(torch.randn(64, 4).split(16))
    >>> inner, outer = Lesson(teacher, [HiddenStates({"1": "1"})]), Lesson(teacher, [Logits()])
    >>> losses = teach(student, lambda epoch: batches, [Phase(inner, epochs=1), Phase(outer, epochs=2)])
    >>> [len(part) for part in losses]
    [1, 2]
    """
    losses = []
    for phase in phases:
        first = next(iter(batches(0)), None)
        if first is None:
            raise RequestError("batches: an epoch has none, so there is nothing to teach; give at least one")
        with phase.lesson.maps(student, first):
            losses.append(
                fit(
                    student, batches, phase.lesson, epochs=phase.epochs, lr=phase.lr, seed=seed, progress=progress,
                )
            )  # fmt: skip
    return losses
