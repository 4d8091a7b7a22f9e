"""Compressed gradients in DistributedDataParallel: every worker sends payloads of a stated size to all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from octavo.errors import ArtifactError, RequestError
from octavo.flows.base import FLOWS, flow_of
from octavo.flows.flow_plan import FlowPlan
from octavo.flows.schema import Schema
from octavo.flows.updates.base import UpdateCodec, UpdateState

#: Stands for the length of a payload that a worker could not make.
_FAILED = -1
#: Classes of both generations of FSDP; older versions of torch lack the second.
_FSDP = {"FullyShardedDataParallel", "FSDPModule"}


@dataclass
class CompressedGradients:
    """What :func:`compress_ddp` installed: its codec, its plan after the first step, and what was sent.

    Parameters
    ----------
    codec
        The flow that makes payloads.
    budget
        Bytes of a payload: of all gradients of a step, from one worker to another.
    steps
        Steps that were synchronized.
    sent
        Bytes of this worker's last payload.
    plan
        The plan of this worker, made from its first gradients.
    """

    codec: UpdateCodec
    budget: int
    workers: int
    group: Any = None
    steps: int = 0
    sent: int = 0
    plan: FlowPlan | None = None
    _model: nn.Module | None = None
    _names: dict[nn.Parameter, str] = field(default_factory=dict)
    _pending: list[Any] = field(default_factory=list)
    _sender: UpdateState | None = None
    _receivers: list[UpdateState] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Bytes of the last gradients over those of the last payload; 0 before the first step."""
        return self.plan.schema.nbytes / self.sent if self.plan is not None else 0.0

    @property
    def memory(self) -> int:
        """Bytes of error feedback and evidence that this worker holds between steps."""
        kept = (self._sender.missing, self._sender.evidence) if self._sender is not None else ()
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def hook(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Gather buckets; the last one sends all gradients of the step, since they share the budget."""
        future = torch.futures.Future[Tensor]()
        self._pending.append((bucket.buffer(), bucket.gradients(), bucket.parameters(), future))
        if bucket.is_last():
            pending, self._pending = self._pending, []
            found = self._synchronized(pending)
            for buffer, gradients, parameters, waiting in pending:
                for gradient, parameter in zip(gradients, parameters, strict=True):
                    gradient.copy_(found[self._names[parameter]])
                waiting.set_result(buffer)
        return future

    def _synchronized(self, pending: Sequence[Any]) -> dict[str, Tensor]:
        """The mean of what all workers sent, by the names of parameters; the same bits on every worker."""
        world = dist.get_world_size(self.group)
        if world != self.workers:
            raise RequestError(
                f"compress_ddp: there were {self.workers} workers and now are {world}; call compress_ddp again on all"
            )
        failure: Exception | None = None
        payload = b""
        try:
            payload = self._payload(pending)
        except Exception as error:
            # The others wait for this worker: they are told, and all refuse the step.
            failure = error
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
        dist.all_gather(lengths, torch.tensor([_FAILED if failure else len(payload)]), group=self.group)
        failed = [rank for rank, length in enumerate(lengths) if int(length) == _FAILED]
        if failure is not None:
            raise failure
        if failed:
            raise RequestError(f"compress_ddp: worker {failed[0]} could not send its gradients; see its error")
        longest = max(int(length) for length in lengths)
        if longest > self.budget:
            raise ArtifactError(f"compress_ddp: a payload of {longest} bytes exceeds the budget of {self.budget}")
        room = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world)]
        own = torch.frombuffer(bytearray(payload.ljust(longest, b"\0")), dtype=torch.uint8)
        dist.all_gather(room, own, group=self.group)
        total: dict[str, Tensor] = {}
        for data, length, state in zip(room, lengths, self._receivers, strict=True):
            for name, tensor in self.codec.decode(data[: int(length)].numpy().tobytes(), state).items():
                total[name] = total[name] + tensor if name in total else tensor
        self.steps, self.sent = self.steps + 1, len(payload)
        return {name: tensor / world for name, tensor in total.items()}

    def _payload(self, pending: Sequence[Any]) -> bytes:
        gradients = {
            self._names.get(parameter, "a parameter without name"): gradient
            for _, parts, parameters, _ in pending
            for gradient, parameter in zip(parts, parameters, strict=True)
        }
        assert self._model is not None
        # New parameters are in no bucket: the reducer made its buckets when the model was wrapped.
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and name not in gradients:
                raise RequestError(
                    f"{name!r} is new since compress_ddp was called, and no worker would send its gradient; wrap the "
                    "model in DistributedDataParallel again, and call compress_ddp on it"
                )
        # The order of buckets is that of the backward pass and changes; the plan has that of the model.
        ordered = {name: gradients[name] for name in self._names.values() if name in gradients}
        if self.plan is None:
            Schema.of(ordered).check(ordered)
            plan = self.codec.fit([ordered], self.budget)
            self._sender = self.codec.start(plan)
            self._receivers = [flow_of(plan).start(plan) for _ in range(self.workers)]
            self.plan = plan
        assert self._sender is not None
        return self.codec.encode(ordered, self._sender)


def compress_ddp(
    model: nn.Module, *, ratio: float | None = None, size: int | None = None, codec: UpdateCodec | str = "mixed"
) -> CompressedGradients:
    """Send the gradients of a model in DistributedDataParallel as payloads of a stated size.

    Every step each worker sends one payload with all its gradients to all others, and all take the mean of what was
    decoded. What a payload leaves out is added to the next gradients. Sending begins when the last gradient is there.

    Parameters
    ----------
    model
        A :class:`torch.nn.parallel.DistributedDataParallel` on CPU that has made no step; call this on every worker.
    ratio
        Bytes of the gradients over those of a payload.
    size
        Bytes of a payload instead.
    codec
        A codec of updates, or its name.

    Returns
    -------
    CompressedGradients
        What was sent, and the plan.

    Raises
    ------
    RequestError
        If the model is not in DistributedDataParallel, or a request cannot be served. In a step: if a gradient is not
        finite, a parameter is new, or the number of workers changed. All workers raise in the same step.
        DistributedDataParallel cannot go on after an error in a step: begin again from the weights before it.
    BudgetError
        In the first step, if not even the smallest payload fits.
    """
    if _FSDP & {kind.__name__ for kind in type(model).__mro__}:
        raise RequestError(
            "compress_ddp: the model is in FSDP, which sends shards of weights and takes no payloads; wrap it in "
            "DistributedDataParallel instead"
        )
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        raise RequestError(
            f"compress_ddp: the model is a {type(model).__name__}; wrap it in DistributedDataParallel first"
        )
    flow = FLOWS.get(codec)() if isinstance(codec, str) else codec
    if not isinstance(flow, UpdateCodec):
        raise RequestError(f"compress_ddp: {codec!r} is no codec of updates; name one, such as 'mixed'")
    named = {parameter: name for name, parameter in model.module.named_parameters() if parameter.requires_grad}
    if any(parameter.device.type != "cpu" for parameter in named):
        raise RequestError("compress_ddp: parameters are not on the CPU, where payloads are made; move the model there")
    whole = sum(parameter.nbytes for parameter in named)
    if (ratio is None) == (size is None):
        raise RequestError("compress_ddp: give a ratio, such as ratio=50, or the size of a payload in bytes")
    if ratio is not None and not 1 <= ratio < float("inf"):
        raise RequestError(f"compress_ddp: the ratio is {ratio!r}; give at least 1, such as 50")
    budget = size if size is not None else int(whole / ratio) if ratio else 0
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise RequestError(f"compress_ddp: {budget!r} bytes for {whole} of gradients; give the bytes of a payload")
    group = model.process_group
    found = CompressedGradients(flow, budget, dist.get_world_size(group), group, _model=model.module, _names=named)
    model.register_comm_hook(state=None, hook=lambda _, bucket: found.hook(bucket))
    return found
