"""Modules that are built from a stranger's configuration are stopped while they are built."""

import pytest
import torch
from torch import nn

from octavo.errors import ArtifactError
from octavo.sources.bounded import bounded


def many(count, width=1):
    with torch.device("meta"):
        return nn.ModuleList(nn.Linear(width, width) for _ in range(count))


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (lambda: many(10_000), "parameters"),
        (lambda: nn.ModuleList(nn.Identity() for _ in range(10_000)), "modules"),
        (lambda: many(1, 10_000), "weights"),
    ],
    ids=["parameters", "modules", "weights"],
)
def test_far_more_than_the_tensors_fill_is_stopped(build, what):
    with pytest.raises(ArtifactError, match=f"far more {what}"), bounded(10, 100):
        build()


def test_what_the_tensors_justify_is_built_and_nothing_stays_counted():
    with bounded(2000, 2000):
        many(1000)
    many(10_000)
