"""Evidence and measurements of a module that is fully in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibration.blocks import Blocks
from octavo.calibration.calibrating import Calibration, calibrate
from octavo.calibration.objective import Objective
from octavo.calibration.runner import Runner
from octavo.calibration.work_folder import WorkFolder
from octavo.errors import RequestError
from octavo.sources.batches import Batch
from octavo.sources.modules import own_tensors
from octavo.sources.sites import Site
from octavo.sources.source import Source
from octavo.system.matmul import fast_matmul
from octavo.system.modes import evaluating

#: The source's outputs on all data are kept up to this size. Otherwise they are recomputed from the hidden states after
#: the last block, which are smaller by vocabulary over width.
_REFERENCE_BYTES = 1 << 28


class InMemory(Runner):
    """A module that is run unchanged."""

    def __init__(self, source: Source) -> None:
        assert source.module is not None
        self.source, self.module = source, source.module
        #: The module whose outputs are to be kept; another one if units were cut.
        self.original = source.original.module or source.module
        #: The module's tensors while tensors of the source are replaced or evidence is gathered.
        self.folded = source.placed(source.folded)
        self._reference: _Outputs | _LastStates | None = None

    @fast_matmul()
    def calibrate(
        self,
        sites: Sequence[Site],
        batches: Sequence[Batch],
        objective: Objective,
        room: WorkFolder,
        *,
        seed: int = 0,
        text: str = "",
        curvature: str = "kfac",
        coarse: bool = False,
        progress: Callable[[int, int], Any] = lambda done, total: None,
    ) -> Calibration:
        """Evidence of all sites (:func:`octavo.calibration.calibrating.calibrate`), kept in a folder of work."""
        with replaced(self.module, self.folded):
            found = calibrate(
                self.source,
                sites,
                batches,
                objective,
                seed=seed,
                text=text,
                curvature=curvature,
                coarse=coarse,
                progress=progress,
            )
        room.evidence.write("whole", found.evidence)
        return found

    @fast_matmul()
    def measure(self, batches: Sequence[Batch], objective: Objective, weights: Mapping[str, Tensor]) -> Tensor:
        """Divergence of every example from the source, with some tensors replaced, by name in the source."""
        self._reference = self._reference or self._refer(batches, objective)
        new = {**self.folded, **self.source.placed(weights)}
        losses = []
        with replaced(self.module, new) as before, torch.inference_mode():
            for number, batch in enumerate(batches):
                outputs = objective.outputs(self.module, batch)
                old = before if self.original is self.module else {}
                losses.append(objective.divergence(self._reference.of(number, batch, old), outputs).cpu())
        return torch.cat(losses)

    @fast_matmul()
    def judge(
        self, batches: Sequence[Batch], objective: Objective, module: nn.Module, old: Mapping[str, Tensor]
    ) -> Tensor:
        """Divergence of every example from the source, for another module.

        Parameters
        ----------
        old
            Values of the source's module by name, if they were changed since it was measured.
        """
        self._reference = self._reference or self._refer(batches, objective)
        losses, old = [], old if self.original is self.module else {}
        with torch.inference_mode():
            for number, batch in enumerate(batches):
                outputs = objective.outputs(module, batch)
                losses.append(objective.divergence(self._reference.of(number, batch, old), outputs).cpu())
        return torch.cat(losses)

    def _refer(self, batches: Sequence[Batch], objective: Objective) -> _Outputs | _LastStates:
        with replaced(self.original, {}), torch.inference_mode():
            return _reference(self.original, batches, objective)

    def outputs(self, batches: Sequence[Batch], objective: Objective) -> Iterator[Tensor]:
        """The outputs that the objective compares, batch by batch."""
        for batch in batches:
            with replaced(self.module, {}), torch.inference_mode():
                outputs = objective.outputs(self.module, batch)
            yield outputs


@contextmanager
def scratch(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A context in which a module's tensors may be changed; all values are restored at its end.

    It yields the original values by name.
    """
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    before = {key: tensor.data for key, tensor in tensors.items()}
    held = [(part._buffers, name, tensor) for part in module.modules() for name, tensor in part._buffers.items()]
    training = [submodule for submodule in module.modules() if submodule.training]
    extra = _extra_state(module)
    try:
        # Views of one storage stay views, since writing to one changes all.
        storages: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors.values():
            tensor.data = _elsewhere(tensor.data, storages)
        module.eval()
        yield {name: before[id(tensor)] for name, tensor in own_tensors(module).items()}
    finally:
        for key, tensor in tensors.items():
            tensor.data = before[key]
        for buffers, name, buffer in held:
            buffers[name] = buffer
        for submodule in training:
            submodule.training = True
        # Last, since this runs user code, which may fail.
        for submodule, state in extra:
            submodule.set_extra_state(state)


def _elsewhere(tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """A copy of a tensor, inside the copy of its storage if that exists."""
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
        return tensor.clone()
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in storages:
        storages[storage.data_ptr()] = storage.clone()
    copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return copy.set_(storages[storage.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride())


class _Written:
    """The tensors that a forward pass may change: buffers such as counters, and tables of bounded norm."""

    def __init__(self, module: nn.Module) -> None:
        self._held: list[tuple[dict[str, Any], str, Tensor, Tensor]] = [
            (held, name, tensor, tensor.detach().clone())
            for part in module.modules()
            for held in (part._buffers, part._parameters if getattr(part, "max_norm", None) is not None else {})
            for name, tensor in held.items()
            if tensor is not None
        ]

    def restore(self) -> None:
        for held, name, tensor, before in self._held:
            if not torch.equal(tensor, before):
                tensor.data.copy_(before)
            held[name] = tensor


def _extra_state(module: nn.Module) -> list[tuple[nn.Module, Any]]:
    """The extra state of modules that can restore it."""
    own = nn.Module.set_extra_state
    return [(part, part.get_extra_state()) for part in module.modules() if type(part).set_extra_state is not own]


class _Outputs:
    """The source's outputs, kept in memory."""

    def __init__(self, outputs: list[Tensor]) -> None:
        self.outputs = outputs

    def of(self, number: int, batch: Batch, old: Mapping[str, Tensor]) -> Tensor:
        return self.outputs[number]


class _LastStates:
    """The source's hidden states after its last block, from which its outputs are recomputed."""

    def __init__(self, blocks: Blocks, objective: Objective, states: list[Tensor]) -> None:
        self.blocks, self.objective, self.states = blocks, objective, states

    def of(self, number: int, batch: Batch, old: Mapping[str, Tensor]) -> Tensor:
        with replaced(self.blocks.module, old):
            return self.blocks.postlude(self.objective, batch, self.states[number])


def _reference(module: nn.Module, batches: Sequence[Batch], objective: Objective) -> _Outputs | _LastStates:
    first = objective.outputs(module, batches[0])
    blocks = Blocks.find(module)
    if blocks is None or first.nbytes * len(batches) <= _REFERENCE_BYTES:
        return _Outputs([first, *(objective.outputs(module, batch) for batch in batches[1:])])
    states: list[Tensor] = []

    def keep(block: nn.Module, args: tuple, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handle = blocks.list[-1].register_forward_hook(keep)
    try:
        with torch.inference_mode(False):
            blocks.check(objective, batches[0])
        for batch in batches:
            objective.outputs(module, batch)
    except RequestError:
        # Not a chain: all outputs must be kept.
        return _Outputs([objective.outputs(module, batch) for batch in batches])
    finally:
        handle.remove()
    return _LastStates(blocks, objective, states)


@contextmanager
def replaced(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """A context in which a module is in evaluation mode and some of its tensors have other values.

    It yields the replaced values by name. At its end everything is restored, including the mode of every submodule.
    """
    state = own_tensors(module)
    # What may need memory comes before the first change.
    new = {name: weight.to(device=state[name].device, dtype=state[name].dtype) for name, weight in weights.items()}
    old = {name: state[name].data for name in new}
    with evaluating(module):
        written = _Written(module)
        try:
            for name, weight in new.items():
                state[name].data = weight
            yield old
        finally:
            for name, before in old.items():
                state[name].data = before
            written.restore()
