"""The training and evaluation modes of a module and all modules inside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A context in evaluation mode, after which every module inside has the mode that it had before.

    ``module.train(module.training)`` would give all of them the mode of the outermost one.

    Examples
    --------
    >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    >>> _ = net[0].eval()
    >>> with evaluating(net):
    ...     print(net[0].training, net[1].training)
    False False
    >>> net[0].training, net[1].training
    (False, True)
    """
    before = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in before.items():
            part.training = training
