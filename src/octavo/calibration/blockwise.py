"""Evidence and measurements of a model that does not fit in memory, one block's weights at a time.

Both equal those of a model in memory (:mod:`octavo.calibration.calibrating`,
:class:`octavo.calibration.objective.Objective`), computed in another order: all batches go through a block before the
next block is loaded. Hidden states between blocks are stored on disk. For evidence they are kept at every boundary. In
the backward pass a block is loaded again, its outputs are recomputed from its inputs, and the gradient at its outputs
is propagated to its inputs.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from octavo.calibration.blocks import AROUND, Blocks, Call, Loader
from octavo.calibration.calibrating import Calibration, check_outputs, count_sequences, described, tokens_in, typical
from octavo.calibration.evidence import combined
from octavo.calibration.evidence_folder import EvidenceFolder
from octavo.calibration.objective import Objective
from octavo.calibration.runner import Runner
from octavo.calibration.watches import Watches
from octavo.calibration.work_folder import SCRATCH, WorkFolder
from octavo.errors import OctavoError, RequestError
from octavo.sources.batches import Batch
from octavo.sources.sites import Site
from octavo.sources.source import Source
from octavo.system.matmul import coarse_matmul, fast_matmul
from octavo.system.sealed import digest, place_in

_PROGRESS = "blocks.json"


class States:
    """Tensors of every batch at block boundaries, stored on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __setitem__(self, key: tuple[str, int], value: Tensor) -> None:
        boundary, batch = key
        folder = self.folder / boundary
        try:
            folder.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()
            np.save(content, value.detach().cpu().numpy(), allow_pickle=False)
            with open(folder / f"{batch}.npy", "wb") as file:
                file.write(digest(self._place(key), content.getbuffer()))
                file.write(content.getbuffer())
        except OSError as error:
            raise OctavoError(f"{folder}: hidden states cannot be written: {error.strerror or error}") from error

    def __getitem__(self, key: tuple[str, int]) -> Tensor:
        boundary, batch = key
        file = self.folder / boundary / f"{batch}.npy"
        try:
            content = memoryview(file.read_bytes())
            if content[:32] != digest(self._place(key), content[32:]):
                raise ValueError("checksum mismatch")
            return torch.from_numpy(np.load(io.BytesIO(content[32:]), allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise RequestError(f"{file}: damaged: {error}; remove {self.folder.parent} and start again") from error

    def _place(self, key: tuple[str, int]) -> str:
        return f"{place_in(self.folder.parent, self.folder.name)} {key[0]} {key[1]}"

    def drop(self, boundary: str) -> None:
        """Remove the tensors of a boundary that is no longer needed."""
        shutil.rmtree(self.folder / boundary, ignore_errors=True)


class Blockwise(Runner):
    """A transformers model run with one block's weights in memory.

    Parameters
    ----------
    source
        The source; its module is a skeleton with parameters on the ``meta`` device.
    scratch
        The folder for hidden states while plans are measured; the folder for temporary files by default.

    Raises
    ------
    RequestError
        If the model has no list of equal blocks, or is not a chain of them.
    """

    def __init__(self, source: Source, scratch: Path | None = None) -> None:
        assert source.module is not None
        found = Blocks.find(source.module)
        if found is None:
            raise RequestError(
                f"{source.title}: {type(source.module).__name__} has no list of equal blocks, so it cannot be run "
                "block by block; allow enough --memory to load it whole, or compress without data (--preset data-free)"
            )
        self.source, self.blocks, self.loader = source, found, Loader(source, found)
        self.scratch = scratch
        self._reference: States | None = None
        source.module.eval().requires_grad_(False)

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
        """Evidence of all sites, kept in a folder of work block by block; a killed run goes on where it was.

        Parameters and errors as in :func:`octavo.calibration.calibrating.calibrate`, except that ``curvature`` must be
        ``kfac``.
        """
        if curvature != "kfac":
            raise RequestError(
                f"{self.source.title}: the model does not fit in memory and is run block by block, but curvature "
                f"{curvature!r} needs two passes through the whole model; allow more --memory, or use curvature 'kfac'"
            )
        return _Evidence(self, sites, batches, objective, room, seed, text, coarse, progress).gather()

    @fast_matmul()
    def measure(self, batches: Sequence[Batch], objective: Objective, weights: Mapping[str, Tensor]) -> Tensor:
        """Divergence of every example from the source, with some of its tensors replaced.

        Parameters
        ----------
        weights
            Replacements by name in the source. Each is read when its part of the model runs.
        """
        if self._reference is None:
            self._scratch = tempfile.TemporaryDirectory(prefix=SCRATCH, dir=self.scratch)
            reference = States(Path(self._scratch.name))
            self._final_states(batches, objective, {}, reference, "reference")
            self._reference = reference
        self._final_states(batches, objective, weights, self._reference, "measured")
        own, other = self.loader.read(AROUND, {}), self.loader.read(AROUND, weights)
        losses = []
        with torch.inference_mode():
            for number, batch in enumerate(batches):
                outputs = []
                for tensors, boundary in ((own, "reference"), (other, "measured")):
                    with self.loader.placed(AROUND, tensors):
                        outputs.append(self.blocks.postlude(objective, batch, self._reference[boundary, number]))
                losses.append(objective.divergence(*outputs))
        self._reference.drop("measured")
        return torch.cat(losses)

    @fast_matmul()
    def judge(
        self, batches: Sequence[Batch], objective: Objective, module: nn.Module, old: Mapping[str, Tensor]
    ) -> Tensor:
        """Divergence of every example from the source, for another module."""
        losses = []
        with torch.inference_mode():
            for batch, outputs in zip(batches, self.outputs(batches, objective), strict=True):
                losses.append(objective.divergence(outputs, objective.outputs(module, batch)))
        return torch.cat(losses)

    def outputs(self, batches: Sequence[Batch], objective: Objective) -> Iterator[Tensor]:
        """The outputs that the objective compares, batch by batch."""
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=self.scratch) as folder:
            states = States(Path(folder))
            self._final_states(batches, objective, {}, states, "final")
            around = self.loader.read(AROUND, {})
            for number, batch in enumerate(batches):
                with torch.inference_mode(), self.loader.placed(AROUND, around):
                    outputs = self.blocks.postlude(objective, batch, states["final", number])
                yield outputs

    def _final_states(
        self, batches: Sequence[Batch], objective: Objective, weights: Mapping[str, Tensor], states: States, name: str
    ) -> None:
        """Hidden states after the last block, stored under ``name``."""
        with torch.inference_mode():
            calls = self.prelude(batches, objective, states, name, weights)
            for block in range(len(self.blocks.list)):
                with self.part(block, weights):
                    for number, call in enumerate(calls):
                        states[name, number] = self.blocks.run(block, states[name, number], call[block])

    def prelude(
        self,
        batches: Sequence[Batch],
        objective: Objective,
        states: States,
        name: str,
        weights: Mapping[str, Tensor] | None = None,
    ) -> list[list[Call]]:
        """Store the states before the first block; returns the other arguments of blocks, by batch and block."""
        self._check(batches[0], objective)
        calls = []
        with torch.no_grad(), self.part(AROUND, weights):
            for number, batch in enumerate(batches):
                states[name, number], call = self.blocks.prelude(objective, batch)
                calls.append(call)
        return calls

    def _check(self, batch: Batch, objective: Objective) -> None:
        if not self.blocks.checked:
            with torch.inference_mode(False), self.part(AROUND), self.part(0):
                self.blocks.check(objective, batch)

    @contextmanager
    def part(self, number: int, weights: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """A context in which the weights of one part are in memory."""
        with self.loader.placed(number, self.loader.read(number, weights or {})):
            yield


class _Evidence:
    """One forward and one backward pass; every step writes files from which the next step starts."""

    def __init__(
        self,
        model: Blockwise,
        sites: Sequence[Site],
        batches: Sequence[Batch],
        objective: Objective,
        room: WorkFolder,
        seed: int,
        text: str,
        coarse: bool,
        progress: Callable[[int, int], Any],
    ) -> None:
        self.model, self.blocks, self.batches, self.objective = model, model.blocks, batches, objective
        self.sites, self.room, self.seed, self.text, self.progress = sites, room, seed, text, progress
        self.coarse = coarse
        self.sequences = count_sequences(batches)
        self.states = States(room.path / "states")
        #: Evidence of one role of tensors around the blocks; they may have a second role.
        self.roles = EvidenceFolder(room.path / "roles")
        self.evidence = room.evidence
        self.depth, self.steps = len(self.blocks.list), 0
        self.parts = {module: self.blocks.part_of(name) for name, module in self._module.named_modules()}
        self.site_parts = self._parts_of_sites()
        #: Modules outside of the blocks that are called before them.
        self.early: set[nn.Module] = set()

    @property
    def _module(self) -> nn.Module:
        assert self.model.source.module is not None
        return self.model.source.module

    def _parts_of_sites(self) -> dict[str, set[int]]:
        """The parts of the model that use each site."""
        source = self.model.source
        found: dict[str, set[int]] = {
            name: {self.parts[module] for module in modules} for name, modules in source.holders().items()
        }
        for conversion in source.conversions:
            parts = {self.blocks.part_of(target) for target in conversion.targets}
            for name in conversion.names:
                found.setdefault(source.aliases.get(name, name), set()).update(parts)
        return found

    def gather(self) -> Calibration:
        """Run the remaining steps."""
        done = self.room.read_json(_PROGRESS) or {"forward": 0, "backward": self.depth + 1}
        calls = self._start()
        self._count()
        for block in range(self.depth):
            if block >= done["forward"]:
                self._forward(block, calls)
                self._finished(done, forward=block + 1)
            self._count()
        if done["backward"] > self.depth:
            self._postlude()
            self._finished(done, backward=self.depth)
        self._count()
        for block in reversed(range(self.depth)):
            if block < done["backward"]:
                self._backward(block, calls)
                self._finished(done, backward=block)
            self.states.drop(str(block + 1))
            self.states.drop(f"gradient {block + 1}")
            self._count()
        self._prelude()
        result = self._combine()
        self._count()
        shutil.rmtree(self.states.folder, ignore_errors=True)
        return result

    def _finished(self, done: dict[str, int], **step: int) -> None:
        done.update(step)
        self.room.write_json(_PROGRESS, done)

    def _count(self) -> None:
        self.steps += 1
        self.progress(self.steps, 2 * self.depth + 3)

    def _start(self) -> list[list[Call]]:
        """Hidden states before the first block, the other arguments of blocks, and the modules called before them."""
        around = [module for module, part in self.parts.items() if part == AROUND]
        handles = [module.register_forward_pre_hook(lambda m, _: self.early.add(m)) for module in around]
        try:
            return self.model.prelude(self.batches, self.objective, self.states, "0")
        finally:
            for handle in handles:
                handle.remove()

    def _forward(self, block: int, calls: list[list[Call]]) -> None:
        with torch.inference_mode(), self.model.part(block):
            for number, call in enumerate(calls):
                states = self.states[str(block), number]
                with coarse_matmul(wanted=self.coarse):
                    self.states[str(block + 1), number] = self.blocks.run(block, states, call[block])

    def _postlude(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        with self._watched("postlude", AROUND, lambda module: module not in self.early) as begin:
            for number, batch in enumerate(self.batches):
                begin(batch)
                states = self.states[str(self.depth), number].requires_grad_(True)
                with coarse_matmul(wanted=self.coarse):
                    outputs = self.blocks.postlude(self.objective, batch, states)
                check_outputs(outputs, number)
                self.objective.probe(outputs, generator).backward()
                self._keep_gradient(self.depth, number, states)

    def _backward(self, block: int, calls: list[list[Call]]) -> None:
        with self._watched(f"{block:05d}", block) as begin:
            for number, batch in enumerate(self.batches):
                begin(batch)
                states = self.states[str(block), number].requires_grad_(True)
                with coarse_matmul(wanted=self.coarse):
                    outputs = self.blocks.run(block, states, calls[number][block])
                outputs.backward(self.states[f"gradient {block + 1}", number])
                self._keep_gradient(block, number, states)

    def _prelude(self) -> None:
        with self._watched("prelude", AROUND, lambda module: module in self.early) as begin:
            for number, batch in enumerate(self.batches):
                begin(batch)
                states, _ = self.blocks.prelude(self.objective, batch)
                if states.requires_grad:
                    states.backward(self.states["gradient 0", number])

    def _keep_gradient(self, boundary: int, number: int, states: Tensor) -> None:
        assert states.grad is not None
        self.states[f"gradient {boundary}", number] = states.grad

    @contextmanager
    def _watched(
        self, stage: str, part: int, wanted: Callable[[nn.Module], bool] = lambda module: True
    ) -> Iterator[Callable[[Batch], None]]:
        """A context in which a part is loaded and its sites are watched; their evidence is written at the end."""
        sites = [site for site in self.sites if part in self.site_parts.get(site.name, ())]
        with self.model.part(part):
            watches = Watches(
                sites,
                self.model.source,
                only=lambda module: self.parts[module] == part and wanted(module),
                uses=lambda module: self.parts[module] == part,
            )
            with watches.watching():
                yield watches.begin
        whole, roles = {}, {}
        for site, found in watches.evidence(self.sequences).items():
            # Parts around the blocks are used before them, after them, or both.
            if self.site_parts[site] == {part} and part != AROUND:
                whole[site] = combined(found)
            else:
                roles[f"{stage} {site}"] = combined(found)
        self.evidence.write(stage, whole)
        self.roles.write(stage, roles)

    def _combine(self) -> Calibration:
        """Evidence of tensors with several roles, in the order of use, and of tensors never seen."""
        stages = ("prelude", *(f"{block:05d}" for block in range(self.depth)), "postlude")
        several = {}
        for site in self.sites:
            roles = [self.roles[key] for key in (f"{stage} {site.name}" for stage in stages) if key in self.roles]
            if roles:
                several[site.name] = combined(roles)
        self.evidence.write("roles", several)
        self.evidence.without("typical")
        result = described(self.sites, self.evidence.samples, self.sequences, self.text, self.model.source)
        result.tokens = sum(tokens_in(batch) for batch in self.batches)
        self.evidence.write("typical", typical(self.model.source, self.sites, self.evidence))
        return result
