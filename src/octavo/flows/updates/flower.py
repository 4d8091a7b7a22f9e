"""Flower: clients send payloads of a stated size instead of weights, and the server restores what they trained."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from octavo.errors import ArtifactError, MissingExtraError, OctavoError, RequestError
from octavo.flows.base import flow_of
from octavo.flows.flow_plan import FlowPlan
from octavo.flows.schema import Schema
from octavo.flows.updates.base import UpdateCodec, UpdateState
from octavo.flows.updates.requested import Requested

try:
    from flwr.app import ArrayRecord, ConfigRecord, RecordDict
    from flwr.serverapp.strategy import Strategy
except ImportError:  # Codecs are found by a walk over this folder, with Flower or without.
    ArrayRecord, ConfigRecord, RecordDict, Strategy = None, None, None, object

#: The record of a message that is ours, in it the step that the server waits for, and what stands for none.
RECORD, STEP, NONE = "octavo", "step", -1
#: The record of a client's context with tensors that it remembers.
_MEMORY = "octavo-memory"
_LOG = logging.getLogger("octavo")


@dataclass
class CompressedUplink:
    """A mod of a ClientApp: the reply to a training message has a payload instead of the trained arrays.

    The payload holds the difference to the arrays that came with the message. Integer arrays are sent as they are.
    What a payload leaves out is kept in the context of the client, and added to its next update. A client sends its
    plan first, and again whenever the server waits for another step: after a lost reply, or a restart of either side.

    Parameters
    ----------
    ratio
        Bytes of the floating arrays over those of a payload, at least 1.
    size
        Bytes of a payload instead.
    codec
        A codec of updates, or its name.
    key
        The record of arrays, in messages and replies.

    Raises
    ------
    RequestError
        If a request cannot be served. In a round: if trained arrays are not finite, or not those of the message;
        Flower then reports the client as failed.
    """

    ratio: float | None = None
    size: int | None = None
    codec: UpdateCodec | str = "threshold"
    key: str = "arrays"

    def __post_init__(self) -> None:
        _require()
        self._requested = Requested.of("CompressedUplink", self.codec, self.ratio, self.size)

    def __call__(self, message: Any, context: Any, call_next: Callable[[Any, Any], Any]) -> Any:
        """Let the app train, and replace its arrays by a payload; other messages pass."""
        if message.metadata.message_type.split(".")[0] != "train" or RECORD not in message.content:
            return call_next(message, context)
        before, waited = message.content[self.key].to_torch_state_dict(), int(message.content[RECORD][STEP])
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        tuned = reply.content[self.key].to_torch_state_dict()
        if changed := tuned.keys() ^ before.keys():
            raise RequestError(
                f"CompressedUplink: {min(changed)!r} is not in both the message and the reply; give one model to both"
            )
        update = {name: tuned[name] - tensor for name, tensor in before.items() if tensor.is_floating_point()}
        state = self._opened(context, update, waited)
        plan = {"plan": state.plan.to_json()} if state.step == 0 else {}
        payload = self._requested.codec.encode(update, state)
        _keep(context, state)
        whole = {name: tensor for name, tensor in tuned.items() if name not in update}
        reply.content[self.key] = ArrayRecord(whole)
        reply.content[RECORD] = ConfigRecord({"payload": payload, **plan})
        return reply

    def _opened(self, context: Any, update: dict[str, Tensor], waited: int) -> UpdateState:
        """The sender's state at the step that the server waits for; from a new plan unless it is the next one."""
        codec, schema = self._requested.codec, Schema.of(update)
        known = _kept(context, codec)
        if known is not None and known.plan.schema == schema and known.step == waited:
            return known
        state = codec.start(codec.fit([update], self._requested.budget(schema.nbytes)))
        if known is not None and known.plan.schema == schema:
            state.missing = known.missing
        return state


@dataclass(frozen=True)
class Traffic:
    """Bytes of one round of training, of all clients.

    Parameters
    ----------
    downlink, uplink
        Bytes of all records of messages and of replies.
    plain
        Bytes of the replies that were accepted if arrays had been sent as they are.
    refused
        Why replies were left out, with the number of the client.
    """

    round: int
    downlink: int
    uplink: int
    plain: int
    refused: tuple[str, ...]


@dataclass
class CompressedStrategy(Strategy):  # type: ignore[misc]
    """A strategy that restores payloads of :class:`CompressedUplink`, and leaves all else to another strategy.

    A payload that is damaged, repeated, out of step, or of another model is left out of its round, with a warning. Its
    client begins with a new plan in the next round.

    Parameters
    ----------
    inner
        The strategy that samples clients and aggregates what they trained.
    key
        As for :class:`CompressedUplink`.
    traffic
        What every round took so far.
    """

    inner: Any
    key: str = "arrays"
    traffic: list[Traffic] = field(default_factory=list)

    def __post_init__(self) -> None:
        _require()
        self._receivers: dict[int, UpdateState] = {}
        self._sent: dict[int, dict[str, Tensor]] = {}
        self._kinds: dict[str, torch.dtype] = {}
        self._downlink = 0

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Iterable[Any]:
        """Messages of the inner strategy, each with the step that is waited for."""
        messages = list(self.inner.configure_train(server_round, arrays, config, grid))
        self._sent, self._downlink = {}, 0
        # Messages usually share one record of arrays, which is read once for all of them.
        read: dict[int, dict[str, Tensor]] = {}
        for message in messages:
            node = message.metadata.dst_node_id
            state = self._receivers.get(node)
            # The inner strategy may give all messages one content.
            told = ConfigRecord({STEP: NONE if state is None else state.step})
            message.content = RecordDict({**message.content, RECORD: told})
            record = message.content[self.key]
            if id(record) not in read:
                read[id(record)] = record.to_torch_state_dict()
            self._sent[node] = read[id(record)]
            self._kinds = {name: tensor.dtype for name, tensor in self._sent[node].items()}
            self._downlink += _bytes(message)
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> tuple[Any, Any]:
        """What the inner strategy makes of the restored arrays."""
        found, uplink, plain, refused = [], 0, 0, []
        for reply in replies:
            if not reply.has_error():
                uplink += _bytes(reply)
                node = reply.metadata.src_node_id
                try:
                    reply.content[self.key] = ArrayRecord(self._restored(node, reply.content))
                except (OctavoError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                    # Its client sees that no step is waited for, and begins again.
                    self._receivers.pop(node, None)
                    told = error if isinstance(error, OctavoError) else f"not a reply of CompressedUplink ({error!r})"
                    refused.append(f"client {node}: {told}")
                    _LOG.warning("round %d leaves out client %d: %s", server_round, node, told)
                    continue
                del reply.content[RECORD]
                plain += _bytes(reply)
            found.append(reply)
        self.traffic.append(Traffic(server_round, self._downlink, uplink, plain, tuple(refused)))
        arrays, metrics = self.inner.aggregate_train(server_round, found)
        if arrays is not None:
            # Means of integers, such as counts of batches, would not be integers.
            state = arrays.to_torch_state_dict()
            kinds = {name: kind for name, kind in self._kinds.items() if not kind.is_floating_point and name in state}
            arrays = ArrayRecord(state | {name: state[name].round().to(kind) for name, kind in kinds.items()})
        return arrays, metrics

    def configure_evaluate(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Iterable[Any]:
        """Messages of the inner strategy."""
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Any]) -> Any:
        """What the inner strategy makes of it."""
        return self.inner.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Describe the inner strategy."""
        self.inner.summary()

    def _restored(self, node: int, content: Any) -> dict[str, Tensor]:
        """The arrays that a client trained, from what it was sent and its payload."""
        if RECORD not in content or self.key not in content:
            raise ArtifactError("the reply has no payload; add CompressedUplink to the mods of the ClientApp")
        before, whole = self._sent.get(node), content[self.key].to_torch_state_dict()
        if before is None:
            raise ArtifactError("no reply of the client is waited for; one was received before")
        floating = {name: tensor for name, tensor in before.items() if tensor.is_floating_point()}
        state = self._receivers.get(node)
        if "plan" in content[RECORD]:
            plan = FlowPlan.from_json(content[RECORD]["plan"])
            if plan.schema != Schema.of(floating):
                raise ArtifactError("the client's model has other tensors; give server and clients one version")
            state = flow_of(plan).start(plan)
        if state is None:
            raise ArtifactError("the client sent no plan, and none is known")
        update = flow_of(state.plan).decode(content[RECORD]["payload"], state)
        if {n: (t.shape, t.dtype) for n, t in whole.items()} != {
            n: (t.shape, t.dtype) for n, t in before.items() if n not in update
        }:
            raise ArtifactError("the client's integer arrays are not those of the model; give both one version")
        self._receivers[node] = state
        del self._sent[node]
        return {name: tensor + update[name] if name in update else whole[name] for name, tensor in before.items()}


def _require() -> None:
    if ArrayRecord is None:
        raise MissingExtraError("Flower is not installed: pip install 'octavo[flower]'")


def _bytes(message: Any) -> int:
    return sum(record.count_bytes() for record in message.content.values())


def _keep(context: Any, state: UpdateState) -> None:
    """Store a sender's state in the context of its client, which Flower keeps between rounds."""
    context.state[RECORD] = ConfigRecord({
        "plan": state.plan.to_json(), "step": state.step, "amount": state.amount, "choice": json.dumps(state.choice),
    })  # fmt: skip
    memory = {"missing": state.missing, "evidence": state.evidence}
    context.state[_MEMORY] = ArrayRecord({name: tensor for name, tensor in memory.items() if tensor is not None})


def _kept(context: Any, codec: UpdateCodec) -> UpdateState | None:
    """The inverse of :func:`_keep`; None at first, and where the codec is another than before."""
    if RECORD not in context.state:
        return None
    stored, memory = context.state[RECORD], context.state[_MEMORY].to_torch_state_dict()
    plan = FlowPlan.from_json(stored["plan"])
    if type(flow_of(plan)) is not type(codec) or flow_of(plan) != codec:
        return None
    step, amount, choice = int(stored["step"]), int(stored["amount"]), json.loads(stored["choice"])
    return UpdateState(
        plan, step, amount, choice=choice, missing=memory.get("missing"), evidence=memory.get("evidence")
    )
