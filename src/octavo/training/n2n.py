"""Smaller nets found by policies: layers go, then the rest becomes thinner, and each candidate is taught for a while.

Source: N2N learning (Ashok et al., 2018, arXiv 1709.06030). A policy reads the layers of a teacher and says which to
keep. A second one reads what is left and says how wide each layer is to be. Both learn from the rewards of candidates
(:class:`octavo.methods.policies.Reinforce`): ``C (2 - C) * accuracy / accuracy of the teacher``, where ``C`` is the
share of parameters that went.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.errors import RequestError
from octavo.methods.policies import Credit, Reinforce, Rollout
from octavo.sources.batches import Batch
from octavo.system.modes import evaluating
from octavo.training.chain_nets import ChainNet
from octavo.training.loop import fit
from octavo.training.losses import accuracy, divergence, outputs_of

#: Shares of a layer's channels that a policy may choose.
SHARES = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
#: Numbers that describe a layer to a policy.
FEATURES = 4
#: The reward of a net that cannot be built.
INVALID = -1.0
#: After so many updates a net above the limit is worth nothing but the lack of it.
PATIENCE = 15


def reward(gone: float, kept_accuracy: float) -> float:
    """``C (2 - C) * kept_accuracy``: the first parameters that go are worth most.

    Parameters
    ----------
    gone
        ``C``, the share of the teacher's parameters that went.
    kept_accuracy
        Accuracy over that of the teacher.
    """
    return gone * (2 - gone) * kept_accuracy


def above_limit(value: float, update: int) -> float:
    """The reward of a net above a limit, which was worth ``value``: it falls to -1 with the number of updates."""
    patience = max(0.0, 1 - update / PATIENCE) ** 4
    return patience - 1 + patience * value


@dataclass(frozen=True)
class Trial:
    """A candidate that was tried.

    Parameters
    ----------
    accuracy
        On the data for choices, after a short training.
    reward
        What the policies get.
    fits
        Whether it is within the limit, if there is one. A net above it teaches the policies, but is no result.
    """

    net: ChainNet
    accuracy: float
    reward: float
    fits: bool = True


@dataclass
class Trials:
    """Tries candidates: builds each, teaches it for a while, and measures it. No net is tried twice.

    Parameters
    ----------
    teacher
        A chain (:meth:`ChainNet.of`) that is trained.
    batches
        Inputs (N, channels, H, W), in as many batches as an epoch has; labels are not needed.
    score
        ``(inputs, labels)`` for choices.
    epochs, rate
        Of the training of a candidate, which learns the teacher's outputs (:func:`taught`).
    starts
        Random starts of a candidate, whose accuracies are averaged.
    limit
        Parameters that a net is to have at most.

    Raises
    ------
    RequestError
        If the teacher is no chain or is not trained, or there are no batches.
    """

    teacher: nn.Module
    batches: Sequence[Tensor]
    score: Sequence[tuple[Tensor, Tensor]]
    epochs: int = 1
    rate: float = 1e-2
    starts: int = 2
    limit: int | None = None
    seed: int = 0
    #: Its accuracy by every net that was tried, in that order.
    tried: dict[ChainNet, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not self.batches or not self.score:
            raise RequestError("trials: no batches to teach on, or none to score on; give at least one of each")
        self.whole = ChainNet.of(self.teacher)
        self._device = next(self.teacher.parameters()).device
        self._lessons = lessons(self.teacher, self.batches)
        self._best = accuracy(self.teacher, self.score)
        if not self._best:
            raise RequestError("trials: the teacher has nothing right on what candidates are scored on; train it first")

    def of(self, net: ChainNet, update: int = 0) -> Trial:
        """Try a candidate, or remember it; ``update`` says how much patience there is for one above the limit."""
        if net not in self.tried:
            starts = [self._started(net, self.seed + number) for number in range(self.starts)]
            self.tried[net] = sum(starts) / len(starts)
        value = reward(1 - net.parameters / self.whole.parameters, self.tried[net] / self._best)
        fits = self.limit is None or net.parameters <= self.limit
        return Trial(net, self.tried[net], value if fits else above_limit(value, update), fits)

    def _started(self, net: ChainNet, seed: int) -> float:
        torch.manual_seed(seed)
        child = net.module().to(self._device)
        fit(child, lambda epoch: self._lessons, taught, epochs=self.epochs, lr=self.rate, seed=seed)
        return accuracy(child, self.score)


@torch.no_grad()
def lessons(teacher: nn.Module, batches: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each batch with the teacher's logits, which are computed once for all students."""
    with evaluating(teacher):
        return [(batch, outputs_of(teacher, batch)) for batch in batches]


def taught(module: nn.Module, batch: Batch) -> Tensor:
    """How far a student is from its teacher, for a batch ``(inputs, logits of the teacher)``.

    It is ``T^2 KL(teacher || student)`` of distributions softened by ``T = 2``. The authors match logits by their
    squared error, which teaches less in the few steps of a search.
    """
    inputs, logits = batch
    return 4 * divergence(logits / 2, outputs_of(module, inputs) / 2)


class RemovalPolicy(nn.Module):
    """Which layers stay: a bidirectional LSTM over the layers, and one answer for each."""

    def __init__(self, hidden: int = 30) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.answer = nn.Linear(2 * hidden, 1)

    def draw(self, net: ChainNet, generator: torch.Generator) -> tuple[ChainNet | None, Tensor]:
        """A net without some layers, None if none is left, and the logarithm of each answer's probability."""
        odds = self.answer(self.lstm(described_layers(net)[None])[0])[0, :, 0]
        # Nothing is learned from answers that change nothing.
        needed = torch.tensor([layer.shrinks for layer in net.layers])
        keep = (torch.rand(len(odds), generator=generator) < odds.detach().sigmoid()) | needed
        logs = functional.logsigmoid(torch.where(keep, odds, -odds)).masked_fill(needed, 0)
        return net.kept(keep.tolist()) if bool(keep.any()) else None, logs


class ShrinkagePolicy(nn.Module):
    """How wide layers are: an LSTM from the first layer to the last that knows what it answered before."""

    def __init__(self, hidden: int = 30) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(FEATURES + len(SHARES), hidden)
        self.answer = nn.Linear(hidden, len(SHARES))

    def draw(self, net: ChainNet, generator: torch.Generator) -> tuple[ChainNet | None, Tensor]:
        """A net with some of the channels of each layer, and the logarithm of each answer's probability."""
        last, state, shares, logs = torch.zeros(len(SHARES)), None, [], []
        for features in described_layers(net):
            state = self.cell(torch.cat([features, last])[None], state)
            answers = self.answer(state[0])[0].log_softmax(0)
            which = int(answers.detach().exp().multinomial(1, generator=generator))
            last = functional.one_hot(torch.tensor(which), len(SHARES)).float()
            shares.append(SHARES[which])
            logs.append(answers[which])
        return net.shrunk(shares), torch.stack(logs)


def described_layers(net: ChainNet) -> Tensor:
    """(layers, 4): width, kernel, whether the layer shrinks the image, and how deep it lies, each about 0 to 1."""
    deep = max(1, len(net.layers) - 1)
    widest = max(layer.channels for layer in net.layers)
    rows = [
        [layer.channels / widest, layer.kernel / 7, float(layer.shrinks), number / deep]
        for number, layer in enumerate(net.layers)
    ]
    return torch.tensor(rows)


@dataclass(frozen=True)
class FoundNet:
    """What a search found.

    Parameters
    ----------
    drawn
        Everything that was drawn, in that order, repeated nets included; nets that cannot be built are left out.
    rewards
        The mean reward of every update.
    removal, shrinkage
        The policies, to search under another teacher from.
    """

    drawn: tuple[Trial, ...]
    rewards: tuple[float, ...]
    removal: RemovalPolicy
    shrinkage: ShrinkagePolicy

    @property
    def evaluations(self) -> int:
        """How many different nets were drawn; each was trained once."""
        return len({trial.net for trial in self.drawn})

    @property
    def best(self) -> Trial:
        """The net of highest reward within the limit.

        Raises
        ------
        RequestError
            If none that was drawn is within it.
        """
        found = _best(self.drawn)
        if not found.fits:
            raise RequestError(
                f"search: the smallest net that was drawn has {found.net.parameters} parameters, which is above the "
                "limit; draw more, or raise the limit"
            )
        return found


def searched(
    trials: Trials,
    *,
    removals: int = 100,
    shrinkages: int = 100,
    rollouts: int = 5,
    credit: Credit = Credit.TO_GO,
    rates: tuple[float, float] = (3e-3, 1e-1),
    start: FoundNet | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FoundNet:
    """Search smaller nets: layers go in the first stage, and the best of it becomes thinner in the second.

    Parameters
    ----------
    removals, shrinkages
        Updates of each policy.
    rollouts
        Nets drawn for an update.
    credit
        ``TO_GO`` gives every net its own advantage; ``SHARED`` is what the authors released.
    rates
        Learning rates of the two policies.
    start
        Another search, of another teacher perhaps, with whose policies this one begins.

    Raises
    ------
    RequestError
        If no net that was drawn can be built.

    Examples
    --------
    >>> from octavo.training.chain_nets import ConvLayer
    >>> torch.manual_seed(0)
    <torch._C.Generator object at ...>
    >>> teacher = ChainNet(1, (ConvLayer(8), ConvLayer(8), ConvLayer(16, pooled=True)), 2).module()
    >>> images, labels = torch.randn(64, 1, 8, 8), torch.arange(64) % 2
    >>> trials = Trials(teacher, images.split(32), [(images, labels)], starts=1)
    >>> found = searched(trials, removals=1, shrinkages=1, rollouts=2)
    >>> found.best.net.parameters < ChainNet.of(teacher).parameters
    True
    """
    torch.manual_seed(seed)
    removal = copy.deepcopy(start.removal) if start else RemovalPolicy()
    shrinkage = copy.deepcopy(start.shrinkage) if start else ShrinkagePolicy()
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Trial] = []
    means: list[float] = []
    base = trials.whole
    for policy, updates, rate in ((removal, removals, rates[0]), (shrinkage, shrinkages, rates[1])):
        learner = Reinforce(torch.optim.Adam(policy.parameters(), lr=rate), credit)
        for update in range(updates):
            episode = []
            for _ in range(rollouts):
                net, logs = policy.draw(base, generator)
                trial = None if net is None else trials.of(net, update)
                drawn += [trial] if trial else []
                value = trial.reward if trial else INVALID
                episode.append(Rollout(trial, logs, functional.one_hot(torch.tensor(len(logs) - 1)).float() * value))
            learner.update(episode)
            means.append(sum(rollout.total for rollout in episode) / rollouts)
            progress(len(means), removals + shrinkages)
        if drawn:
            base = _best(drawn).net
    if not drawn:
        raise RequestError("search: no net that was drawn can be built; draw more, or give a teacher of more layers")
    return FoundNet(tuple(drawn), tuple(means), removal, shrinkage)


def _best(drawn: Sequence[Trial]) -> Trial:
    """The net of highest reward within the limit; the smallest one where all are above it.

    Rewards of nets above the limit depend on when they were drawn, so they cannot be compared.
    """
    fitting = [trial for trial in drawn if trial.fits]
    if not fitting:
        return min(drawn, key=lambda trial: trial.net.parameters)
    return max(fitting, key=lambda trial: trial.reward)


def random_search(trials: Trials, count: int, seed: int = 0) -> tuple[Trial, ...]:
    """``count`` different nets: each layer stays or goes by a coin, and shares of channels are drawn evenly.

    Raises
    ------
    RequestError
        If the teacher is so small that there are not so many.
    """
    draws, found, whole = random.Random(seed), dict[ChainNet, Trial](), trials.whole
    for _ in range(100 * count):
        if len(found) == count:
            return tuple(found.values())
        mask = [layer.shrinks or draws.random() < 0.5 for layer in whole.layers]
        if any(mask):
            shorter = whole.kept(mask)
            net = shorter.shrunk([draws.choice(SHARES) for _ in shorter.layers])
            found[net] = trials.of(net)
    raise RequestError(f"random search: found {len(found)} different nets, not {count}; ask for fewer")
