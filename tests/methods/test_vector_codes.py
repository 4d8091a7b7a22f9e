"""Codes of short vectors with learned books."""

import pytest
import torch

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.methods import get_method
from octavo.methods.quantize.vector_codes import VectorCodes


def plain(weight):
    return Evidence(torch.ones(len(weight)), None)


@pytest.fixture(scope="module")
def large():
    return torch.randn(256, 256, generator=torch.Generator().manual_seed(0))


def test_settings_take_the_bits_that_they_say(large, size):
    for setting in get_method("vector-codes").settings(large, plain(large)):
        form = VectorCodes().encode(large, setting, plain(large))
        bits = setting["books"] * torch.tensor(float(setting["entries"])).log2() / setting["width"]
        books = 2 * form.values.numel() + 2 * len(large)
        assert size(form) - books == pytest.approx(large.numel() * float(bits) / 8, rel=0.05)


def test_vectors_beat_scalars_of_the_same_bits(large):
    found = VectorCodes().encode(large, {"width": 4, "entries": 256, "books": 1}, plain(large)).dense()
    scalars = get_method("kmeans").encode(large, {"values": 4}, plain(large)).dense()
    assert float((large - found).square().mean()) < 0.95 * float((large - scalars).square().mean())


def test_a_second_book_codes_what_the_first_misses(large):
    losses = []
    for books in (1, 2, 3):
        form = VectorCodes().encode(large, {"width": 4, "entries": 64, "books": books}, plain(large))
        losses.append(float((large - form.dense()).square().mean()))
    assert losses[1] < 0.4 * losses[0] and losses[2] < 0.4 * losses[1]


@pytest.mark.parametrize("columns", [96, 95])
def test_feedback_lowers_the_loss(columns, matrix, evidence):
    own = Evidence(evidence.rows, evidence.columns[:columns, :columns])
    weight, setting = matrix[:, :columns], {"width": 4, "entries": 32, "books": 1}
    losses = [
        own.loss(weight - VectorCodes(feedback).encode(weight, setting, own).dense()) for feedback in (False, True)
    ]
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(5, 12), torch.full((5, 12), -3.0), torch.tensor([[1e6, 1e-6, 0.0, 1.0]] * 6), torch.randn(2, 3)],
    ids=["zeros", "one value", "outliers", "fewer vectors than entries"],
)
def test_odd_matrices(weight):
    dense = VectorCodes().encode(weight, {"width": 4, "entries": 64, "books": 1}, plain(weight)).dense()
    assert torch.allclose(dense, weight, rtol=1e-2, atol=2e-3 * float(weight.abs().max()))


def test_wrong_settings_are_named():
    with pytest.raises(RequestError, match="vector-codes: width is 3"):
        VectorCodes().encode(torch.zeros(2, 2), {"width": 3, "entries": 4, "books": 1}, plain(torch.zeros(2, 2)))
    with pytest.raises(RequestError, match="vector-codes: entries is 99999"):
        VectorCodes().encode(torch.zeros(2, 2), {"width": 4, "entries": 99999, "books": 1}, plain(torch.zeros(2, 2)))
