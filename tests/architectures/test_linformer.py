"""Attention over mixtures of positions: its size, its limit, and what it costs in length."""

import pytest
import torch

from octavo.architectures import LinformerAttention, SequenceClassifier
from octavo.errors import RequestError
from octavo.training import accuracy, cross_entropy, fit


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_with_all_positions_kept_it_is_full_attention():
    torch.manual_seed(0)
    full, thin = SequenceClassifier(12, 16, 10, width=32), SequenceClassifier(12, 16, 10, width=32, projected=16)
    for layer in thin.layers:
        layer.attention.mix_keys.data = layer.attention.mix_values.data = torch.eye(16)
    thin.load_state_dict(full.state_dict(), strict=False)
    x = torch.randn(3, 16, 12)
    assert torch.allclose(full(x), thin(x), atol=1e-5)


def test_mixtures_add_weights_and_bind_the_length():
    full, thin = LinformerAttention(32, 64, None), LinformerAttention(32, 64, 16)
    assert size(thin) - size(full) == 2 * 16 * 64
    x = torch.randn(2, 64, 32)
    assert thin(x).shape == full(x).shape == x.shape and full(x[:, :32]).shape == (2, 32, 32)
    with pytest.raises(RuntimeError):
        thin(x[:, :32])


def test_it_learns():
    torch.manual_seed(0)
    x, y = torch.randn(256, 8, 6), torch.arange(256) % 4
    x[:, 0] += 3 * torch.nn.functional.one_hot(y, 6)
    model = SequenceClassifier(6, 8, 4, width=32, projected=4)
    fit(model, lambda epoch: list(zip(x.split(32), y.split(32), strict=True)), cross_entropy, epochs=8, lr=1e-2)
    assert accuracy(model, [(x, y)]) > 0.8


def test_bad_shapes_are_named():
    with pytest.raises(RequestError, match="a width of 30 has no 4 equal heads"):
        LinformerAttention(30, 8, 4)
    for mixtures in (0, 9):
        with pytest.raises(RequestError, match=f"{mixtures} mixtures of 8 positions; give a number from 1 to 8"):
            LinformerAttention(32, 8, mixtures)
