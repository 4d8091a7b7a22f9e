"""A linear map of known rank, learned with ordered dropout, and how near its columns come to those of an SVD."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from octavo.methods.factorize.factors import whitened
from octavo.training import fit
from octavo.training.regimens.maestro import OrderedDropout


def angles(seed: int, spread: float, epochs: int = 100) -> tuple[float, float]:
    """Largest principal angles of the leading columns with those of the SVD, plain and weighted by the data.

    A map of rank 5 from 16 inputs to 20 outputs is learned; deviations of the inputs go from ``10 ** spread`` to
    ``10 ** -spread``. The largest angle of all subspaces of the first 1 to 5 columns is given, in degrees.
    """
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = (torch.linalg.qr(torch.randn(n, 5, generator=generator))[0] for n in (20, 16))
    planted = outputs * torch.arange(5.0, 0.0, -1.0) @ inputs.t()
    x = torch.randn(4096, 16, generator=generator) * torch.logspace(spread, -spread, 16)
    pairs = list(zip(x.split(256), (x @ planted.t()).split(256), strict=True))
    torch.manual_seed(seed)
    model, regimen = nn.Sequential(nn.Linear(16, 20, bias=False)), OrderedDropout(pressure=0.0, threshold=0.0)

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (module(batch[0]) - batch[1]).square().sum(1).mean()

    def adam(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(module.parameters(), 0.02)

    fit(model, lambda epoch: pairs, loss, epochs=epochs, optimizer=adam, regimen=regimen)
    left = regimen.forms(model)["0.weight"].left.dense()
    exact = [whitened(planted).left, whitened(planted, right=x.t() @ x / len(x)).left]
    plain, weighted = (max(angle(left[:, :k], one[:, :k]) for k in range(1, 6)) for one in exact)
    return plain, weighted


def angle(a: Tensor, b: Tensor) -> float:
    """The largest principal angle of two spans, in degrees."""
    first, second = torch.linalg.qr(a)[0], torch.linalg.qr(b)[0]
    return float(torch.rad2deg(torch.linalg.svdvals(first.t() @ second).min().clamp(max=1).acos()))
