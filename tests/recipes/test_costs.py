"""Costs of calls: processor time, memory that a backward pass holds, and where two curves cross."""

import pytest
import torch
from torch import nn

from octavo.recipes.testbeds.costs import crossing, held, milliseconds


def test_the_longer_call_takes_longer():
    x = torch.randn(600, 600)
    threads = torch.get_num_threads()
    found = milliseconds({"short": lambda: x[:20, :20] @ x[:20, :20], "long": lambda: x @ x})
    assert 0 <= found["short"] < found["long"]
    assert torch.get_num_threads() == threads


def test_what_a_backward_pass_holds_is_counted_without_parameters():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Sigmoid(), nn.Linear(64, 1)), torch.randn(100, 64)
    # The inputs of both layers; the output of the sigmoid is the second of them.
    assert held(model, lambda: model(x).sum().backward()) == 2 * 4 * 100 * 64
    with torch.inference_mode():
        assert held(model, lambda: model(x)) == 0


def test_the_crossing_lies_between_the_places_where_order_changes():
    assert crossing([64, 256, 1024], [1, 2, 8], [2, 2.5, 4]) == pytest.approx(256 * 4 ** (0.32193 / 1.32193), rel=1e-3)
    assert crossing([64, 256], [1, 2], [2, 3]) == 256 and crossing([64, 256], [3, 4], [2, 3]) == 64
