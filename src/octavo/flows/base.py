"""What a flow is: a plan that meets a budget, payloads of stated bytes, and the tensors back on the other side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from octavo.errors import RequestError
from octavo.flows.flow_plan import FlowPlan
from octavo.system.registry import Registry

#: What one side remembers from payload to payload.
S = TypeVar("S")
F = TypeVar("F", bound="type[Flow[Any]]")


class Flow(ABC, Generic[S]):
    """A way to carry tensors from a sender to a receiver; its dataclass fields are its knobs, plain values.

    Both sides hold a state of their own, made by :meth:`start` from the same plan. A payload holds everything else that
    its receiver needs.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    #: What it carries: ``updates``, ``caches``, ``tokens``, ``features`` or ``datasets``.
    carries: ClassVar[str]

    @abstractmethod
    def fit(self, samples: Sequence[Mapping[str, Tensor]], budget: int) -> FlowPlan:
        """A plan under which a payload has at most ``budget`` bytes, and nearly as many where more bytes help.

        Nearly is 2%, or 64 bytes where that is more: the tables of entropy coders have steps.

        Raises
        ------
        BudgetError
            If not even the smallest payload fits.
        RequestError
            If the samples cannot be carried.
        """

    @abstractmethod
    def start(self, plan: FlowPlan) -> S:
        """The state of one side before the first payload."""

    @abstractmethod
    def encode(self, tensors: Mapping[str, Tensor], state: S) -> bytes:
        """The payload of the sender's next step; its state goes on. Where it raises, the state is as it was.

        Raises
        ------
        RequestError
            If the tensors are not those of the plan, or not finite.
        """

    @abstractmethod
    def decode(self, payload: bytes, state: S) -> dict[str, Tensor]:
        """The tensors of a payload; the receiver's state goes on. Where it raises, the state is as it was.

        Raises
        ------
        ArtifactError
            If the payload is damaged, of another plan, or out of step. No memory is taken before that is known.
        """


FLOWS = Registry[type[Flow[Any]]]("flow", "octavo.flows")


def flow(name: str, *, source: str) -> Callable[[F], F]:
    """Register a flow under the name that users write; ``source`` is where it was published."""

    def register(cls: F) -> F:
        FLOWS.add(name, cls)
        cls.name, cls.source = name, source
        return cls

    return register


def flow_of(plan: FlowPlan) -> Flow[Any]:
    """The flow that a plan names, with its knobs: what a receiver needs beside the payloads.

    Raises
    ------
    RequestError
        If there is no such flow, or it has no such knobs.
    """
    try:
        return FLOWS.get(plan.flow)(**plan.knobs)
    except TypeError as error:
        raise RequestError(f"flow {plan.flow!r} does not take the knobs of the plan: {error}") from error
