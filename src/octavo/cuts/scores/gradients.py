"""Scores from gradients: how much the objective changes without a unit, to first and to second order.

At the source itself the divergence from the source has no gradient. So labels are drawn from the model's own outputs
(:meth:`octavo.calibration.objective.Objective.probe`): the mean square of gradients is then the curvature of the
divergence. With a loss of true labels (:class:`octavo.calibration.objective.Loss`) they are the gradients of that loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo.calibration.calibrating import differentiating
from octavo.calibration.example_gradients import ExampleGradients
from octavo.calibration.influences import layer_curvatures
from octavo.calibration.objective import Objective
from octavo.cuts.base import Units
from octavo.cuts.readers import gated, readers_of
from octavo.cuts.scores.base import Score, score, summed
from octavo.errors import RequestError
from octavo.sources.batches import Batch, sequences_in
from octavo.system.matmul import fast_matmul

#: Labels are drawn at least this often: the mean of a few squares would say little.
_DRAWS = 256


@score("taylor", source="Molchanov et al., 2019, arXiv 1906.10771")
@dataclass(frozen=True)
class Taylor(Score[dict[str, Tensor]]):
    """``E[(dL/dz)^2]`` of a gate ``z = 1`` on each unit, over examples: the first-order change of the loss, squared.

    The gradient of a gate is ``sum w * dL/dw`` over the weights that read the unit.

    Parameters
    ----------
    seed
        Of the labels that are drawn.
    """

    seed: int = 0

    @fast_matmul()
    def observe(
        self, model: nn.Module, units: Sequence[Units], batches: Sequence[Batch], objective: Objective
    ) -> dict[str, Tensor]:
        """Mean squares of the gradients of all gates.

        Raises
        ------
        RequestError
            If there are no batches, or nothing reads some of the units.
        """
        for part in units:
            if not part.wholes and not readers_of(model, part):
                raise RequestError(f"taylor: no layer reads the units {part.name!r}; choose another score, as fisher")
        device = next(model.parameters()).device
        sums = {part.name: torch.zeros(part.count, dtype=torch.float64, device=device) for part in units}
        count, generator = 0, torch.Generator().manual_seed(self.seed)
        with differentiating(model):
            for batch in _all(batches):
                size = sequences_in(batch)
                gates = {part.name: torch.ones(size, part.count, device=device, requires_grad=True) for part in units}
                with gated(model, units, gates):
                    value = objective.probe(objective.outputs(model, batch), generator)
                found = torch.autograd.grad(value, list(gates.values()), allow_unused=True)
                for name, gradient in zip(gates, found, strict=True):
                    if gradient is not None:
                        sums[name] += gradient.double().square().sum(0)
                count += size
        # Scores are compared on the CPU, as those from weights are.
        return {name: total.cpu() / count for name, total in sums.items()}


@score("fisher", source="Theis et al., 2018, arXiv 1801.05787")
@dataclass(frozen=True)
class Fisher(Score[dict[str, Tensor]]):
    """``1/2 sum w^2 E[(dL/dw)^2]`` over all weights of a unit: the diagonal of the Fisher matrix.

    Parameters
    ----------
    seed
        Of the labels that are drawn.
    """

    seed: int = 0

    @fast_matmul()
    def observe(
        self, model: nn.Module, units: Sequence[Units], batches: Sequence[Batch], objective: Objective
    ) -> dict[str, Tensor]:
        """Mean squared gradients of every weight that hangs on a unit, per example."""
        hanging = {piece.tensor for part in units for piece in part.slices}
        hanging |= {name for part in units for names in part.wholes for name in names}
        held = {name: parameter for name, parameter in model.named_parameters() if name in hanging}
        squares = {name: torch.zeros_like(parameter) for name, parameter in held.items()}
        count, generator = 0, torch.Generator().manual_seed(self.seed)
        with differentiating(model):
            for parameter in held.values():
                parameter.requires_grad_(True)
            for batch in _all(batches):
                value = objective.probe(objective.outputs(model, batch), generator)
                found = torch.autograd.grad(value, list(held.values()), allow_unused=True)
                for name, gradient in zip(held, found, strict=True):
                    if gradient is not None:
                        # Labels are drawn apart, so that the square of a sum over examples is a sum of squares.
                        squares[name] += gradient.square()
                count += sequences_in(batch)
        return {name: total / count for name, total in squares.items()}

    @torch.no_grad()
    def scores(self, model: nn.Module, units: Sequence[Units], seen: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the weights, and what was observed."""
        own = model.state_dict(keep_vars=True)
        costs = {name: own[name].detach().square() * square / 2 for name, square in seen.items()}
        return {part.name: summed(part, costs) for part in units}


@score("obs", source="Hassibi and Stork, 1992; EK-FAC: George et al., 2018, arXiv 1806.03884")
@dataclass(frozen=True)
class OptimalBrainSurgeon(Score[dict[str, Tensor]]):
    """``sum w^2 / (2 [F^-1]_ww)`` over the weights that read a unit, with the EK-FAC Fisher matrix ``F``.

    A weight costs what is left after all others of its matrix compensate for it. For a matrix of ``r`` rows and ``c``
    columns it takes ``8 (r^2 + c^2 + r c)`` bytes.

    Parameters
    ----------
    damping
        Added to the eigenvalues, as a share of their mean.
    seed
        Of the labels that are drawn.
    """

    damping: float = 0.1
    seed: int = 0

    @fast_matmul()
    def observe(
        self, model: nn.Module, units: Sequence[Units], batches: Sequence[Batch], objective: Objective
    ) -> dict[str, Tensor]:
        """The cost of every weight that reads a unit, by the name of its tensor."""
        gradients = ExampleGradients(model)
        read = {reader.name for part in units for reader in readers_of(model, part)}
        with gradients.watching():
            curvatures = layer_curvatures(gradients, list(_all(batches)), objective, seed=self.seed)
        costs = {}
        for layer in gradients.layers:
            curvature = curvatures.get(layer.name)
            if f"{layer.name}.weight" not in read or curvature is None or not bool(curvature.values.any()):
                continue
            inverse = curvature.inverse_diagonal(self.damping * float(curvature.values.mean()))
            weight, *_ = layer.split(inverse[None])
            own = layer.module.weight
            assert isinstance(own, Tensor)
            costs[f"{layer.name}.weight"] = own.detach().double().square() / (2 * weight[0].to(own.device))
        return costs

    def scores(self, model: nn.Module, units: Sequence[Units], seen: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the columns that read each unit.

        Raises
        ------
        RequestError
            If no curvature is known of what reads some of the units.
        """
        found = {}
        for part in units:
            names = {reader.name for reader in readers_of(model, part)} & {*seen}
            if not names:
                raise RequestError(f"obs: nothing that reads the units {part.name!r} has a curvature; choose fisher")
            found[part.name] = summed(part, {name: seen[name] for name in names})
        return found


def _all(batches: Sequence[Batch]) -> Iterator[Batch]:
    """The batches, again and again until labels were drawn often enough.

    Raises
    ------
    RequestError
        If there is no example among them.
    """
    examples = sum(map(sequences_in, batches))
    if not examples:
        raise RequestError("batches: there is nothing to observe; give at least one batch")
    for _ in range(math.ceil(_DRAWS / examples)):
        yield from batches
