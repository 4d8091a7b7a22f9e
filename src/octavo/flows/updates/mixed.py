"""Mixed: every tensor with the codec, the setting and the bytes that serve the whole update best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.coding.fields import Reader
from octavo.errors import ArtifactError, RequestError
from octavo.flows.base import FLOWS, flow
from octavo.flows.flow_plan import FlowPlan
from octavo.flows.payload import overhead
from octavo.flows.schema import Schema
from octavo.flows.updates.allocating import (
    CLOSELY,
    ROUGHLY,
    Tried,
    Unit,
    least_bytes,
    least_error,
    measured,
    packed,
    rooms,
    table,
    units,
    whole,
)
from octavo.flows.updates.base import UpdateCodec, UpdateState

#: Updates that a choice is made from, as in the source.
_LATE = 10


@dataclass(frozen=True)
class _Sent:
    """A unit that is ready to be packed."""

    unit: Unit
    number: int
    codec: UpdateCodec
    prepared: Any
    choice: dict[str, Any]
    amount: int
    bytes: int


@flow("mixed", source="L-GreCo (Alimohammadi et al., 2023, arXiv 2210.17357)")
@dataclass(frozen=True)
class Mixed(UpdateCodec):
    """Units, each with one of several codecs, whose squared errors were measured at several sizes.

    A unit is a large tensor, or all small ones together. Bytes go where they lower the total squared error most: by a
    Lagrange multiplier, or by a knapsack over bytes where that is better. The best uniform setting, one codec for all
    tensors at once, is measured too, and is what is sent where it is no worse. Every ``refresh`` steps the mean of the
    last ten updates is measured, with what was missing, and the choice is made again; the receiver needs no notice.
    So it is in the first step in which a unit has content that had none. The codec is biased. The plan's setting
    reports ``error`` beside ``uniform``, as shares of the squared norm.

    Parameters
    ----------
    codecs
        Names of codecs of updates, none of them unbiased if there is feedback.
    joined
        Tensors with fewer elements are one unit.
    refresh
        Steps between choices. What they are made from takes as much memory as the update in float32.
    """

    parts: ClassVar[int] = 1

    codecs: tuple[str, ...] = ("powersgd", "sign", "threshold")
    joined: int = 4096
    refresh: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "codecs", tuple(self.codecs))  # a plan from JSON brings a list
        if not self.codecs or len(set(self.codecs)) < len(self.codecs) or len(self.codecs) > 255:
            raise RequestError(f"mixed: codecs is {self.codecs!r}; name at least one, and none twice")
        for name, value in (("joined", self.joined), ("refresh", self.refresh)):
            if type(value) is not int or value < 1:
                raise RequestError(f"mixed: {name} is {value!r}; give a whole number from 1")
        for name in self.codecs:
            kind = FLOWS.get(name)
            if not issubclass(kind, UpdateCodec) or issubclass(kind, Mixed) or (self.feedback and kind.unbiased):
                raise RequestError(f"mixed: {name!r} cannot be mixed; name biased codecs of updates, such as top-k")

    @cached_property
    def members(self) -> list[UpdateCodec]:
        """The codecs, without feedback of their own."""
        kinds = [FLOWS.get(name) for name in self.codecs]
        return [kind(feedback=False) for kind in kinds if issubclass(kind, UpdateCodec)]

    def cheapest(self, samples: Sequence[Mapping[str, Tensor]], budget: int, alpha: float = 1.0) -> FlowPlan:
        """A plan of the fewest bytes whose expected squared error is ``alpha`` times that of the best uniform setting.

        This is the source's way: there a budget is what the uniform setting takes, and bytes are saved at its error.
        """
        plan = self.fit(samples, budget)
        flats = [plan.schema.flat(sample) for sample in samples]
        evidence, room = _mean(flats), budget - overhead(self.parts) - 1
        uniform, candidates = self._uniform(evidence, plan.schema, room), self._candidates(evidence, plan.schema, room)
        sizes, errors = table(candidates)
        picked = least_bytes(sizes, errors, alpha * uniform.error)
        best = [found[column] for found, column in zip(candidates, picked, strict=True)]
        fewest = budget - room + sum(tried.bytes for tried in best) + len(best)
        if fewest >= budget:
            return plan
        return self.planned(
            flats, replace(plan, budget=fewest), self._setting(best, True, uniform, evidence, plan.schema)
        )

    def most(self, schema: Schema) -> int:
        """Bytes that no codec needs."""
        return 8 * schema.elements + 4096 * (len(schema.names) + 1)

    def chosen(self, flats: Sequence[Tensor], plan: FlowPlan) -> dict[str, Any]:
        """What each unit gets, and the errors that are expected."""
        evidence, schema = _mean(flats), plan.schema
        room = plan.budget - overhead(self.parts) - 1
        uniform = self._uniform(evidence, schema, room)
        candidates = self._candidates(evidence, schema, room)
        sizes, errors = table(candidates)
        picked = least_error(sizes, errors, room - len(candidates))
        best = [found[column] for found, column in zip(candidates, picked, strict=True)]
        error = sum(tried.error for tried in best)
        mixed = error < uniform.error and sum(tried.bytes for tried in best) + len(best) <= room
        return self._setting(best if mixed else [uniform], mixed, uniform, evidence, schema)

    def admits(self, choice: dict[str, Any], schema: Schema) -> bool:
        """Whether there is a codec, one of its choices, an amount and bytes for every unit."""
        found = choice.get("units")
        if not isinstance(found, list) or len(found) != len(self._units(schema, choice)):
            return False
        silent = choice.get("silent", [])
        if not isinstance(silent, list) or any(type(n) is not int or not 0 <= n < len(found) for n in silent):
            return False
        for row in found:
            if not (isinstance(row, list) and len(row) == 4 and all(type(row[place]) is int for place in (0, 2, 3))):
                return False
            codec, chosen, amount, size = row
            if not -1 <= codec < len(self.members) or amount < 0 or size < 0:
                return False
            if chosen not in (self.members[codec].choices() if codec >= 0 else [{}]):
                return False
        return True

    def prepare(self, flat: Tensor, schema: Schema, choice: Mapping[str, Any], step: int) -> list[_Sent]:
        """What every unit that is sent needs, those of few bytes first."""
        parts, found = flat.split(schema.sizes), list[_Sent]()
        for number, (unit, row) in enumerate(zip(self._units(schema, choice), choice["units"], strict=True)):
            which, chosen, amount, size = row
            if which >= 0:
                part, codec = torch.cat([parts[member] for member in unit.members]), self.members[which]
                prepared = codec.prepare(part, unit.schema, chosen, step)
                found.append(_Sent(unit, number, codec, prepared, chosen, amount, size))
        return sorted(found, key=lambda sent: sent.bytes)

    def pack(self, prepared: list[_Sent], schema: Schema, amount: int, choice: Mapping[str, Any]) -> Sequence[bytes]:
        """So many bytes: one that says how tensors are joined, and for every unit its codec and parts."""
        blobs = [b"\0"] * len(choice["units"])
        left, weight = amount - 1 - len(blobs), sum(sent.bytes for sent in prepared)
        for sent in prepared:
            # What is all or nothing, such as equal values, gets its bytes; the largest unit compensates.
            room = min(max(left * sent.bytes // max(weight, 1), sent.bytes), left)
            weight -= sent.bytes
            found = packed(sent.codec, sent.prepared, sent.unit.schema, room, sent.amount, sent.choice)
            if found is not None:
                blobs[sent.number] = bytes([self.members.index(sent.codec) + 1]) + found[1]
                left -= len(found[1])
        return [bytes([choice["mixed"]]) + b"".join(blobs)]

    def unpack(self, parts: Sequence[memoryview], schema: Schema, step: int) -> Tensor:
        """Zeros but for the units that were sent."""
        reader = Reader(parts[0])
        joined = reader.take(1)[0]
        found = list(torch.zeros(schema.elements).split(schema.sizes))
        for unit in self._units(schema, {"mixed": bool(joined)}):
            which = reader.take(1)[0]
            if which > len(self.members):
                raise ArtifactError(f"payload: its codec {which} is not one of {len(self.members)}; send it again")
            if which:
                codec = self.members[which - 1]
                blocks = [reader.block() for _ in range(codec.parts)]
                values = codec.unpack(blocks, unit.schema, step)
                for member, part in zip(unit.members, values.split(unit.schema.sizes), strict=True):
                    found[member] = part
        if reader.data:
            raise ArtifactError(f"payload: {len(reader.data)} bytes are left over; send it again")
        return torch.cat(found)

    def advance(self, flat: Tensor, state: UpdateState) -> bytes:
        """As for every codec, after a new choice where one is due, and before the next."""
        if self._awake(flat, state):
            state.choice = self.chosen([flat], state.plan)
        if state.step % self.refresh >= self.refresh - _LATE:
            # Shares of a mean are added: the sum of huge updates would leave float32.
            share = flat / min(self.refresh, _LATE)
            state.evidence = share if state.evidence is None else state.evidence + share
        payload = super().advance(flat, state)
        if state.evidence is not None and state.step % self.refresh == 0:
            # Where all updates are at the edge of float32, rounding takes their mean beyond it.
            state.choice = self.chosen([state.evidence.nan_to_num()], state.plan)
            state.evidence = None
        return payload

    def _awake(self, flat: Tensor, state: UpdateState) -> bool:
        """Whether a unit without content so far has some: without a new choice it gets no bytes until a refresh.

        Factors of LoRA are such units: the gradient of one is zero as long as the other is.
        """
        schema, silent = state.plan.schema, state.choice.get("silent")
        if not silent:
            return False
        parts, found = flat.split(schema.sizes), self._units(schema, state.choice)
        return any(bool(parts[member].any()) for number in silent for member in found[number].members)

    def _setting(
        self, best: Sequence[Tried], mixed: bool, uniform: Tried, evidence: Tensor, schema: Schema
    ) -> dict[str, Any]:
        norm = float(evidence.double().square().sum()) or 1.0
        return {
            "units": [[tried.codec, tried.choice, tried.amount, tried.bytes] for tried in best],
            "mixed": mixed,
            "silent": self._silent(evidence, schema, mixed),
            "error": sum(tried.error for tried in best) / norm,
            "uniform": {
                "codec": self.codecs[uniform.codec] if uniform.codec >= 0 else None,
                "choice": uniform.choice,
                "error": uniform.error / norm,
            },
        }

    def _silent(self, evidence: Tensor, schema: Schema, mixed: bool) -> list[int]:
        """Numbers of the units that had no content when the choice was made."""
        parts, found = evidence.split(schema.sizes), self._units(schema, {"mixed": mixed})
        return [n for n, unit in enumerate(found) if not any(bool(parts[member].any()) for member in unit.members)]

    def _units(self, schema: Schema, choice: Mapping[str, Any]) -> tuple[Unit, ...]:
        return units(schema, self.joined) if choice.get("mixed") else whole(schema)

    def _candidates(self, flat: Tensor, schema: Schema, room: int) -> list[list[Tried]]:
        parts, found = flat.split(schema.sizes), list[list[Tried]]()
        for unit in units(schema, self.joined):
            part = torch.cat([parts[member] for member in unit.members])
            share = rooms(room * unit.schema.elements / max(schema.elements, 1))
            found.append(measured(part, unit.schema, self.members, share, ROUGHLY))
        return found

    def _uniform(self, flat: Tensor, schema: Schema, room: int) -> Tried:
        """The best of one codec for all tensors at once."""
        return min(measured(flat, schema, self.members, [room - 1], CLOSELY), key=lambda candidate: candidate.error)


def _mean(flats: Sequence[Tensor]) -> Tensor:
    """The mean of some samples, (elements,) float32; a sum of huge ones would leave float32."""
    return torch.stack(list(flats)).mean(0, dtype=torch.float64).float()
