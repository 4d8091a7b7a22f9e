"""SVD, its activation-aware kind, and EoRA."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

import octavo
from octavo.calibration.curvature import kronecker
from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import LowRank, Sum
from octavo.methods import get_method
from octavo.methods.factorize import factors
from octavo.methods.quantize.entropy import Entropy

NAMES = ("svd", "activation-svd", "eora")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(256, 384), (384, 256)])
def test_settings_fall_in_size(name, shape, evidence_of, size):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator) * 0.05
    evidence, method = evidence_of(*shape), get_method(name)
    sizes = [size(form) for form in method.encode_all(weight, method.settings(weight, evidence), evidence)]
    assert all(after < 1.03 * before for before, after in pairwise(sizes))
    assert sizes[-1] < sizes[0] / 2


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_factors_are_the_best_of_their_rank(shape, evidence_of):
    """The loss left is the energy of the singular values left out, and no other product of that rank has less."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    evidence = evidence_of(*shape)
    parts = factors.factors(weight, evidence)
    assert torch.allclose(parts.left @ parts.right, weight, atol=1e-4)
    some = parts.first(7)
    left_out = float(parts.values[7:].square().sum()) / 2
    loss = evidence.loss(weight - some.left @ some.right)
    assert loss == pytest.approx(left_out, rel=1e-3)
    for seed in range(5):
        noise = torch.randn(some.left.shape, generator=torch.Generator().manual_seed(seed)) * 0.01
        assert evidence.loss(weight - (some.left + noise) @ some.right) > loss


def test_exact_rank_is_found_exactly(evidence_of):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(60, 5, generator=generator) @ torch.randn(5, 48, generator=generator)
    for name in ("svd", "activation-svd"):
        form = get_method(name).encode(weight, {"rank": 20, "bits": 14}, evidence_of(60, 48))
        assert form.left.shape[1] == 5
        assert float((weight - form.dense()).norm() / weight.norm()) < 1e-3


@pytest.mark.parametrize("rank", [8, 24, 48])
def test_activations_lower_the_loss(rank, matrix, evidence):
    setting = {"rank": rank, "bits": 6}
    blind, seeing = (get_method(name).encode(matrix, setting, evidence).dense() for name in ("svd", "activation-svd"))
    assert evidence.loss(matrix - seeing) < 0.8 * evidence.loss(matrix - blind)
    # And the other way round for the weights themselves.
    assert float((matrix - blind).norm()) < float((matrix - seeing).norm())


def test_bits_are_bits(evidence_of, size):
    """A coefficient takes about the bits stated, and quantization adds little to what truncation lost."""
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)) * 0.05
    evidence = evidence_of(300, 200)
    for bits in (8, 6, 4):
        form = get_method("activation-svd").encode(weight, {"rank": 64, "bits": bits}, evidence)
        assert size(form) * 8 / (64 * 500) == pytest.approx(bits, abs=0.9)
    parts = factors.factors(weight, evidence).first(64)
    exact = evidence.loss(weight - parts.left @ parts.right)
    stored = get_method("activation-svd").encode(weight, {"rank": 64, "bits": 6}, evidence).dense()
    assert exact <= evidence.loss(weight - stored) < 1.05 * exact


def test_the_right_factor_makes_up_for_the_left(matrix, evidence):
    parts = factors.factors(matrix, evidence).first(32)
    form = factors.quantized(parts, 4, evidence)
    assert isinstance(form, LowRank)
    exact = parts.left @ parts.right
    alone = Entropy().encode(parts.right, {"step": float(form.right.scale)}, Evidence(parts.values, evidence.columns))
    assert evidence.loss(exact - form.dense()) < evidence.loss(exact - form.left.dense() @ alone.dense())


@pytest.mark.parametrize("rank", [4, 8, 16])
def test_eora_beats_the_svd_of_what_was_lost(rank, matrix, evidence):
    step = Entropy(levels=(1.5,)).settings(matrix, evidence)[0]["step"]
    form = get_method("eora").encode(matrix, {"step": step, "rank": rank, "bits": 6}, evidence)
    assert isinstance(form, Sum)
    base = form.base.dense()
    plain = Evidence(torch.ones(len(matrix)), None)
    blind = factors.quantized(factors.factors(matrix - base, plain).first(rank), 6, plain).dense()
    corrected, uncorrected = evidence.loss(matrix - form.dense()), evidence.loss(matrix - base)
    assert corrected < uncorrected
    assert corrected < evidence.loss(matrix - base - blind)


def test_eora_gains_with_rank(matrix, evidence):
    step = Entropy(levels=(1.5,)).settings(matrix, evidence)[0]["step"]
    settings = [{"step": step, "rank": rank, "bits": 6} for rank in (2, 8, 32)]
    forms = list(get_method("eora").encode_all(matrix, iter(settings), evidence))
    losses = [evidence.loss(matrix - form.dense()) for form in forms]
    assert losses == sorted(losses, reverse=True)
    alone = get_method("eora").encode(matrix, settings[1], evidence)
    assert torch.equal(alone.dense(), forms[1].dense())


@pytest.mark.parametrize(
    ("name", "setting", "word"),
    [
        ("svd", {"rank": 0, "bits": 6}, "rank"),
        ("svd", {"rank": 8}, "bits"),
        ("activation-svd", {"rank": 8.5, "bits": 6}, "rank"),
        ("activation-svd", {"rank": 8, "bits": 40}, "bits"),
        ("eora", {"step": 0, "rank": 8, "bits": 6}, "step"),
        ("eora", {"step": 0.1, "rank": -1, "bits": 6}, "rank"),
    ],
)
def test_unusable_settings_are_named(name, setting, word, matrix, evidence):
    with pytest.raises(RequestError, match=f"{name}.*{word}"):
        get_method(name).encode(matrix, setting, evidence)


def _moments(size, generator):
    """The identity, a diagonal, a full moment, and one without full rank."""
    full = torch.randn(size, size, generator=generator)
    thin = torch.randn(size, size // 3, generator=generator)
    return {
        "none": None,
        "diagonal": torch.rand(size, generator=generator),
        "some zero": (torch.arange(size) % 3 > 0).float(),
        "full": full @ full.t(),
        "deficient": thin @ thin.t(),
    }


def _as_matrix(moment, size):
    if moment is None:
        return torch.eye(size, dtype=torch.float64)
    return (torch.diag(moment) if moment.ndim == 1 else moment).double()


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (7, 1), (1, 7)])
@pytest.mark.parametrize("left", ["none", "diagonal", "some zero", "full", "deficient"])
@pytest.mark.parametrize("right", ["none", "diagonal", "some zero", "full", "deficient"])
def test_whitened_factors_are_the_best_of_every_rank(shape, left, right):
    """Eckart and Young between any two moments: the loss is what is left of the spectrum of A^T W B."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator)
    ours, theirs = _moments(shape[0], generator)[left], _moments(shape[1], generator)[right]
    a, b = _as_matrix(ours, shape[0]), _as_matrix(theirs, shape[1])

    def root(moment):
        values, vectors = torch.linalg.eigh(moment)
        return vectors * values.clamp_min(0).sqrt()

    spectrum = torch.linalg.svdvals(root(a).t() @ weight.double() @ root(b))
    parts = factors.whitened(weight, ours, theirs)
    for rank in {1, min(shape) // 2 or 1, len(parts.values)}:
        found = parts.first(rank)
        error = weight.double() - found.left.double() @ found.right.double()
        loss = float(torch.trace(error.t() @ a @ error @ b))
        least, total = float(spectrum[rank:].square().sum()), float(spectrum.square().sum())
        assert loss == pytest.approx(least, rel=1e-4, abs=1e-6 * total)
        assert float(parts.losses[rank]) == pytest.approx(least, rel=1e-4, abs=1e-6 * total)


def test_few_components_of_a_large_matrix_are_the_first_of_all():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1100, 60, generator=generator) @ torch.randn(60, 1300, generator=generator)
    few, every = factors.whitened(weight, most=20), factors.whitened(weight)
    assert len(few.values) == 20
    assert torch.allclose(few.values, every.values[:20], rtol=1e-5)
    assert torch.allclose(few.left @ few.right, every.first(20).left @ every.first(20).right, atol=1e-2)


@pytest.mark.parametrize("name", ["svd", "activation-svd", "afm", "alds", "eora", "trellis-svd", "fisher-svd"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_one_column_of_one_value(name, value):
    """Its left factor is rounded to zeros where there is nothing to store, or where steps are coarse."""
    weight, method = torch.full((600, 1), value), get_method(name)
    curvature = kronecker(torch.eye(600), torch.eye(1)) if method.by_curvature else None
    evidence = Evidence(torch.ones(600), torch.eye(1), curvature=curvature)
    settings = method.settings(weight, evidence)
    for form in method.encode_all(weight, settings, evidence):
        assert form.shape == (600, 1) and bool(torch.isfinite(form.dense()).all())
    finest = method.encode(weight, settings[0], evidence).dense()
    torch.testing.assert_close(finest, weight, rtol=0.05, atol=0.05)


def test_a_layer_of_one_column_is_compressed():
    net = nn.Sequential(nn.Linear(1, 600), nn.Tanh(), nn.Linear(600, 8))
    nn.init.zeros_(net[0].weight)
    done = octavo.compress(net, ratio=2.5, data=[torch.randn(16, 1)], methods=["activation-svd"])
    assert done.ratio >= 2.5


@pytest.mark.parametrize("shape", [(1200, 1100), (1100, 1200)])
def test_few_components_of_matrices_with_little_in_them(shape):
    zeros = torch.zeros(shape)
    assert len(factors.whitened(zeros, most=8).values) == 1
    # Orthogonal to a vector of ones, from which a search might begin.
    centred = zeros.clone()
    centred[:2, :2] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    parts = factors.whitened(centred, most=8)
    torch.testing.assert_close(parts.left @ parts.right, centred)
    evidence = Evidence(torch.ones(len(zeros)), None)
    form = get_method("eora").encode(zeros, {"step": 0.1, "rank": 8, "bits": 4}, evidence)
    assert not bool(form.dense().any())


@pytest.mark.parametrize("name", ["activation-svd", "trellis-svd", "fisher-svd"])
@pytest.mark.parametrize("octaves", [-math.inf, math.inf])
def test_however_far_bits_are_moved_they_can_be_encoded(name, octaves, matrix, evidence):
    method = get_method(name)
    seen = replace(evidence, curvature=kronecker(torch.diag(evidence.rows), evidence.columns))
    moved = method.at({"rank": 8, "bits": 4.0}, octaves)
    assert method.encode(matrix, moved, seen).shape == matrix.shape


@pytest.mark.parametrize("part", ["rows", "columns"])
@pytest.mark.parametrize(
    "name", ["activation-svd", "afm", "alds", "dense-sparse", "eora", "entropy", "groupreduce", "mpo"]
)
def test_evidence_that_is_not_finite_is_refused(name, part, matrix, evidence):
    method = get_method(name)
    setting = method.settings(matrix, evidence)[0]
    wrong = Evidence(evidence.rows.clone(), evidence.columns.clone())
    getattr(wrong, part).fill_(math.nan)
    with pytest.raises(RequestError, match=r"evidence of shape .* not finite; calibrate"):
        method.encode(matrix, setting, wrong)


def test_a_matrix_that_is_not_finite_is_refused():
    with pytest.raises(RequestError, match="a matrix of 2 x 3 has NaN or Inf"):
        factors.whitened(torch.full((2, 3), math.nan))


def test_damping_is_a_share_of_the_mean_diagonal():
    weight, moment = torch.randn(12, 8), torch.diag(torch.tensor([4.0] * 2 + [0.0] * 6))
    damped = factors.whitened(weight, None, moment, damping=0.1)
    assert torch.allclose(damped.values, factors.whitened(weight, None, moment + 0.1 * torch.eye(8)).values)
    with pytest.raises(RequestError, match=r"\(8, 8\) does not fit a side of 12"):
        factors.whitened(weight, moment)


def test_a_trellis_over_principal_components_is_better_than_either(size):
    """At equal bytes of a table with correlated columns, interpolated in logarithms."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(24, 24, generator=generator) @ torch.diag(torch.logspace(0, -1, 24))
    table = torch.randn(6000, 24, generator=generator) @ mixed
    evidence = Evidence(torch.rand(6000, generator=generator) + 0.1, torch.eye(24))

    def losses(name, settings):
        forms = list(get_method(name).encode_all(table, settings, evidence))
        return {size(form): evidence.loss(table - form.dense()) for form in forms}

    def at(points, length):
        (small, lost), (large, kept) = sorted(points.items())
        share = (math.log(length) - math.log(small)) / (math.log(large) - math.log(small))
        return lost ** (1 - share) * kept**share

    ((length, ours),) = losses("trellis-svd", [{"rank": 24, "bits": 3}]).items()
    rotated = losses("activation-svd", [{"rank": 24, "bits": bits} for bits in (3.3, 2.7)])
    steps = get_method("trellis").settings(table, evidence)
    plain = losses("trellis", [steps[6], steps[8]])
    assert ours < 0.9 * at(rotated, length) and ours < 0.9 * at(plain, length)
    assert not get_method("trellis-svd").settings(table[:100], evidence)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_few_components_of_a_large_matrix_are_those_of_all(decay):
    torch.manual_seed(0)
    weight = torch.randn(1200, 1100) * torch.arange(1, 1101) ** -decay
    few, whole = factors.whitened(weight, most=20), factors.whitened(weight).first(20)
    assert torch.allclose(few.values, whole.values, rtol=1e-4)
    product = lambda parts: parts.left @ parts.right  # noqa: E731
    assert float((product(few) - product(whole)).norm() / product(whole).norm()) < 1e-3
    assert torch.equal(factors.whitened(weight, most=20).left, few.left), "the same matrix gives the same bytes"


@pytest.mark.parametrize("rank", [100, 200])
def test_sweeps_over_the_curvature_lower_the_loss_at_every_rank(rank):
    """Also where the fit is too large to be solved exactly."""
    generator = torch.Generator().manual_seed(0)
    weight, left, right = (torch.randn(*s, generator=generator) for s in ((256, 256), (50, 256, 2), (50, 2, 256)))
    # Few positions in each example, and examples of different weight: no product of two moments.
    gradients = left @ right * torch.rand(50, 1, 1, generator=generator)
    outputs, inputs = (torch.einsum(sums, gradients, gradients) / 50 for sums in ("nij,nkj->ik", "nij,nik->jk"))
    damping = 0.1 * torch.eye(256)
    curvature = kronecker(outputs + damping, inputs + damping).corrected(gradients)
    curvature = replace(curvature, values=curvature.values + 0.1 * curvature.values.mean())
    rows, columns = curvature.nearest()
    evidence = Evidence(rows, columns, 50, curvature=curvature)
    begun, swept = (
        evidence.loss(weight - get_method(word).encode(weight, {"rank": rank, "bits": 8}, evidence).dense())
        for word in ("fisher-svd:sweeps=0", "fisher-svd")
    )
    assert swept < 0.9 * begun


def test_a_curvature_of_zeros_is_no_error():
    zero = kronecker(torch.zeros(12, 12), torch.zeros(16, 16))
    evidence = Evidence(*zero.nearest(), 4, curvature=zero)
    form = get_method("fisher-svd").encode(torch.randn(12, 16), {"rank": 4, "bits": 6}, evidence)
    assert torch.isfinite(form.dense()).all()
