"""Rounding to the lattice E8, and error feedback over vectors of columns."""

import itertools
from dataclasses import replace

import pytest
import torch

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.methods import get_method
from octavo.methods.feedback import factored, round_columns
from octavo.methods.quantize.e8 import LatticeE8, nearest_points
from octavo.methods.vector_feedback import round_vectors

PLAIN = Evidence(torch.ones(64), None)


def test_points_are_those_of_the_lattice_and_no_neighbour_is_nearer():
    vectors = 2 * torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    points = nearest_points(vectors)
    assert torch.equal((2 * points).remainder(2), (2 * points[:, :1]).remainder(2).expand(-1, 8))
    assert not points.sum(1).remainder(2).any()
    pairs = [torch.eye(8)[i] * a + torch.eye(8)[j] * b for i, j in itertools.combinations(range(8), 2) for a in (1, -1) for b in (1, -1)]  # fmt: skip
    halves = [torch.tensor(signs) / 2 for signs in itertools.product((1.0, -1.0), repeat=8) if not sum(signs) % 4]
    roots = torch.stack([*pairs, *halves])
    assert len(roots) == 240
    distance = (vectors - points).square().sum(1)
    assert bool((((vectors - points)[:, None] - roots).square().sum(2) >= distance[:, None] - 1e-5).all())


def test_the_mean_squared_error_is_that_of_the_lattice():
    vectors = 40 * torch.rand(40_000, 8, generator=torch.Generator().manual_seed(0))
    # Conway & Sloane: 929/12960 for each of eight coordinates, in cells of volume one.
    assert float((vectors - nearest_points(vectors)).square().mean()) == pytest.approx(929 / 12960, rel=0.01)


@pytest.mark.parametrize("columns", [8, 96, 20, 3])
def test_a_matrix_becomes_points_times_its_scales(columns, matrix):
    weight = matrix[:, :columns]
    for setting in get_method("e8").settings(weight, PLAIN):
        form = LatticeE8().encode(weight, setting, Evidence(torch.ones(len(weight)), None))
        points = form.base.dense()
        assert form.shape == points.shape == weight.shape
        assert float((2 * points).remainder(1).abs().max()) == 0
        scale = form.scales.dense()
        # The covering radius of E8 is one.
        assert float(((weight - form.dense()) / scale).square().view(len(weight), -1).max()) <= 1.001


def test_feedback_lowers_the_loss(matrix, evidence):
    setting = {"step": 0.4}
    plain = LatticeE8().encode(matrix, setting, Evidence(evidence.rows, None)).dense()
    assert evidence.loss(matrix - LatticeE8().encode(matrix, setting, evidence).dense()) < 0.8 * evidence.loss(matrix - plain)  # fmt: skip


def test_vectors_of_one_column_are_rounded_as_columns_are(matrix, evidence):
    _, _, feedback = factored(evidence, ordered=False)
    one = round_vectors(matrix, feedback, 1, lambda own, _: own.round())
    assert torch.equal(one, round_columns(matrix.t().contiguous(), feedback, lambda _, target: target.round()).t())


def test_a_step_that_is_too_fine_is_refused():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 1e3
    with pytest.raises(RequestError, match="too fine"):
        get_method("e8").encode(
            weight, {"step": 2e-6}, replace(PLAIN, rows=torch.ones(64).index_fill(0, torch.tensor([0]), 1e6))
        )
