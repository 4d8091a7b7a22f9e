"""How far a model drifts from itself when its blocks are stored in other forms."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from octavo.calibration.blocks import Blocks
from octavo.calibration.evidence import Evidence
from octavo.calibration.objective import Objective
from octavo.errors import OctavoError
from octavo.forms import Form
from octavo.methods import Setting, get_method
from octavo.recipes.frame.judging import Gap, gap
from octavo.recipes.frame.stored import Stored
from octavo.sources.batches import Batch

if TYPE_CHECKING:
    from octavo.recipes.frame.lab import Lab


@dataclass(frozen=True)
class Drift:
    """A model of which the first blocks are stored in other forms; arms are named after it.

    Parameters
    ----------
    title
        Its name, in front of every arm.
    objective, held
        How outputs are compared, and on which batches.
    layers
        How many blocks are stored in other forms; all if None.
    lost
        Divergences from the source by arm: (draws, examples).
    bytes
        Bytes of the files by arm, which hold the blocks alone.
    """

    lab: Lab
    title: str
    module: nn.Module
    objective: Objective
    held: Sequence[Batch]
    layers: int | None = None
    lost: dict[str, list[list[float]]] = field(default_factory=lambda: defaultdict(list))
    bytes: dict[str, int] = field(default_factory=dict)

    def part(self, module: nn.Module) -> nn.ModuleList:
        """The blocks that are stored in other forms, of the model or a copy of it."""
        found = Blocks.find(module)
        if found is None:
            raise OctavoError(f"{self.title}: {type(module).__name__} has no chain of blocks")
        return nn.ModuleList(found.list[: self.layers])

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The matrices of these blocks."""
        named = self.part(self.module).named_modules()
        return {f"{name}.weight": layer.weight.detach() for name, layer in named if isinstance(layer, nn.Linear)}

    @cached_property
    def reference(self) -> list[Tensor]:
        """Outputs of the source."""
        return self.objective.reference(self.module, self.held)

    def encoded(self, method: str, setting: Setting) -> dict[str, Form]:
        """All matrices by one setting, without data."""
        found = get_method(method)
        return {n: found.encode(w, setting, Evidence(torch.ones(len(w)), None)) for n, w in self.weights.items()}

    def stored(self, forms: Mapping[str, Form]) -> Stored:
        """The blocks in these forms, written to a file and read back."""
        return self.lab.stored(self.part(self.module), forms)

    def add(self, arm: str, blocks: Mapping[str, Form] | Stored) -> None:
        """Record the divergence of the model with these blocks; once for every draw of an arm."""
        self.lab.step(f"{self.title}, {arm}")
        stored = blocks if isinstance(blocks, Stored) else self.stored(blocks)
        model = copy.deepcopy(self.module).eval()
        stored.load(self.part(model))
        self.lost[arm].append(self.objective.measure(model, self.held, self.reference).tolist())
        self.lab.add(f"{self.title}, {arm}", fmean(self.lost[arm][-1]), stored)
        self.bytes[arm] = stored.bytes

    def gap(self, ours: str, theirs: str) -> Gap:
        """How much less an arm loses than another, example by example; of each the mean over its draws."""
        other, own = (list(map(fmean, zip(*self.lost[arm], strict=True))) for arm in (theirs, ours))
        return gap(f"{self.title}: {theirs} over {ours}", other, own)
