"""Codebooks of groups of rows, learned together with their codes."""

import pytest
import torch

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import Codebook, RowBlocks
from octavo.methods.quantize.jlcm import JointCodebooks
from octavo.methods.quantize.kmeans import KMeans


def matrix(columns=64):
    """Rows of three distributions: normal, flat and heavy-tailed."""
    drawn = torch.randn(96, columns, generator=torch.Generator().manual_seed(0))
    return torch.cat([drawn[:32], drawn[32:64].sign() * drawn[32:64].abs().sqrt(), drawn[64:] ** 3])


def evidence(columns=64, rows=96):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(500, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    moment = inputs.t() @ inputs / 500
    moment.diagonal().add_(0.01 * moment.diagonal().mean())
    return Evidence(torch.rand(rows, generator=generator) + 0.5, moment, 500)


def loss(method, values=4):
    seen, weight = evidence(), matrix()
    return seen.loss(method.encode(weight, {"values": values}, seen).dense() - weight)


@pytest.mark.parametrize("values", [4, 8])
def test_each_step_of_the_ladder_loses_less(values):
    ladder = [
        KMeans(feedback=False),
        JointCodebooks(groups=4, rounds=0),
        JointCodebooks(groups=4, mapping="nearest"),
        JointCodebooks(groups=4, mapping="proximal"),
    ]
    found = [loss(method, values) for method in ladder]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.9 * found[-2]
    assert found[-1] < loss(JointCodebooks(groups=4, mapping="softmax"), values)


def test_rows_of_one_distribution_share_a_book():
    form = JointCodebooks(groups=3, rounds=0).encode(matrix(512), {"values": 8}, Evidence(torch.ones(96), None))
    assert isinstance(form, RowBlocks) and len(form.blocks) == 3
    for kind in form.member.split(32):
        assert kind.bincount().max() >= 28


def test_codes_move_to_neighbours_first():
    weight, seen = matrix(), evidence()
    before, after = (JointCodebooks(groups=1, rounds=rounds).encode(weight, {"values": 16}, seen) for rounds in (0, 1))
    assert isinstance(before, Codebook) and isinstance(after, Codebook)
    moved = (after.codes.int() - before.codes.int()).abs()
    assert 0.01 < (moved > 0).float().mean() < 0.9
    assert (moved[moved > 0] == 1).float().mean() > 0.8


def test_a_matrix_without_a_moment_or_with_one_value_is_encoded():
    weight = torch.full((40, 24), 0.5)
    form = JointCodebooks().encode(weight, {"values": 4}, Evidence(torch.ones(40), None))
    assert torch.allclose(form.dense(), weight, rtol=1e-3)
    assert bool((JointCodebooks().encode(0 * weight, {"values": 4}, Evidence(torch.ones(40), None)).dense() == 0).all())


@pytest.mark.parametrize(
    ("choices", "told"), [({"mapping": "hard"}, "proximal"), ({"groups": 0}, "1 to 64"), ({"steps": -1}, "at least 0")]
)
def test_bad_knobs_are_refused(choices, told):
    with pytest.raises(RequestError, match=told):
        JointCodebooks(**choices)
