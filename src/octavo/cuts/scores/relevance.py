"""The score of what a network's decisions rest on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo.calibration.objective import Objective
from octavo.cuts.base import Units
from octavo.cuts.propagation import Propagated, propagated
from octavo.cuts.scores.base import Score, score
from octavo.errors import RequestError
from octavo.sources.batches import Batch


@score("relevance", source="Pruning by Explaining (Yeom et al., 2021, arXiv 1912.08881)")
@dataclass(frozen=True)
class Relevance(Score[Propagated]):
    """The relevance at a unit's outputs, by layer-wise propagation (:func:`octavo.cuts.propagation.propagated`).

    For networks of linear layers, convolutions, batch norms, pooling and sums. Ten examples of each class suffice.
    Units that several layers write, such as the channels of a residual sum, get the mean. The authors mark their
    method as patent pending.

    Parameters
    ----------
    normalize
        Whether every layer's relevance is divided by its sum. Without it a branch of a sum counts by its share.
    """

    normalize: bool = True

    def observe(
        self, model: nn.Module, units: Sequence[Units], batches: Sequence[Batch], objective: Objective
    ) -> Propagated:
        """Relevance of all outputs; labels decide whose, if batches have them."""
        return propagated(model, batches)

    def scores(self, model: nn.Module, units: Sequence[Units], seen: Propagated) -> dict[str, Tensor]:
        """What was observed.

        Raises
        ------
        RequestError
            If no linear layer or convolution writes the units.
        """
        found = {}
        for part in units:
            own = []
            for piece in part.slices:
                layer, _, leaf = piece.tensor.rpartition(".")
                if leaf == "weight" and piece.dim == 0 and layer in seen.outputs:
                    values = seen.outputs[layer].double().cpu()
                    own.append(values[piece.places].flatten(1).sum(1) / (values.sum() if self.normalize else 1.0))
            if not own:
                raise RequestError(f"relevance: no traced layer writes the units {part.name!r}; choose another score")
            found[part.name] = torch.stack(own).mean(0)
        return found
