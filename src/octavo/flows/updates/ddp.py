"""Compressed gradients in DistributedDataParallel: every worker sends payloads of a stated size to all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from octavo.errors import ArtifactError, RequestError
from octavo.flows.base import flow_of
from octavo.flows.flow_plan import FlowPlan
from octavo.flows.schema import Schema
from octavo.flows.updates.base import UpdateCodec, UpdateState
from octavo.flows.updates.requested import Requested

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
        return self.plan.schema.nbytes / self.sent if self.plan is not None and self.sent else 0.0

    @property
    def memory(self) -> int:
        """Bytes of error feedback and evidence that this worker holds between steps."""
        kept = (self._sender.missing, self._sender.evidence) if self._sender is not None else ()
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def hook(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Gather buckets; the last one sends all gradients of the step, since they share the budget."""
        buffer = bucket.buffer()
        # A future names the devices whose streams its result waits for; the CPU has none.
        future = torch.futures.Future[Tensor](devices=None if buffer.device.type == "cpu" else [buffer.device])
        self._pending.append((buffer, bucket.gradients(), bucket.parameters(), future))
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
        lengths = self._agreed(_FAILED if failure else len(payload), failure)
        assert self.plan is not None
        longest = max(lengths)
        room = self._gathered(torch.frombuffer(bytearray(payload.ljust(longest, b"\0")), dtype=torch.uint8))
        # Shares are added in float32: a sum of float16 may leave its range, and bfloat16 drops small terms.
        schema, mean = self.plan.schema, torch.zeros(self.plan.schema.elements)
        for data, length, state in zip(room, lengths, self._receivers, strict=True):
            mean += schema.flat(self.codec.decode(data[:length].numpy().tobytes(), state)).div_(world)
        self.steps, self.sent = self.steps + 1, len(payload)
        return schema.split(mean)

    def _gathered(self, own: Tensor) -> list[Tensor]:
        """The tensors of all workers, on the CPU."""
        own = own.to(self._wire)
        room = [torch.zeros_like(own) for _ in range(self.workers)]
        dist.all_gather(room, own, group=self.group)
        return [tensor.cpu() for tensor in room]

    @property
    def _wire(self) -> torch.device:
        """Where the group takes tensors from: the CPU if it can, otherwise, as with NCCL, the parameters' device."""
        able = "cpu:" in dist.get_backend_config(self.group)
        return torch.device("cpu") if able else next(iter(self._names)).device

    def _agreed(self, length: int, failure: Exception | None) -> list[int]:
        """The lengths of the payloads of all workers; raises on all of them unless all can go on together."""
        plan = 0 if self.plan is None else int.from_bytes(self.plan.digest, "little", signed=True)
        heard = self._gathered(torch.tensor([length, self.budget, plan]))
        lengths, budgets, plans = zip(*(told.tolist() for told in heard), strict=True)
        for rank, budget in enumerate(budgets):
            if budget != budgets[0]:
                raise RequestError(
                    f"compress_ddp: worker {rank} has payloads of {budget} bytes and worker 0 of {budgets[0]}; give "
                    "all workers the same ratio or size"
                ) from failure
        if failure is not None:
            raise failure
        if _FAILED in lengths:
            raise RequestError(
                f"compress_ddp: worker {lengths.index(_FAILED)} could not send its gradients; see its error"
            )
        for rank, digest in enumerate(plans):
            if digest != plans[0]:
                raise RequestError(
                    f"compress_ddp: worker {rank} has another codec or other parameters than worker 0; give all "
                    "workers the same"
                )
        if max(lengths) > self.budget:
            raise ArtifactError(
                f"compress_ddp: a payload of {max(lengths)} bytes exceeds the budget of {self.budget}; give all "
                "workers the same Octavo"
            )
        return list(lengths)

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
        A :class:`torch.nn.parallel.DistributedDataParallel` that has made no step, wrapped without
        ``find_unused_parameters``; call this on every worker. Payloads are made and read on the CPU, wherever the
        parameters are.
    ratio
        Bytes of the gradients over those of a payload, at least 1.
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
        If the model is not in DistributedDataParallel, has a communication hook already or finds unused parameters, or
        a request cannot be served. In a step: if a gradient is not
        finite, a parameter is new, the number of workers changed, or sizes or codecs differ between workers. All
        workers raise in the same step. DistributedDataParallel cannot go on after an error in a step: begin again from
        the weights before it.
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
    if model.find_unused_parameters:
        raise RequestError(
            "compress_ddp: the model was wrapped with find_unused_parameters=True, which drops what was decoded for "
            "parameters that no worker used in a step; freeze those never used, let every step use the others, and "
            "wrap it without"
        )
    requested = Requested.of("compress_ddp", codec, ratio, size)
    named = {parameter: name for name, parameter in model.module.named_parameters() if parameter.requires_grad}
    whole = sum(parameter.nbytes for parameter in named)
    budget, group = requested.budget(whole), model.process_group
    workers = dist.get_world_size(group)
    found = CompressedGradients(requested.codec, budget, workers, group, _model=model.module, _names=named)
    try:
        model.register_comm_hook(state=None, hook=lambda _, bucket: found.hook(bucket))
    except RuntimeError as error:
        raise RequestError(
            f"compress_ddp: the model takes no communication hook, as where it has one already ({error}); wrap the "
            "module in DistributedDataParallel again"
        ) from error
    return found
