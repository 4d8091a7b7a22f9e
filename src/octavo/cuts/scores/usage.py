"""A score for the rows of token tables: how often the data use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo.calibration.calibrating import differentiating
from octavo.calibration.objective import Objective
from octavo.cuts.base import Units
from octavo.cuts.readers import watched
from octavo.cuts.scores.base import Score, score
from octavo.cuts.vocabulary import special_tokens
from octavo.errors import RequestError
from octavo.sources.batches import Batch


@score("usage", source="counts on the data given")
@dataclass(frozen=True)
class Usage(Score[dict[str, Tensor]]):
    """How often a token is looked up; those that the config names come first."""

    @torch.no_grad()
    def observe(
        self, model: nn.Module, units: Sequence[Units], batches: Sequence[Batch], objective: Objective
    ) -> dict[str, Tensor]:
        """Counts by the units' name.

        Raises
        ------
        RequestError
            If some units are not rows of a table.
        """
        counts = {part.name: torch.zeros(part.count, dtype=torch.float64) for part in units}
        tables = {part.name: _table(model, part) for part in units}

        def seen(name: str, tokens: Tensor) -> None:
            counts[name] += torch.bincount(tokens.flatten().cpu(), minlength=len(counts[name])).double()

        with differentiating(model), watched(tables, seen):
            for batch in batches:
                objective.outputs(model, batch)
        configs = [getattr(part, name, None) for part in model.modules() for name in ("config", "generation_config")]
        named = {number for config in configs for numbers in special_tokens(config).values() for number in numbers}
        for count in counts.values():
            for number in named:
                if number < len(count):
                    count[number] = count.max() + 1
        return counts


def _table(model: nn.Module, part: Units) -> nn.Module:
    for piece in part.slices:
        table = model.get_submodule(piece.tensor.rpartition(".")[0])
        if isinstance(table, nn.Embedding) and piece.dim == 0:
            return table
    raise RequestError(f"usage: the units {part.name!r} are not rows of a token table; choose another score")
