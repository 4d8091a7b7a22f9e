"""A lesson: the weighted sum of everything in which a student follows its teacher, as one loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.sources.batches import Batch, described, mask_of, run
from octavo.system.modes import evaluating
from octavo.training.contents import content
from octavo.training.losses import LossFunction
from octavo.training.teaching.internals import outputs_within
from octavo.training.teaching.terms import TensorPair, Term

#: The student's child that holds the learned maps while it is taught.
_MAPS = "teaching_maps"


class Lesson:
    """A loss ``(student, batch) -> scalar``: ``loss + sum of weight * term``, for :func:`octavo.training.fit`.

    Both models run once a step. What the terms compare is read inside them by hooks.

    Parameters
    ----------
    teacher
        It has the same inputs as the student. It runs in evaluation mode and is not trained.
    terms
        What is compared, such as :class:`Logits`, :class:`HiddenStates`, :class:`Relations` or :class:`Channels`.
    loss
        The loss of labels or of next tokens, with weight 1. Without one, batches need no labels.
    remember
        A dtype in which the teacher's outputs are kept for batches that come again, so that the teacher runs once for
        each. They are known by their content: all tensors, keys and plain values. None runs it in every step.

    Raises
    ------
    RequestError
        If there are no terms, or the first has no weight; in a call, if a batch to remember has unknown content.

    Examples
    --------
    >>> from octavo.training import fit
    >>> from octavo.training.teaching import HiddenStates, Logits
    >>> teacher = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> student = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> batches = list(torch.randn(64, 4).split(16))
    >>> lesson = Lesson(teacher, [Logits(temperature=2.0), HiddenStates({"1": "1"}, weight=0.1)])
    >>> with lesson.maps(student, batches[0]):
    ...     losses = fit(student, lambda epoch: batches, lesson, epochs=2)
    >>> [name for name, module in student.named_children()]
    ['0', '1', '2']
    """

    def __init__(
        self,
        teacher: nn.Module,
        terms: Sequence[Term],
        loss: LossFunction | None = None,
        *,
        remember: torch.dtype | None = None,
    ) -> None:
        if not terms or terms[0].weight is None:
            raise RequestError("lesson: its first term needs a weight, to which the others can be scaled; give one")
        self.teacher = teacher
        self.terms, self.loss, self.remember = tuple(terms), loss, remember
        self._known: dict[str, list[Tensor]] = {}

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        """The loss of a student on a batch: inputs, or a tuple whose first element they are."""
        pairs, mask, total = self._compared(module, batch)
        maps, first = getattr(module, _MAPS, {}), None
        for number, term in enumerate(self.terms):
            seen = [
                (theirs, maps[key](ours)) if (key := _key(number, place)) in maps else (theirs, ours)
                for place, (theirs, ours) in enumerate(pairs[number])
            ]
            value = term.value(seen, mask)
            first = value if first is None else first
            weight = (first / value.clamp_min(1e-12)).detach() if term.weight is None else term.weight
            total = total + weight * value
        return total

    @contextmanager
    def maps(self, student: nn.Module, batch: Batch) -> Iterator[None]:
        """Give the student the learned maps that the terms need, and drop them at the end.

        Nothing else of the student changes. The batch runs in evaluation mode, so that no statistics move.

        Parameters
        ----------
        batch
            A batch of the training, from which widths are known. It is checked against the terms, too.
        """
        if hasattr(student, _MAPS):
            raise RequestError("lesson: the student has learned maps of another lesson; end that one first")
        with evaluating(student), torch.no_grad():
            pairs = self._compared(student, batch)[0]
        maps = _Maps()
        for number, term in enumerate(self.terms):
            for place, (theirs, ours) in enumerate(pairs[number]):
                made = term.map(theirs, ours)
                if made is not None:
                    maps[_key(number, place)] = made.to(ours)
        student.add_module(_MAPS, maps)
        try:
            with evaluating(student), torch.no_grad():
                self(student, batch)
            yield
        finally:
            delattr(student, _MAPS)

    def _compared(self, student: nn.Module, batch: Batch) -> tuple[list[list[TensorPair]], Tensor | None, Tensor]:
        """For every term its pairs of outputs; the mask of padding, and the loss of the labels."""
        inputs = batch[0] if isinstance(batch, tuple | list) else batch
        _same_vocabulary(self.teacher, student)
        names = [term.pairs(self.teacher, student) for term in self.terms]
        flat = [pair for part in names for pair in part]
        theirs = self._taught(inputs, [name for name, _ in flat])
        with outputs_within(student, [name for _, name in flat]) as seen:
            if self.loss is None:
                run(student, inputs)
                total = theirs[0].new_zeros(())
            else:
                total = self.loss(student, batch)
        ours = _listed(student, seen, [name for _, name in flat])
        both = iter(zip(theirs, ours, strict=True))
        return [[next(both) for _ in part] for part in names], mask_of(inputs), total

    @torch.no_grad()
    def _taught(self, inputs: Any, names: list[str]) -> list[Tensor]:
        """The teacher's outputs, from memory where the batch is known."""
        key = "" if self.remember is None else _known_by(inputs)
        if key in self._known:
            found = self._known[key]
        else:
            with evaluating(self.teacher), outputs_within(self.teacher, names) as seen:
                run(self.teacher, inputs)
            found = _listed(self.teacher, seen, names)
            if self.remember is not None:
                # One copy of what several terms read.
                kept = {id(output): output.to(self.remember) for output in found}
                found = self._known[key] = [kept[id(output)] for output in found]
        if self.remember is None:
            return found
        wide = {id(output): output.float() for output in found}
        return [wide[id(output)] for output in found]


class _Maps(nn.ModuleDict):
    """Learned maps as a child of the student. A ``Sequential`` runs all its children, and this one changes nothing."""

    def forward(self, x: Any) -> Any:
        return x


def _listed(model: nn.Module, seen: dict[str, Tensor], names: list[str]) -> list[Tensor]:
    for name in names:
        if name not in seen:
            raise RequestError(f"{type(model).__name__}: {name!r} did not run on a batch; choose a module that does")
    return [seen[name] for name in names]


def _same_vocabulary(teacher: nn.Module, student: nn.Module) -> None:
    """Raise :class:`RequestError` if both state how many tokens they know, and it is not the same."""
    known = [getattr(getattr(model, "config", None), "vocab_size", None) for model in (teacher, student)]
    if None not in known and known[0] != known[1]:
        raise RequestError(
            f"lesson: the teacher knows {known[0]} tokens and the student {known[1]}; both must read the same tokens, "
            "so give the student the teacher's tokenizer and vocabulary"
        )


def _known_by(inputs: Any) -> str:
    """The content of a batch."""
    try:
        return content(inputs)
    except TypeError as error:
        raise RequestError(
            f"lesson: a batch of {described(inputs)} cannot be remembered, since {error}; give tensors and plain "
            "values, or leave out remember="
        ) from error


def _key(term: int, place: int) -> str:
    return f"{term}-{place}"
