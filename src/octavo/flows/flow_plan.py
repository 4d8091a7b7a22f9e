"""What a sender and a receiver agree on before the first payload."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from octavo.errors import RequestError
from octavo.flows.schema import Schema


@dataclass(frozen=True)
class FlowPlan:
    """A flow with its knobs, what it carries, and what a payload may take.

    Parameters
    ----------
    flow
        Name of a registered flow.
    knobs
        Its fields: plain values.
    budget
        Bytes that a payload has at most.
    schema
        What flows.
    setting
        What was fitted: plain values. They are where the sender begins; the receiver does not need them.
    """

    flow: str
    knobs: dict[str, Any]
    budget: int
    schema: Schema
    setting: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> bytes:
        """Eight bytes that stand in every payload: flow, knobs and schema, without which none can be decoded."""
        told = json.dumps([self.flow, self.knobs], sort_keys=True).encode() + self.schema.digest
        return hashlib.sha256(told).digest()[:8]

    def to_json(self) -> str:
        """The plan as text; it is sent once."""
        return json.dumps({
            "flow": self.flow, "knobs": self.knobs, "budget": self.budget, "schema": self.schema.plain(),
            "setting": self.setting,
        })  # fmt: skip

    @classmethod
    def from_json(cls, text: str) -> FlowPlan:
        """The inverse of :meth:`to_json`.

        Raises
        ------
        RequestError
            If the text is not a plan.
        """
        try:
            data = json.loads(text)
            flow, knobs, budget, setting = (data[key] for key in ("flow", "knobs", "budget", "setting"))
            if not (isinstance(flow, str) and isinstance(knobs, dict) and isinstance(setting, dict)):
                raise ValueError("flow, knobs or setting is of another kind")
            if type(budget) is not int or budget < 1:
                raise ValueError(f"the budget is {budget!r}")
            return cls(flow, knobs, budget, Schema.from_plain(data["schema"]), setting)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"not the plan of a flow ({error}); send what FlowPlan.to_json gave") from error
