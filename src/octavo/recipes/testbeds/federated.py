"""Federated averaging in one process: clients with examples of their own, and real payloads in both directions."""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from octavo.flows import FlowPlan, flow_of
from octavo.flows.schema import all_finite
from octavo.flows.updates import UpdateCodec, UpdateState
from octavo.recipes.frame.data import Split
from octavo.recipes.frame.nets import in_batches, shuffled
from octavo.training import accuracy, cross_entropy

Part = tuple[Tensor, Tensor]
Tensors = dict[str, Tensor]
#: Carries the update of one client to the server: what arrives, and the bytes of the payload.
Send = Callable[[Tensors], tuple[Tensors, int]]


@dataclass(frozen=True)
class Federation:
    """What a training has in common for all arms.

    Parameters
    ----------
    clients
        Examples of every client.
    make
        The net before the first round.
    rounds, lr, batch
        Rounds; a client's rate; its examples of a step.
    examples
        What a client sees in a round; None for all that it has.
    server
        What the mean update is multiplied by.
    clip
        The largest norm of a client's gradient; None for any.
    """

    clients: Sequence[Part]
    make: Callable[[], nn.Module]
    rounds: int
    lr: float
    seed: int
    batch: int = 32
    examples: int | None = None
    server: float = 1.0
    clip: float | None = None


@dataclass(frozen=True)
class FederatedNet:
    """A net after all rounds.

    Parameters
    ----------
    uplink
        Bytes of a client's payload, the mean.
    sent
        The share of entries that arrived as other than zero.
    """

    net: nn.Module
    uplink: float
    sent: float


def federate(federation: Federation, opened: Callable[[], Send]) -> FederatedNet:
    """Rounds of federated averaging (McMahan et al., 2017) in which all clients take part, until the net diverges.

    Parameters
    ----------
    opened
        Returns the carrier of one client, which may keep a state of its own.
    """
    net, sends = federation.make(), [opened() for _ in federation.clients]
    whole = sum(len(y) for _, y in federation.clients)
    sizes, shares = list[int](), list[float]()
    for number in range(federation.rounds):
        before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        mean = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
        for client, (send, part) in enumerate(zip(sends, federation.clients, strict=True)):
            tuned = locally(federation, copy.deepcopy(net), part, 1000 * client + number)
            update = {name: p.detach() - before[name] for name, p in tuned.named_parameters()}
            if not all(map(all_finite, update.values())):
                # A rate was too large. A net that diverged answers at random, and no rate is chosen for it.
                return FederatedNet(tuned.eval(), statistics.fmean(sizes or [0]), statistics.fmean(shares or [0.0]))
            arrived, size = send(update)
            sizes.append(size)
            shares.append(share_of(arrived))
            for name, tensor in arrived.items():
                mean[name] += tensor * (len(part[1]) / whole)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.add_(mean[name], alpha=federation.server)
    return FederatedNet(net.eval(), statistics.fmean(sizes), statistics.fmean(shares))


def locally(federation: Federation, net: nn.Module, part: Part, number: int) -> nn.Module:
    """What a client makes of the net in one round: plain stochastic gradient descent."""
    optimizer = torch.optim.SGD(net.train().parameters(), federation.lr)
    size = min(federation.batch, len(part[1]))
    most = len(part[1]) if federation.examples is None else min(federation.examples, len(part[1]))
    batches = shuffled(*part, size=size, seed=1_000 * federation.seed + number)(0)
    for batch in itertools.islice(batches, most // size):
        optimizer.zero_grad()
        cross_entropy(net, batch).backward()
        if federation.clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), federation.clip)
        optimizer.step()
    return net


def coded(codec: UpdateCodec, budget: int) -> Callable[[], Send]:
    """Carriers that fit a codec to the first update of each client, and keep both of its sides."""

    def opened() -> Send:
        states: list[UpdateState] = []

        def send(update: Tensors) -> tuple[Tensors, int]:
            if not states:
                plan = codec.fit([update], budget)
                # The server knows the plan as text.
                states.extend([codec.start(plan), codec.start(FlowPlan.from_json(plan.to_json()))])
            payload = codec.encode(update, states[0])
            return flow_of(states[1].plan).decode(payload, states[1]), len(payload)

        return send

    return opened


def plain() -> Send:
    """A carrier of float32."""
    return lambda update: (update, sum(tensor.nbytes for tensor in update.values()))


def share_of(update: Mapping[str, Tensor]) -> float:
    """The share of entries that are not zero."""
    found = sum(int(torch.count_nonzero(tensor)) for tensor in update.values())
    return found / sum(tensor.numel() for tensor in update.values())


def dealt(part: Part, clients: int, concentration: float | None, seed: int) -> list[Part]:
    """Examples dealt to clients: evenly at random, or every class by a Dirichlet draw of that concentration.

    Every client gets at least two examples.
    """
    draws, (x, y) = np.random.default_rng(seed), part
    if concentration is None:
        owners = torch.from_numpy(draws.permutation(len(y)) % clients)
    else:
        owners = torch.zeros_like(y)
        for label in y.unique().tolist():
            members = (y == label).nonzero()[:, 0][torch.from_numpy(draws.permutation(int((y == label).sum())))]
            cuts = (draws.dirichlet([concentration] * clients).cumsum() * len(members)).round().astype(int)
            for client, piece in enumerate(np.split(members.numpy(), cuts[:-1])):
                owners[piece] = client
    for client in range(clients):
        while int((owners == client).sum()) < 2:
            owners[int(draws.integers(len(y)))] = client
    return [(x[owners == client], y[owners == client]) for client in range(clients)]


def percent(net: nn.Module, part: Part) -> float:
    """Accuracy in percent."""
    return 100 * accuracy(net, in_batches(part))


def few(split: Split, count: int) -> Part:
    """The first training examples."""
    return split.train[0][:count], split.train[1][:count]
