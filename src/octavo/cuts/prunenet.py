"""PruneNet as a cut: neurons of MLPs, chosen by a policy that is learned from the weights and needs no data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from octavo.cuts.base import Cut, Units, cut
from octavo.cuts.descriptions import DESCRIPTIONS
from octavo.cuts.row_policy import RowPolicy, concrete, described, drawn, perturbed
from octavo.cuts.surgery import without
from octavo.cuts.transformer_units import NEURON, anatomy, restate_config, transformer_units
from octavo.errors import RequestError
from octavo.methods.policies import Credit, Reinforce, Rollout
from octavo.sources.batches import Batch


@cut("prunenet", source="PruneNet (Sengupta et al., 2025, arXiv 2501.15296)")
@dataclass(frozen=True)
class PruneNet(Cut[RowPolicy]):
    """Neurons of transformers by a policy over the rows of each MLP's first matrix ``W``; no data is needed.

    The policy is one linear function of a row, ``(W P + p) v``, for all layers. It draws the rows that stay, and is
    rewarded for a spectrum like that of the whole: ``depth^l / KS(singular values of W, of the rows kept)`` in layer
    ``l``, learned by REINFORCE (:class:`octavo.methods.policies.Reinforce`). The policy of the best episode serves any
    ratio. A reward is at most the number of singular values, which is also that of equal spectra.

    As released it is ``PruneNet(baseline=False, exact=False)``.

    Parameters
    ----------
    policy
        A file that :meth:`octavo.cuts.row_policy.RowPolicy.save` wrote; without one a policy is trained.
    share
        Of the rows that an episode removes while the policy is trained.
    episodes
        Drawn from the policy, one for every update.
    rate
        The learning rate.
    depth
        The weight of a layer's reward over that of the layer before: below 1 first layers count most, above 1 last
        ones.
    baseline
        Whether rewards are compared with their running mean.
    exact
        Whether rows are drawn in proportion to ``exp(odds)`` and learned from by the probability of that draw.
        Otherwise they are drawn in proportion to keep scores with noise, and learned from by scores drawn afresh, which
        biases the gradient.
    norms
        Whether the policy also sees how long a row is. A linear function of a row alone cannot know it.
    seed
        Of the policy, and of the rows that are drawn whenever it is used.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from octavo.cuts import best
    >>> sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(intermediate_size=48, **sizes))
    >>> cut = PruneNet(episodes=3)
    >>> units, policy = cut.units(model), cut.observe(model)
    >>> thinner = cut.apply(model, best(cut.scores(model, units, policy), 0.25), policy)
    >>> thinner.config.intermediate_size
    36
    """

    needs_data: ClassVar[bool] = False

    policy: str = ""
    share: float = 0.3
    episodes: int = 20
    rate: float = 1e-3
    depth: float = 0.99
    baseline: bool = True
    exact: bool = True
    norms: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise RequestError(f"prunenet: share is {self.share!r}; it must be between 0 and 1")
        for name in ("episodes", "rate", "depth"):
            if not 0 < getattr(self, name) < math.inf:
                raise RequestError(f"prunenet: {name} is {getattr(self, name)!r}; it must be above 0")

    def units(self, model: nn.Module) -> list[Units]:
        """The neurons of every MLP of a described transformer (:mod:`octavo.cuts.descriptions`)."""
        found = anatomy(model)
        if found is None:
            raise RequestError(
                f"{type(model).__name__}: prunenet knows the neurons of transformers only, of the types "
                f"{', '.join(sorted(DESCRIPTIONS))}; choose another cut"
            )
        return transformer_units(found, (NEURON,))

    def observe(self, model: nn.Module, batches: Iterable[Batch] = ()) -> RowPolicy:
        """The policy: the one that was given, or one trained on the model's weights. Batches are not looked at."""
        if self.policy:
            return RowPolicy.load(self.policy)
        return self._trained([rows_of(model, part) for part in self.units(model)])

    def scores(self, model: nn.Module, units: Sequence[Units], evidence: RowPolicy) -> dict[str, Tensor]:
        """The odds to keep each neuron with the noise of a draw, so that the best of any number are drawn rows."""
        found, generator = {}, torch.Generator().manual_seed(self.seed)
        for part in units:
            odds = evidence.odds(rows_of(model, part))
            found[part.name] = perturbed(odds if self.exact else concrete(odds, generator).log(), generator)
        return found

    def apply(self, model: nn.Module, kept: Mapping[str, Tensor], evidence: RowPolicy) -> nn.Module:
        """The model without the neurons that are not kept; what is left stays as it is."""
        thinner = without(model, self.units(model), kept)
        if (found := anatomy(thinner)) is not None:
            restate_config(found)
        return thinner

    def _trained(self, matrices: Sequence[Tensor]) -> RowPolicy:
        widths = {matrix.shape[1] for matrix in matrices}
        if len(widths) > 1:
            raise RequestError(
                f"prunenet: rows of {len(widths)} lengths ({', '.join(map(str, sorted(widths)))}); one policy needs "
                "rows of one length"
            )
        generator = torch.Generator().manual_seed(self.seed)
        seen = [described(matrix, norms=self.norms) for matrix in matrices]
        spectra = [spectrum(matrix) for matrix in matrices]
        network = _Network(seen[0].shape[1], max(map(len, seen)), generator)
        learner = Reinforce(
            torch.optim.AdamW(network.parameters(), lr=self.rate), Credit.OWN, 0.9 if self.baseline else None
        )
        best = -math.inf
        for _ in range(self.episodes):
            episode = self._episode(network, seen, matrices, spectra, generator)
            if episode.total > best:
                best, found = episode.total, network.policy(*widths)
            learner.update([episode])
        return found

    def _episode(
        self,
        network: _Network,
        seen: Sequence[Tensor],
        matrices: Sequence[Tensor],
        spectra: Sequence[Tensor],
        generator: torch.Generator,
    ) -> Rollout[list[Tensor]]:
        """Rows drawn in every layer, and what each draw is worth."""
        chosen, logs, rewards = [], [], []
        for number, (features, matrix, whole) in enumerate(zip(seen, matrices, spectra, strict=True)):
            odds = network(features)
            count = max(1, math.floor((1 - self.share) * len(matrix)))
            if self.exact:
                rows, log = drawn(odds, count, generator)
            else:
                rows = concrete(odds.detach(), generator).multinomial(count, generator=generator)
                log = concrete(odds, generator)[rows].log().sum()
            chosen.append(rows)
            logs.append(log)
            distance = kolmogorov_smirnov(whole, spectrum(matrix[rows]))
            rewards.append(self.depth**number / max(distance, 1 / len(whole)))
        return Rollout(chosen, torch.stack(logs), torch.tensor(rewards))


class _Network(nn.Module):
    """``(x P + p) v`` of features ``x``, computed as ``x (P v) + p v``, which has the same gradients."""

    def __init__(self, width: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(width, hidden, generator=generator) / width**0.5)
        self.shift = nn.Parameter(torch.zeros(hidden))
        self.outer = nn.Parameter(torch.randn(hidden, generator=generator) / hidden**0.5)

    def forward(self, features: Tensor) -> Tensor:
        return features @ (self.inner @ self.outer) + self.shift @ self.outer

    @torch.no_grad()
    def policy(self, width: int) -> RowPolicy:
        """A function equal to this one, with as many numbers as a row has, and one."""
        return RowPolicy(self.inner @ self.outer, float(self.shift @ self.outer), width)


def rows_of(model: nn.Module, part: Units) -> Tensor:
    """What each unit reads in the first matrix of its MLP, (count, inputs), float32.

    Of several, such as those of a gated MLP, it is the last: that which is not put through the activation. GPT-2 holds
    its matrices the other way round, and its rows are columns.
    """
    own = model.state_dict()
    # The last slice is that of the matrix that reads the units.
    writing = [piece for piece in part.slices[:-1] if own[piece.tensor].ndim == 2]
    if not writing:
        raise RequestError(f"prunenet: {part.name!r} has no matrix that writes each {part.kind}")
    last = writing[-1]
    matrix = own[last.tensor].detach().float().cpu()
    if not bool(torch.isfinite(matrix).all()):
        raise RequestError(f"prunenet: {last.tensor!r} has values that are not finite; load or train the model again")
    return matrix.movedim(last.dim, 0)[last.places[:, 0].cpu()].contiguous()


def spectrum(matrix: Tensor) -> Tensor:
    """The singular values of a matrix, rising, float64: by the smaller Gram matrix, to half of the digits."""
    wide = matrix.double()
    gram = wide @ wide.t() if len(wide) < wide.shape[1] else wide.t() @ wide
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()


def kolmogorov_smirnov(one: Tensor, other: Tensor) -> float:
    """The largest difference between the empirical distributions of two samples, from 0 to 1.

    Examples
    --------
    >>> kolmogorov_smirnov(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.5, 3.5, 4.5]))
    0.75
    """
    one, other = one.sort().values, other.sort().values
    values = torch.cat([one, other])
    below = [torch.searchsorted(part, values, right=True).double() / len(part) for part in (one, other)]
    return float((below[0] - below[1]).abs().max())
