"""The cut of any described transformer, and of any convolutional network: units by a score, and tensors that shrink."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibration.fitting import fitting
from octavo.calibration.objective import Objective
from octavo.calibration.objective import objective as objective_of
from octavo.cuts.base import Cut, Units, check_kept, cut
from octavo.cuts.channels import CHANNEL, channel_units
from octavo.cuts.choosing import rounded
from octavo.cuts.compensation import Moment, compensate, reader_moments
from octavo.cuts.layers import LAYER
from octavo.cuts.scores.base import SCORES, Score
from octavo.cuts.surgery import without
from octavo.cuts.transformer_units import COLUMN, HEAD, KINDS, NEURON, TOKEN, anatomy, restate_config, transformer_units
from octavo.cuts.vocabulary import check_special, free_padding, renumber_tokens
from octavo.errors import RequestError
from octavo.methods.spelling import made_of
from octavo.sources.batches import Batch, run
from octavo.system.modes import evaluating

#: Kinds whose numbers are widths of matrices.
_WIDTHS = (NEURON, COLUMN, CHANNEL)


@dataclass(frozen=True)
class Observed:
    """What was seen of a model's data.

    Parameters
    ----------
    seen
        The evidence of the score.
    moments
        What the matrices read whose inputs may go.
    """

    seen: Any
    moments: dict[str, Moment]


@cut("structured", source="Minitron (Muralidharan et al., 2024, arXiv 2407.14679), with other scores")
@dataclass(frozen=True)
class Structured(Cut[Observed]):
    """Heads, neurons, columns of the stream, layers, token rows or channels, by any of the scores.

    What goes is gone from the tensors. Where the config of a ``transformers`` model can say the new sizes, the result
    is an ordinary model. All places of a kind give up the same share, so that this is the usual case.

    Parameters
    ----------
    kinds
        Kinds of units that may go. Of transformers (:mod:`octavo.cuts.descriptions`): ``head``, ``neuron``, ``column``,
        ``layer`` and ``token``. Of other networks: ``channel``. Kinds that a model does not have are passed over.
    score
        What units are worth: a name of ``octavo methods --kind scores``, or a :class:`octavo.cuts.Score`.
    compensate
        Whether the matrix that read a unit is fitted again, so that what is left compensates
        (:mod:`octavo.cuts.compensation`).
    objective
        How outputs are compared, for scores by gradients; if not given, what fits the model's result.
    example
        A batch that channels are traced with; ``octavo compress`` gives one.
    """

    kinds: tuple[str, ...] = (HEAD, NEURON, CHANNEL)
    score: str | Score[Any] = "taylor"
    compensate: bool = True
    objective: str | Objective = field(default="", repr=False)
    example: Batch = field(default="", repr=False, compare=False)

    def __post_init__(self) -> None:
        known = (*KINDS, CHANNEL)
        odd = sorted(set(self.kinds) - {*known})
        if odd or not self.kinds:
            raise RequestError(
                f"structured: kinds has {repr(odd[0]) if odd else 'nothing'}; choose from {', '.join(known)}"
            )
        if isinstance(self.example, str) and self.example:
            raise RequestError(f"structured: example is {self.example!r}; give a batch, from Python")
        if isinstance(self.score, str):
            SCORES.get(self.score)
        if isinstance(self.objective, str) and self.objective:
            objective_of(self.objective)

    def prepared(self, objective: Objective, batches: Sequence[Batch]) -> Structured:
        """The cut with a request's objective and an example of its data, where it has none of its own."""
        return replace(
            self,
            objective=self.objective or objective,
            example=batches[0] if isinstance(self.example, str) and batches else self.example,
        )

    def units(self, model: nn.Module) -> list[Units]:
        """The units of these kinds.

        Raises
        ------
        RequestError
            If the model has none, or is not known.
        """
        found = anatomy(model)
        if found is not None:
            units = transformer_units(found, [kind for kind in self.kinds if kind in KINDS])
        elif CHANNEL in self.kinds:
            units = channel_units(model, self.example)
        else:
            units = []
        if not units:
            raise RequestError(
                f"{type(model).__name__}: structured finds no units of the kinds {', '.join(self.kinds)}; transformers "
                f"have {', '.join(KINDS)}, and convolutional networks have {CHANNEL}"
            )
        return units

    def observe(self, model: nn.Module, batches: Iterable[Batch]) -> Observed:
        """What the score needs, and the moments of what is fitted again; one pass over the batches for each."""
        given = list(batches)
        units, objective = self.units(model), self._objective(model, given)
        moments = reader_moments(model, units, given, objective) if self.compensate else {}
        return Observed(self._score().observe(model, units, given, objective), moments)

    def scores(self, model: nn.Module, units: Sequence[Units], evidence: Observed) -> dict[str, Tensor]:
        """The scores by which units go."""
        return self._score().scores(model, units, evidence.seen)

    def keeping(
        self, model: nn.Module, units: Sequence[Units], scores: Mapping[str, Tensor], shares: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Units with the highest scores, multiples of 32 of them in wide places.

        Columns are as many as the heads have in all, where a config must say so.
        """
        even = {
            part.name: rounded(shares[part.name], part.count) if part.kind in _WIDTHS else shares[part.name]
            for part in units
        }
        kept, found = super().keeping(model, units, scores, even), anatomy(model)
        if found is None or found.description.head_size is not None:
            return kept
        heads = {int(kept[part.name].sum()) for part in units if part.kind == HEAD}
        for part in units:
            if part.kind == COLUMN and len(heads) == 1:
                size = found.head_size(found.description.stacks[0])
                share = 1 - min(part.count, heads.pop() * size) / part.count
                kept |= super().keeping(model, [part], scores, {part.name: share})
        return kept

    @torch.no_grad()
    def apply(self, model: nn.Module, kept: Mapping[str, Tensor], evidence: Observed) -> nn.Module:
        """The model without the units that are not kept; its config follows as far as it can."""
        units = self.units(model)
        check_kept(units, kept)
        fitted = copy.deepcopy(model)
        if self.compensate:
            compensate(fitted, units, kept, evidence.moments)
        tokens = next((part for part in units if part.kind == TOKEN and part.name in kept), None)
        padding = {}
        if tokens is not None:
            check_special(model, anatomy(model).config, tokens, kept[tokens.name])  # type: ignore[union-attr]
            padding = free_padding(fitted, tokens, kept[tokens.name])
        thinner = without(fitted, units, kept)
        if (found := anatomy(thinner)) is not None:
            if tokens is not None:
                renumber_tokens(thinner, found.config, padding, kept[tokens.name])
            _restate_layers(found.config, units, kept)
            restate_config(found)
        return thinner

    def _score(self) -> Score[Any]:
        return made_of(self.score, SCORES.get(self.score)) if isinstance(self.score, str) else self.score

    def _objective(self, model: nn.Module, batches: Sequence[Batch]) -> Objective:
        if not isinstance(self.objective, str):
            return self.objective
        if self.objective or not batches:
            return objective_of(self.objective or "kl")
        with evaluating(model), torch.no_grad():
            result = run(model, batches[0])
        return fitting(result, model, batches[0])


def _restate_layers(config: Any, units: Sequence[Units], kept: Mapping[str, Tensor]) -> None:
    """A config that lists something of every layer lists it of those that stay."""
    for part in units:
        if part.kind != LAYER or part.name not in kept:
            continue
        stays = kept[part.name].tolist()
        types, stages = getattr(config, "layer_types", None), getattr(config, "stage_names", None)
        if isinstance(types, list) and len(types) == part.count:
            config.layer_types = [kind for kind, stay in zip(types, stays, strict=True) if stay]
        if isinstance(stages, list) and len(stages) == part.count + 1:
            # Stage 0 of a backbone is before all layers. One that goes gives what the stage before it does.
            numbers = [sum(stays[:number]) for number in range(len(stages))]
            outputs = sorted({numbers[index] for index in config.out_indices})
            config.stage_names = stages[: numbers[-1] + 1]
            config.out_indices = outputs
