"""Recovery by distillation: the source teaches the compressed model on unlabeled data, in the forms that are stored.

The student's forward pass runs what would be stored, so that training sees all errors of rounding
(:mod:`octavo.training.straight_through`). It learns the source's outputs and the hidden states of its blocks. Code
lengths have a price, by which the bytes stay what was asked for. What is best on examples that training does not see
is kept, and a part of the data that neither sees gives the figures.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from octavo.allocation.budget import Budget
from octavo.allocation.encoded import as_weights
from octavo.allocation.opened import Opened
from octavo.artifact import Kept, Packed
from octavo.calibration.inmemory import replaced
from octavo.encoding.batching import pieces
from octavo.encoding.checkpoints import load_state, save_state
from octavo.encoding.finish import Built
from octavo.encoding.learnable import Given, rebuilt
from octavo.encoding.recovery import Recovery
from octavo.encoding.result import Result
from octavo.encoding.student import Student
from octavo.errors import RequestError
from octavo.sources.batches import Batch, select, sequences_in
from octavo.sources.memory import fits
from octavo.system.raw import Lazily

#: Change per step: of latents in units of steps, of norms and biases relative to their size, and of matrices that are
#: stored as floats relative to theirs (docs/decisions.md).
_RATE, _RELATIVE, _MATRICES = 1e-2, 1e-3, 1e-2
#: Steps of the linear rise of the rates, which then fall along a cosine of the time.
_RISE = 20
#: Examples in one step, and at most so many are held back to choose the best state.
_EXAMPLES, _BACK = 64, 96
#: Looks at the state, evenly over the time. None ends training early, since the last of it, at low rates, gains most.
_LOOKS = 12
#: What a bit costs at first: by how much it moves a latent in units of a step of the optimizer. It then follows the
#: excess of bytes, once in so many steps, over a share of those allowed. For good it changes by so many times the
#: excess, at once by so many (as logarithms); an excess is taken to be at most so much.
_PRICE, _PRICED, _AIM, _DRIFT, _REACTION, _SWING = 0.05, 5, 0.998, 4.0, 40.0, 0.1
#: The narrowest dead zone that is tried to meet the bytes, and the halvings of the search between it and wider ones.
_NARROWEST, _HALVINGS = 2**-10, 2
#: What a state of training is in words for the folder of work: its plain facts, and the name of its forms.
_FACTS = ("seconds", "steps", "looked", "price", "worth", "least", "best_look")
_KEPT = "recovered"
_UP = "the time was up"
#: Fewest examples for which distillation is worth its time.
_FEWEST = 256


def check_teaching(opened: Opened) -> None:
    """Refuse recovery that could not work, before anything is measured.

    Raises
    ------
    RequestError
        If there is no model that runs, no data was given, or too little.
    """
    where = opened.source.path or opened.source.title
    if not opened.measurable or not fits(opened.source, opened.memory):
        raise RequestError(
            f"{where}: recover=distill needs a model that runs in memory and data for it (data: {opened.text}); give "
            "both, or leave recover out"
        )
    count = 0 if opened.request.data is None else sum(map(sequences_in, opened.teaching))
    if count < _FEWEST:
        raise RequestError(
            f"{where}: recover=distill teaches on unlabeled data, and of what was given {count} examples are left "
            f"beside those that calibrate and judge (a language model's are windows of tokens); give data with at "
            f"least {_FEWEST}, some thousands work well"
        )


def recover(result: Result, asked: Budget) -> tuple[Built, Recovery]:
    """Train the plan of a result; the plan as it was if that is not better.

    Raises
    ------
    RequestError
        If nothing in the plan's forms can be trained.
    """
    run, built = result.run, result.built
    lesson = _Lesson(result, asked.bytes)
    ended = lesson.teach(60 * run.opened.request.minutes)
    found = rebuilt(run, built, *lesson.best) if lesson.best is not None else built
    if found.counted > asked.bytes or not found.quality < built.quality:
        run.opened.notes.append("recovery did not lower the loss on held-out data: the plan stays as it was")
        found = built
    examples = sum(map(sequences_in, lesson.lessons))
    moved = lesson.student.moved
    return found, Recovery(lesson.seconds / 60, lesson.steps, examples, moved, built.quality, found.quality, ended)


class _Lesson:
    """One run of training, and the best state that it saw."""

    def __init__(self, result: Result, allowed: int) -> None:
        built = result.built
        self.run, self.opened, self.built = result.run, result.opened, built
        self.student = Student(result.run, built)
        if not self.student.moved:
            used = ", ".join(sorted({point.method for point in built.plan.points.values()})) or "none"
            raise RequestError(
                f"recover=distill: no form of the plan has codes that can be trained ({used}); let other methods be "
                "chosen, or leave recover out"
            )
        target = self.opened.target
        # What the manifest and other tensors take does not change, but for the digits of offsets.
        beside = built.counted - sum(map(target.bytes, built.packed.values()))
        self.allowed = allowed - beside - 8 * len(built.packed)
        self.lessons, self.back = _divided(self.opened.teaching)
        self.price = self.worth = _PRICE
        self.seconds, self.steps, self.looked = 0.0, 0, 0
        self.least, self.best_look = math.inf, 0
        self.best: tuple[dict[str, Packed], dict[str, Kept]] | None = None
        _, size = self._sized(0.0)
        self.bits = self.student.priced() * self.allowed * _AIM / max(size, 1)
        changes = list(self.student.changes.relative.values())
        groups = [
            (self.student.latents(), _RATE),
            ([change for change in changes if change.dim() < 2], _RELATIVE),
            ([change for change in changes if change.dim() > 1], _MATRICES),
        ]
        self.optimizer = torch.optim.Adam(
            [{"params": tensors, "lr": rate, "full": rate} for tensors, rate in groups if tensors],
            betas=(0.9, 0.95),
            eps=1e-12,
        )
        self.taught = [self.opened.objective.reference(self.student.teacher, [batch])[0] for batch in self.back]

    def teach(self, limit: float) -> str:
        """Train for so many seconds; returns why it ended."""
        if not self._resumed(limit):
            self.least = self._loss(self.built.packed, self.built.contents.kept)
        if self.looked == _LOOKS:
            return _UP
        looks = [limit * (number + 1) / _LOOKS for number in range(_LOOKS)]
        started = time.monotonic() - self.seconds
        for batch in itertools.islice(self._batches(), self.steps, None):
            self.seconds = time.monotonic() - started
            self.run.progress("recover", int(min(self.seconds, limit)), math.ceil(limit))
            if self.seconds >= looks[self.looked]:
                if not self._look(limit):
                    return "the outputs were not finite, so the last good state was kept"
                if self.looked == _LOOKS:
                    break
            if not self._step(batch, self.seconds / limit):
                return f"the loss was not finite in step {self.steps}, so the last good state was kept"
        return _UP

    def _step(self, batch: Batch, share: float) -> bool:
        """One step of the optimizer; False if the loss is not a number."""
        if self.steps % _PRICED == 0 and self.bits:
            excess = min(max(self.student.priced() / self.bits - 1, -_SWING), _SWING)
            self.worth *= math.exp(_DRIFT * excess)
            self.price = self.worth * math.exp(_REACTION * excess)
        self.steps += 1
        factor = min(1.0, self.steps / _RISE) * (1 + math.cos(math.pi * min(share, 1.0))) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = group["full"] * factor
        if not math.isfinite(self.student.gradients(batch)):
            return False
        self.optimizer.step()
        self.student.shrink(self.price * _RATE * factor)
        self.student.settle(_RATE * factor * min(share, 1.0))
        self.optimizer.zero_grad()
        return True

    def _batches(self) -> Iterator[Batch]:
        """Pieces of the data without end, in a new random order each time."""
        generator = torch.Generator().manual_seed(self.opened.request.seed)
        while True:
            for number in torch.randperm(len(self.lessons), generator=generator).tolist():
                yield self.lessons[number]

    def _look(self, limit: float) -> bool:
        """Judge what would be stored now within the bytes, keep it if it is best; False if it is not finite."""
        self.looked += 1
        packed, size = self._sized(0.0)
        # What the coder makes of the codes' entropy changes little in training.
        self.bits = self.student.priced() * self.allowed * _AIM / max(size, 1)
        low, high, fits = 0.0, _NARROWEST, size <= self.allowed
        while not fits and high < 1:
            packed, size = self._sized(high)
            fits = size <= self.allowed
            low, high = (low, high) if fits else (high, 4 * high)
        for _ in range(_HALVINGS if low or high > _NARROWEST else 0):
            middle = (low + high) / 2
            tried, size = self._sized(middle)
            if size > self.allowed:
                low = middle
            else:
                high, packed, fits = middle, tried, True
        if not fits:
            # Not a result, however little it loses; training goes on from here.
            self._save(limit)
            return True
        kept = self.student.kept()
        loss = self._loss(packed, kept)
        if not math.isfinite(loss):
            return False
        if loss < self.least:
            room = self.run.workspace
            stored = {name: room.save_packed(name, _KEPT, {"look": self.looked}, form) for name, form in packed.items()}
            self.least, self.best, self.best_look = loss, (stored, kept), self.looked
        self._save(limit)
        return True

    def _save(self, limit: float) -> None:
        """Keep the state, from which a killed run goes on."""
        tensors = {f"now.{name}": tensor for name, tensor in self.student.tensors().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": value for name, value in state.items()}
        if self.best is not None:
            kept = self.best[1]
            tensors |= {f"best.{name}": kept[name].tensor() for name in self.student.changes.start}
        facts = {name: getattr(self, name) for name in _FACTS}
        save_state(self.run.workspace, self.looked, tensors, {**facts, "limit": limit})

    def _resumed(self, limit: float) -> bool:
        """Go on from the state of a killed run with the same limit; False if there is none."""
        found = load_state(self.run.workspace) if self.opened.request.resume else None
        if found is None or found[1].get("limit") != limit:
            return False
        tensors, facts = found
        room, setting = self.run.workspace, {"look": facts["best_look"]}
        loaded = {name: room.load_packed(name, _KEPT, setting) for name in self.built.packed if facts["best_look"]}
        packed = {name: item for name, item in loaded.items() if item is not None}
        if len(packed) < len(loaded):
            return False
        kept = {
            name: replace(kept, read=Given(tensors[f"best.{name}"])) if f"best.{name}" in tensors else kept
            for name, kept in self.built.contents.kept.items()
        }
        self.best = (packed, kept) if facts["best_look"] else None
        for name in _FACTS:
            setattr(self, name, facts[name])
        self.student.load({name[4:]: value for name, value in tensors.items() if name.startswith("now.")})
        state = self.optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, number, part = name.split(".")
                state["state"].setdefault(int(number), {})[part] = value
        self.optimizer.load_state_dict(state)
        return True

    def _sized(self, deadzone: float) -> tuple[dict[str, Packed], int]:
        packed = self.student.packed(deadzone)
        return packed, sum(map(self.opened.target.bytes, packed.values()))

    def _loss(self, packed: Mapping[str, Packed], kept: Mapping[str, Kept]) -> float:
        """Mean divergence on the examples that are held back."""
        student, objective = self.student, self.opened.objective
        stored = {name: item.given for name, item in kept.items()}
        weights = {**self.opened.source.folded, **Lazily({**as_weights(self.opened, packed).made, **stored})}
        with replaced(student.module, self.opened.source.placed(weights)):
            return float(objective.measure(student.module, self.back, self.taught).mean())


def _divided(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Batches to learn from, of at most so many examples, and those held back: one example of sixteen."""
    lessons, back, held = [], [], 0
    for number, piece in enumerate(part for batch in batches for part in pieces(batch, _EXAMPLES)):
        if number % 16 == 7 and held < _BACK:
            few = min(sequences_in(piece), _BACK - held)
            back.append(select(piece, slice(0, few)))
            held += few
        else:
            lessons.append(piece)
    return (lessons, back) if back else (lessons[1:] or lessons, lessons[:1])
