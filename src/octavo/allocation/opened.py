"""A request with its opened source and data, and one run on it; all steps are functions of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from octavo.allocation.assembly import Assembly
from octavo.allocation.counting import Counting
from octavo.allocation.workspace import Workspace, hash_tensors
from octavo.calibration.calibrating import Calibration
from octavo.calibration.objective import Objective
from octavo.calibration.runner import Runner
from octavo.errors import RequestError
from octavo.methods import Method, Setting
from octavo.request import Request
from octavo.sources.batches import Batch, tokens_alone
from octavo.sources.sites import Site
from octavo.sources.source import Source
from octavo.sources.witness import Witness
from octavo.system.attention import attention_for
from octavo.system.clock import Clock
from octavo.system.executors import Executor
from octavo.system.progress import Progress


@dataclass(frozen=True)
class Opened:
    """A request with its source and data opened and checked.

    Parameters
    ----------
    left
        Tensors that are not sites, with the reason.
    calibration_data, held_data
        Batches for gathering evidence, and held-out batches for measuring plans.
    text
        Description of the data in the report.
    pinned
        Method and setting of the sites for which the user chose them.
    memory
        Limit on the run's memory in bytes; None for the machine's memory.
    witness
        The input files.
    notes
        Notes for the user; steps append to it.
    teaching
        Batches that the source teaches its compressed copy on, if that was asked for.
    """

    request: Request
    target: Counting
    source: Source
    sites: list[Site]
    left: dict[str, str]
    objective: Objective
    calibration_data: list[Batch]
    held_data: list[Batch]
    text: str
    methods: Sequence[Method]
    pinned: Mapping[str, tuple[str, Setting]]
    memory: int | None = None
    witness: Witness = field(default_factory=lambda: Witness(None))
    notes: list[str] = field(default_factory=list)
    teaching: list[Batch] = field(default_factory=list)

    @cached_property
    def _by_name(self) -> dict[str, Site]:
        return {site.name: site for site in self.sites}

    def site(self, name: str) -> Site:
        """The site with that name."""
        return self._by_name[name]

    def matrix(self, site: Site) -> Tensor:
        """A site's weight as a float32 matrix (rows, columns)."""
        return site.layout.to_matrix(self.source.read(site.name)).float()

    @cached_property
    def assembly(self) -> Assembly:
        """The assembler of this source's artifacts."""
        return Assembly(self.source, self._by_name, self.left)

    def attending(self, batches: Sequence[Batch]) -> AbstractContextManager[None]:
        """A context in which the model computes attention in the way that suits these batches on a CPU."""
        lengths = [tokens_alone(batch) for batch in batches]
        known = [length for length in lengths if length is not None]
        first = None if self.source.module is None else next(self.source.module.parameters(), None)
        elsewhere = first is not None and first.device.type not in ("cpu", "meta")
        return attention_for(None if elsewhere or len(known) < len(lengths) else max(known, default=None))

    @property
    def measurable(self) -> bool:
        """Whether plans can be measured: this needs a model to run, and data for it."""
        return self.source.module is not None and bool(self.held_data)

    def identity(self) -> dict[str, Any]:
        """The identity of this request's kept work; finished steps are never used for another request."""
        return {
            **self.request.identity(),
            "source": self.source.fingerprint(),
            "data": hash_tensors([self.calibration_data, self.held_data]),
            "objective": type(self.objective).__name__,
            "methods": [repr(method) for method in self.methods],
            "sites": [site.name for site in self.sites],
            "folded": sorted(self.source.folded),
            "pinned": {name: list(choice) for name, choice in self.pinned.items()},
            "files": self.witness.digests,
        }


@dataclass(frozen=True)
class Run:
    """One run: the opened request, the running model, its evidence, and the executor and folder of its work.

    Parameters
    ----------
    model
        The source's model, whole or block by block; None if no model is run.
    calibration
        The evidence of all sites.
    workspace
        The folder of finished steps.
    """

    opened: Opened
    model: Runner | None
    calibration: Calibration
    workspace: Workspace
    executor: Executor
    progress: Progress
    clock: Clock = field(default_factory=Clock)

    @cached_property
    def at_rest(self) -> float:
        """Mean divergence from the source before anything is encoded: what a cut costs, and zero without one."""
        return float(self.measure({}).mean()) if self.opened.source.uncut is not None else 0.0

    def measure(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Divergence of every held-out example with some tensors of the source replaced, (examples,)."""
        if self.model is None or not self.opened.held_data:
            raise RequestError("nothing can be measured without a model and data; give both")
        with self.opened.attending(self.opened.held_data):
            return self.model.measure(self.opened.held_data, self.opened.objective, weights)

    def judge(self, module: nn.Module, old: Mapping[str, torch.Tensor] | None = None) -> Tensor:
        """Divergence of every held-out example from the source for another module, (examples,).

        ``old`` holds the values of the source's module that were changed since it was measured.
        """
        assert self.model is not None
        with self.opened.attending(self.opened.held_data):
            return self.model.judge(self.opened.held_data, self.opened.objective, module, old or {})
