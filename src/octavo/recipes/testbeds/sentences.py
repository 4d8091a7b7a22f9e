"""The last layers of MiniLM as a base of studies: their matrices, sentences, and what humans say of them.

The layers below are never changed, so their outputs are computed once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.forms import Form
from octavo.recipes.frame.bases import minilm
from octavo.recipes.frame.data import likeness
from octavo.recipes.frame.stored import Stored
from octavo.sources.model_classes import require_transformers
from octavo.sources.sites import Layout
from octavo.sources.tokens import text_batches

if TYPE_CHECKING:
    from octavo.recipes.frame.lab import Lab

ERROR = "relative error of weights"
#: Pairs of sentences with their likeness, and what the layers below make of the sentences: states and masks.
Pairs = Sequence[tuple[str, str, float]]
#: Makes the form of a matrix at a value of a knob.
Make = Callable[[Tensor, float], Form]
States = list[tuple[Tensor, Tensor]]


class Upper(nn.Module):
    """Layers of the encoder and the mean over tokens: how this model is used."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Hidden states (N, tokens, width) and their mask (N, tokens) to embeddings (N, width) of length one."""
        added = (1.0 - mask[:, None, None, :]) * torch.finfo(states.dtype).min
        for layer in self.layers:
            states = layer(states, added)
        return functional.normalize((states * mask[..., None]).sum(1), dim=1)


@dataclass(frozen=True)
class Scored:
    """Prepared pairs: the states of all their sentences, the sentences' numbers, and human scores."""

    states: States
    left: Tensor
    right: Tensor
    scores: Tensor

    @torch.inference_mode()
    def correlation(self, upper: nn.Module) -> float:
        """Spearman correlation, in percent, of cosines and human scores."""
        vectors = torch.cat([upper.eval()(*batch) for batch in self.states])
        cosines = (vectors[self.left] * vectors[self.right]).sum(1)
        return 100 * float(torch.corrcoef(torch.stack([_ranks(cosines), _ranks(self.scores)]))[0, 1])


class FeedForward:
    """The feed-forward matrices of MiniLM's last layers, what is stored of them, and how good the model is then.

    Parameters
    ----------
    count
        How many of the last layers.
    """

    def __init__(self, lab: Lab, count: int) -> None:
        # Dropout would blur what is distilled.
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self._lower: Any = require_transformers().AutoModel.from_pretrained(minilm(), local_files_only=True, **quiet)
        layers = self._lower.eval().encoder.layer
        self.lab, self.upper = lab, Upper(layers[-count:])
        self._lower.encoder.layer = layers[:-count]
        self.weights = {
            name: weight.detach()
            for name, weight in self.upper.named_parameters()
            if name.endswith("output.dense.weight" if lab.quick else "dense.weight") and "attention" not in name
        }
        # Tall matrices, so that many rows share what is stored once for all rows.
        tall = {name: len(weight) >= weight.shape[1] for name, weight in self.weights.items()}
        self.layouts = {name: Layout("rows_first" if tall[name] else "columns_first") for name in tall}
        self.matrices = {name: self.layouts[name].to_matrix(weight) for name, weight in self.weights.items()}
        self.holder = nn.ParameterDict({_slashed(name): weight for name, weight in self.weights.items()})
        parts = likeness(lab)
        self._train = sorted({sentence for pair in parts.train for sentence in pair[:2]})
        self._drawn: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor]]] = {}
        self.development, self.test = self._scored(parts.development), self._scored(parts.test)

    def stored(self, forms: Mapping[str, Form]) -> Stored:
        """A file of only these matrices."""
        layouts = {_slashed(name): self.layouts[name] for name in forms}
        return self.lab.stored(self.holder, {_slashed(name): form for name, form in forms.items()}, layouts)

    def each(self, make: Make, knob: float) -> dict[str, Form]:
        """Forms of all matrices at one value of a knob."""
        return {name: make(matrix, knob) for name, matrix in self.matrices.items()}

    def fit(self, make: Make, size: int) -> dict[str, Form]:
        """Forms of all matrices at the knob from 0 to 1 whose file has that size."""
        return self.each(make, self.lab.fit(lambda knob: self.stored(self.each(make, knob)), size, 0.02, 1.0)[0])

    def scored(self, stored: Stored, test: bool = False) -> float:
        """Correlation on development or test pairs, with the matrices that were read back."""
        model = copy.deepcopy(self.upper)
        model.load_state_dict({name: stored.tensors[_slashed(name)] for name in self.weights}, strict=False)
        return (self.test if test else self.development).correlation(model)

    def add(self, arm: str, stored: Stored, **also: float) -> None:
        """Record an arm: the correlation on test pairs, and the error of the weights."""
        gaps = (self.weights[name] - stored.tensors[_slashed(name)] for name in self.weights)
        whole = sum(float(weight.square().sum()) for weight in self.weights.values())
        error = (sum(float(missed.square().sum()) for missed in gaps) / whole) ** 0.5
        self.lab.add(arm, self.scored(stored, test=True), stored, **{ERROR: error}, **also)

    def batches(self, count: int, seed: int, size: int = 8) -> Callable[[int], Iterator[tuple[Tensor, Tensor, Tensor]]]:
        """Batches (states, mask, embeddings of the dense model) of sentences that are drawn by the seed."""
        if (count, seed) not in self._drawn:
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randperm(len(self._train), generator=generator)[: count * size].tolist()
            states = self._states([self._train[k] for k in drawn], size)
            with torch.no_grad():
                found = [(*batch, self.upper(*batch)) for batch in states]
            # Sentences of similar length share a batch; batches come in any order.
            order = torch.randperm(len(found), generator=generator).tolist()
            self._drawn[count, seed] = [found[k] for k in order]
        return lambda epoch: iter(self._drawn[count, seed])

    def _scored(self, pairs: Pairs) -> Scored:
        # By length, as batches are.
        known = sorted({sentence for pair in pairs for sentence in pair[:2]}, key=lambda text: (len(text), text))
        place = {sentence: number for number, sentence in enumerate(known)}
        left, right = torch.tensor([(place[one], place[other]) for one, other, _ in pairs]).t()
        return Scored(self._states(known, 32), left, right, torch.tensor([score for *_, score in pairs]))

    @torch.no_grad()
    def _states(self, sentences: Sequence[str], size: int) -> States:
        found = text_batches(minilm(), sentences, size=size)
        return [(self._lower(**batch).last_hidden_state, batch["attention_mask"].float()) for batch in found]


def distilled(module: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """One minus the cosine with the dense model's embedding: the loss of :meth:`FeedForward.batches`."""
    states, mask, target = batch
    return 1 - (module(states, mask) * target).sum(1).mean()


def _slashed(name: str) -> str:
    """The name without dots, which names of parameters in a dictionary cannot have."""
    return name.replace(".", "/")


def _ranks(values: Tensor) -> Tensor:
    """Ranks; equal values get their mean."""
    _, member, count = values.double().unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[member]
