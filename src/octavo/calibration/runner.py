"""The interface of a running model: its evidence, and measurements with other weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from octavo.calibration.calibrating import Calibration
from octavo.calibration.objective import Objective
from octavo.calibration.work_folder import WorkFolder
from octavo.sources.batches import Batch
from octavo.sources.sites import Site


class Runner(ABC):
    """The source's model, in memory as a whole or block by block."""

    @abstractmethod
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
        """Gather the evidence of all sites and write it to the workspace.

        Parameters and errors are those of :func:`octavo.calibration.calibrating.calibrate`.
        """

    @abstractmethod
    def measure(self, batches: Sequence[Batch], objective: Objective, weights: Mapping[str, Tensor]) -> Tensor:
        """Divergence of every example from the source with some tensors replaced, (examples,) on the CPU.

        Parameters
        ----------
        weights
            Tensors by name in the source; each is read on demand.
        """

    @abstractmethod
    def judge(
        self, batches: Sequence[Batch], objective: Objective, module: nn.Module, old: Mapping[str, Tensor]
    ) -> Tensor:
        """Divergence of every example from the source for another module, (examples,) on the CPU.

        Parameters
        ----------
        old
            Values of the source's module by name, if they were changed since it was measured.
        """

    @abstractmethod
    def outputs(self, batches: Sequence[Batch], objective: Objective) -> Iterator[Tensor]:
        """The outputs that the objective compares, batch by batch."""
