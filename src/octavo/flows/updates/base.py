"""What codecs of updates share: the budget, error feedback, the frame, and steps that are counted."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.errors import ArtifactError, BudgetError, RequestError
from octavo.flows.base import Flow
from octavo.flows.filling import FILLED, Slope, most_within
from octavo.flows.flow_plan import FlowPlan
from octavo.flows.payload import seal, unseal
from octavo.flows.schema import Schema, all_finite
from octavo.flows.updates.codes import expect

#: Share of the budget that is filled where choices are compared.
_ROUGHLY = 0.93


@dataclass
class UpdateState:
    """What one side remembers.

    Parameters
    ----------
    plan
        What was agreed on.
    step
        Number of the next payload.
    amount, slope, choice
        How much the sender sent last, how payloads grew with that, and which of the codec's choices it follows.
    missing
        Error feedback of the sender: what was not sent so far, (elements,) float32. It takes as much memory as the
        update in float32.
    evidence
        What a codec that chooses again from time to time has seen of the last updates: the sum of their shares in a
        mean.
    """

    plan: FlowPlan
    step: int = 0
    amount: int = 0
    slope: Slope = field(default_factory=Slope)
    choice: dict[str, Any] = field(default_factory=dict)
    missing: Tensor | None = None
    evidence: Tensor | None = None


@dataclass(frozen=True)
class UpdateCodec(Flow[UpdateState]):
    """A codec of updates; a member says how so much of a flat vector becomes parts, and back.

    Parameters
    ----------
    feedback
        Whether what was not sent is added to the next update (Seide et al., 2014; Karimireddy et al., 2019, arXiv
        1901.09847). Without it, what a biased codec leaves out is lost.
    """

    carries: ClassVar[str] = "updates"
    #: How many parts :meth:`pack` makes.
    parts: ClassVar[int]
    #: Whether the mean of what is decoded, over draws, is what was sent. Otherwise the codec contracts: what is decoded
    #: has a smaller error than zeros, which error feedback needs.
    unbiased: ClassVar[bool] = False
    #: Amounts in which bytes about double; None where bytes are about in proportion to the amount.
    doubling: ClassVar[int | None] = None

    feedback: bool = True

    def __post_init__(self) -> None:
        if self.feedback and self.unbiased:
            raise RequestError(
                f"{self.name}: an unbiased codec may err by more than what it sends, and with feedback its errors "
                "would grow; leave feedback off, or take a biased codec"
            )

    @abstractmethod
    def most(self, schema: Schema) -> int:
        """The largest amount that can be sent; 0 where every payload is alike."""

    def choices(self) -> list[dict[str, Any]]:
        """Plain values among which :meth:`fit` chooses those of least error at the budget."""
        return [{}]

    def prepare(self, flat: Tensor, schema: Schema, choice: Mapping[str, Any], step: int) -> Any:
        """What packing needs of ``flat`` (elements,), float32 and finite, whatever the amount; by default ``flat``."""
        return flat

    @abstractmethod
    def pack(self, prepared: Any, schema: Schema, amount: int, choice: Mapping[str, Any]) -> Sequence[bytes]:
        """The parts of a payload with so much of what was prepared."""

    @abstractmethod
    def unpack(self, parts: Sequence[memoryview], schema: Schema, step: int) -> Tensor:
        """The vector (elements,) that parts stand for; raises :class:`ArtifactError` before memory is taken."""

    def fit(self, samples: Sequence[Mapping[str, Tensor]], budget: int) -> FlowPlan:  # noqa: D102
        if not samples:
            raise RequestError(f"{self.name}: there are no samples to fit; give at least one update")
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
            raise RequestError(f"{self.name}: the budget is {budget!r}; give the bytes of a payload, such as 100_000")
        schema = Schema.of(samples[0])
        plan, flats = FlowPlan(self.name, self._knobs(), budget, schema), [self._flat(s, schema) for s in samples]
        return self.planned(flats, plan, self.chosen(flats, plan))

    def planned(self, flats: Sequence[Tensor], plan: FlowPlan, choice: dict[str, Any]) -> FlowPlan:
        """The plan with a choice, and the amount with which every sample fits."""
        # A byte an entry is a guess that is quickly made.
        amount = self._filled(flats[0], plan, 0, plan.budget, choice)[0]
        for flat in flats[1:]:
            amount = min(amount, self._filled(flat, plan, 0, amount, choice)[0])
        return replace(plan, setting={"amount": amount, **choice})

    def chosen(self, flats: Sequence[Tensor], plan: FlowPlan) -> dict[str, Any]:
        """The choice for some samples: by default that of least error of the first."""
        choices = self.choices()
        return min(choices, key=lambda choice: self.error(flats[0], plan, choice)) if len(choices) > 1 else choices[0]

    def start(self, plan: FlowPlan) -> UpdateState:  # noqa: D102
        if plan.flow != self.name or plan.knobs != self._knobs():
            raise RequestError(f"{self.name}: the plan is of {plan.flow!r} with {plan.knobs}; use flow_of(plan)")
        choice = {name: value for name, value in plan.setting.items() if name != "amount"}
        amount = plan.setting.get("amount")
        if isinstance(amount, bool) or not isinstance(amount, int) or not self.admits(choice, plan.schema):
            raise RequestError(f"{self.name}: the plan's setting is {plan.setting!r}; fit it again")
        return UpdateState(plan, amount=amount, choice=choice)

    def admits(self, choice: dict[str, Any], schema: Schema) -> bool:
        """Whether a plan's choice is one of this codec's."""
        return choice in self.choices()

    @torch.no_grad()
    def encode(self, tensors: Mapping[str, Tensor], state: UpdateState) -> bytes:  # noqa: D102
        flat = self._flat(tensors, state.plan.schema, state.missing)
        # Where anything raises, the state is as it was.
        after = replace(state, slope=replace(state.slope))
        payload = self.advance(flat, after)
        vars(state).update(vars(after))
        return payload

    def advance(self, flat: Tensor, state: UpdateState) -> bytes:
        """The payload of ``flat`` (elements,), which may be changed, and the state of the step after it."""
        amount, payload = self._filled(flat, state.plan, state.step, state.amount, state.choice, slope=state.slope)
        if self.feedback:
            # As the receiver will have it, each tensor in its own dtype.
            given = self._received(payload, state.plan, state.step)
            flat.sub_(state.plan.schema.held_(given))
            state.missing = self._finite(flat, state.plan.schema, "what is left of {}")
        state.step, state.amount = state.step + 1, amount
        return payload

    @torch.no_grad()
    def decode(self, payload: bytes, state: UpdateState) -> dict[str, Tensor]:  # noqa: D102
        found = state.plan.schema.split(self._received(payload, state.plan, state.step))
        state.step += 1
        return found

    def _flat(self, tensors: Mapping[str, Tensor], schema: Schema, missing: Tensor | None = None) -> Tensor:
        """The tensors in a row, with what is missing of them, (elements,) float32; all are finite."""
        schema.check(tensors)
        flat = schema.flat(tensors)
        if missing is not None:
            flat += missing
        # Float64 holds larger values, and updates add up to them.
        return self._finite(flat, schema, "{}" if missing is None else "{} with what is missing of it")

    def _finite(self, flat: Tensor, schema: Schema, what: str) -> Tensor:
        """``flat`` (elements,) again, if all of it is finite."""
        if not all_finite(flat):
            parts = zip(schema.names, flat.split(schema.sizes), strict=True)
            name = next(name for name, part in parts if not all_finite(part))
            raise RequestError(
                f"{self.name}: {what.format(repr(name))} leaves float32 (beyond {torch.finfo(torch.float32).max:.2g}); "
                "send smaller updates; nothing was sent"
            )
        return flat

    def _knobs(self) -> dict[str, Any]:
        """The knobs as a plan holds them: tuples are lists in JSON."""
        return dict(json.loads(json.dumps(asdict(self))))

    def _received(self, payload: bytes, plan: FlowPlan, step: int) -> Tensor:
        """The vector that a payload stands for, (elements,) float32."""
        parts = unseal(payload, plan, step, self.parts)
        try:
            found = self.unpack(parts, plan.schema, step)
            expect(found.shape == (plan.schema.elements,), f"it stands for a tensor of shape {tuple(found.shape)}")
            return found
        except (ValueError, IndexError, OverflowError, RuntimeError) as error:
            raise ArtifactError(f"payload: its parts do not fit together: {error}") from error

    def error(self, flat: Tensor, plan: FlowPlan, choice: Mapping[str, Any]) -> float:
        """Squared error of a sample, about at the budget."""
        _, payload = self._filled(flat, plan, 0, plan.budget, choice, filled=_ROUGHLY)
        given = plan.schema.held_(self._received(payload, plan, 0))
        return float((flat.double() - given).square().sum())

    def _filled(
        self,
        flat: Tensor,
        plan: FlowPlan,
        step: int,
        guess: int,
        choice: Mapping[str, Any],
        filled: float = FILLED,
        slope: Slope | None = None,
    ) -> tuple[int, bytes]:
        prepared = self.prepare(flat, plan.schema, choice, step)

        def make(amount: int) -> bytes:
            return seal(plan, step, self.pack(prepared, plan.schema, amount, choice))

        found = most_within(plan.budget, self.most(plan.schema), guess, make, filled, self.doubling, slope)
        if found is None:
            smallest = len(make(0))
            raise BudgetError(
                f"{self.name}: a payload takes at least {smallest} bytes, the budget is {plan.budget}; ask for more",
                plan.schema.nbytes / smallest,
            )
        return found
