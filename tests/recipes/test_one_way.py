"""One-way filters: they are the stages they stand for, train as they are stored, and the waves obey their equation."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from octavo.forms import Dense, Separable
from octavo.recipes.one_way_filters import (
    BETWEEN,
    GRID,
    LAYOUTS,
    SNAPSHOTS,
    Simulator,
    one_way,
    pairs,
    snapshots,
    waves,
)
from octavo.recipes.stored import through_file
from octavo.training import fit, formed, settle


@pytest.mark.parametrize("terms", [1, 2])
def test_separable_filters_are_convolutions_one_after_another(terms):
    """1 x 1, then k x 1 and 1 x k of every channel, summed over the terms."""
    generator = torch.Generator().manual_seed(0)
    n, c, h, w = 6, 4, 5, 3
    a, b, d = (torch.randn(terms * n, size, generator=generator) for size in (c, h, w))
    form = Separable(Dense(a), Dense(b), Dense(d), terms)
    x = torch.randn(2, c, 10, 11, generator=generator)
    whole = functional.conv2d(x, form.dense().view(n, c, h, w), stride=2, padding=(2, 1))
    staged = torch.zeros_like(whole)
    for a_t, b_t, d_t in zip(a.split(n), b.split(n), d.split(n), strict=True):
        y = functional.conv2d(x, a_t[:, :, None, None])
        y = functional.conv2d(y, b_t[:, None, :, None], stride=(2, 1), padding=(2, 0), groups=n)
        staged += functional.conv2d(y, d_t[:, None, None, :], stride=(1, 2), padding=(0, 1), groups=n)
    assert torch.allclose(whole, staged, atol=1e-4)


def test_transposed_ones_too():
    """Through the layout of a transposed convolution; up-sampling is in the stages of one direction."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, bias=False).requires_grad_(False)
    a, b, d = torch.randn(6, 4), torch.randn(6, 4), torch.randn(6, 4)
    form = Separable(Dense(a), Dense(b), Dense(d), 1)
    layer.weight.copy_(LAYOUTS["up.weight"].from_matrix(form.dense(), tuple(layer.weight.shape)))
    x = torch.randn(2, 4, 5, 7)
    y = functional.conv2d(x, a[:, :, None, None])
    y = functional.conv_transpose2d(y, b[:, None, :, None], stride=(2, 1), padding=(1, 0), groups=6)
    y = functional.conv_transpose2d(y, d[:, None, None, :], stride=(1, 2), padding=(0, 1), groups=6)
    assert torch.allclose(layer(x), y, atol=1e-4)


@pytest.mark.parametrize("terms", [1, 2])
def test_a_simulator_trains_as_it_is_stored(terms):
    torch.manual_seed(0)
    fields, velocity = waves(2, 0)
    inputs, targets = pairs(fields, velocity)
    model = Simulator(4, 8)
    before = through_file(model).bytes
    formed(model, one_way(model, terms), LAYOUTS)
    # Of every filter c + 2 k weights a term, and a bias.
    filters = ((4, 3, 5), (8, 4, 5), (8, 8, 5), (4, 8, 4), (1, 4, 5))
    assert sum(p.numel() for p in model.parameters()) == sum(n * (terms * (c + 2 * k) + 1) for n, c, k in filters)

    def loss(module, batch):
        return (module(batch[0]) - batch[1]).square().mean()

    losses = fit(model, lambda epoch: [(inputs, targets)], loss, epochs=12, lr=1e-2)
    assert losses[-1] < losses[0]
    forms = settle(model)
    assert set(forms) == {name for name, weight in model.named_parameters() if weight.ndim == 4}
    stored = through_file(model, forms, dtype=torch.float32, layouts=LAYOUTS)
    assert stored.bytes < through_file(model, dtype=torch.float32).bytes
    with torch.inference_mode():
        expected = model(inputs)
        assert torch.allclose(stored.load(Simulator(4, 8))(inputs), expected, atol=1e-5)
    assert before > through_file(model, forms, layouts=LAYOUTS).bytes


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
