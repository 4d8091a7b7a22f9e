"""Waves obey their equation, and simulators are measured on them."""

import math

import torch

from octavo.recipes.testbeds.waves import BETWEEN, GRID, SNAPSHOTS, error, error_of_last, pairs, snapshots, waves


def test_waves_obey_the_equation():
    """A standing wave keeps its shape, and swings at the frequency of the differences."""
    axis = torch.arange(1, GRID + 1, dtype=torch.float64) * torch.pi / (GRID + 1)
    shape = torch.outer(axis.sin(), (2 * axis).sin()).float()[None, None]
    found = snapshots(shape, torch.full((1, 1, GRID, GRID), 0.8))
    curvature = sum(4 * math.sin(mode * math.pi / (GRID + 1) / 2) ** 2 for mode in (1, 2))
    frequency = 2 * math.asin(0.4 * curvature**0.5 / 2)
    swing = torch.tensor([math.cos(frequency * BETWEEN * k) for k in range(SNAPSHOTS)])
    assert torch.allclose(found, swing[:, None, None] * shape, atol=1e-4)


def test_waves_are_drawn_from_the_seed():
    fields, velocity = waves(4, 0)
    assert torch.equal(fields, waves(4, 0)[0]) and not torch.equal(fields, waves(4, 1)[0])
    assert torch.allclose(fields.square().mean((1, 2, 3)), torch.ones(4), atol=1e-4)
    assert float(velocity.min()) >= 0.5 and float(velocity.max()) <= 1.0


def test_errors_compare_snapshots_in_order():
    runs = waves(2, 0)
    fields, _ = runs
    inputs, targets = pairs(runs)
    assert inputs.shape == (20, 3, GRID, GRID) and torch.equal(targets[3, 0], fields[0, 5])
    known = error(lambda x: x[:, 1:2], runs)
    assert abs(known - float((fields[:, 2:] - fields[:, 1:-1]).norm() / fields[:, 2:].norm())) < 1e-5
    # Without change, the second snapshot stands for the last one.
    expected = float((fields[:, 1] - fields[:, -1]).norm() / fields[:, -1].norm())
    assert abs(error_of_last(lambda x: x[:, 1:2], runs) - expected) < 1e-5
