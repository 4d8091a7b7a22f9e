"""Round to nearest, GPTQ and k-means."""

import time

import pytest
import torch

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.methods import get_method
from octavo.methods.quantize.gptq import GPTQ
from octavo.methods.quantize.grids import compact
from octavo.methods.quantize.kmeans import KMeans
from octavo.methods.quantize.rtn import RoundToNearest

NAMES = ("rtn", "gptq", "kmeans")


@pytest.mark.parametrize("name", NAMES)
def test_settings_fall_in_size_and_rise_in_loss(name, matrix, evidence, size):
    method = get_method(name)
    forms = list(method.encode_all(matrix, method.settings(matrix, evidence), evidence))
    sizes = [size(form) for form in forms]
    losses = [evidence.loss(matrix - form.dense()) for form in forms]
    assert sizes == sorted(sizes, reverse=True)
    assert losses == sorted(losses)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_feedback_lowers_the_loss(bits, matrix, evidence):
    setting = {"bits": bits, "group": 64}
    plain = evidence.loss(matrix - get_method("rtn").encode(matrix, setting, evidence).dense())
    unordered = evidence.loss(matrix - GPTQ(order=False).encode(matrix, setting, evidence).dense())
    ordered = evidence.loss(matrix - GPTQ().encode(matrix, setting, evidence).dense())
    assert ordered < 0.8 * plain and unordered < 0.8 * plain


def test_gptq_without_a_moment_is_rtn(matrix):
    nothing = Evidence(torch.ones(96), None)
    setting = {"bits": 3, "group": 64}
    expected = get_method("rtn").encode(matrix, setting, nothing)
    found = get_method("gptq").encode(matrix, setting, nothing)
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rtn_errs_by_half_a_step(symmetric, bits, matrix):
    form = RoundToNearest(symmetric).encode(matrix, {"bits": bits, "group": 64}, Evidence(torch.ones(96), None))
    step = form.scale.float().repeat_interleave(64, 1)
    # A rounded scale and zero point may clip the extremes by half a step more.
    assert bool(((matrix - form.dense()).abs() <= 1.02 * step).all())
    assert float(((matrix - form.dense()).abs() <= 0.502 * step).float().mean()) > 0.95
    assert int(form.codes.max()) - int(form.codes.min()) < 2**bits
    assert (form.zero is None) == symmetric


def test_the_last_group_may_be_shorter():
    weight = torch.randn(6, 100) * torch.linspace(0.01, 1, 100)
    form = get_method("rtn").encode(weight, {"bits": 8, "group": 30}, Evidence(torch.ones(6), None))
    assert form.scale.shape == (6, 4)
    assert float((weight - form.dense()).abs().max()) < 0.02


def test_constant_rows_are_kept():
    weight = torch.tensor([[5.0], [-3.0], [0.0], [1e-3]]).expand(4, 64)
    for name in ("rtn", "gptq", "kmeans"):
        dense = (
            get_method(name)
            .encode(
                weight,
                get_method(name).settings(weight, Evidence(torch.ones(4), None))[0],
                Evidence(torch.ones(4), None),
            )
            .dense()
        )
        assert torch.allclose(dense, weight, rtol=2e-3), name


def test_scales_leave_float16_only_if_they_must():
    assert compact(torch.tensor([1.0, 2.0, 3.0, 0.0, 1e-9])).dtype == torch.float16
    assert bool((compact(torch.tensor([1.0, 2.0, 3.0, 0.0, 1e-9])) > 0).all())
    assert compact(torch.tensor([1.0, 1e6])).dtype == torch.float32
    assert compact(torch.full((3,), 1e-9)).dtype == torch.float32


def test_kmeans_finds_the_values_there_are():
    values = torch.tensor([-1.5, 0.25, 2.0, 7.0])
    weight = values[torch.randint(4, (40, 50), generator=torch.Generator().manual_seed(0))]
    form = KMeans(row_scale=False).encode(weight, {"values": 4}, Evidence(torch.ones(40), None))
    assert torch.equal(form.dense(), weight)


def test_kmeans_is_near_the_best_uniform_quantizer(matrix):
    """Of equally many levels, fitted values are better than equally spaced ones, and Lloyd's conditions hold."""
    nothing = Evidence(torch.ones(96), None)
    form = KMeans(row_scale=False).encode(matrix, {"values": 16}, nothing)
    error = float((matrix - form.dense()).square().mean())
    best = min(
        float((matrix - (matrix / step).round().clamp(-8, 7) * step).square().mean())
        for step in torch.linspace(0.002, 0.1, 200)
    )
    assert error < 0.9 * best
    for index, value in enumerate(form.values.float()):
        assert abs(float(matrix[form.codes == index].mean() - value)) < 2e-3


def test_kmeans_heeds_the_evidence():
    """What matters is kept better."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    weight[:, :8] = weight[:, :8] * 0.1 + 3
    importance = torch.ones(64)
    importance[:8] = 1e4
    plain, fed = Evidence(torch.ones(64), None), Evidence(torch.ones(64), torch.diag(importance))
    method = KMeans(row_scale=False)
    blind, seeing = (method.encode(weight, {"values": 4}, evidence).dense() for evidence in (plain, fed))
    assert fed.loss(weight - seeing) < 0.3 * fed.loss(weight - blind)


def test_kmeans_feedback_and_row_scales_help(matrix, evidence):
    setting = {"values": 8}
    uneven = matrix * torch.logspace(0, 2, 96)[:, None]
    weights = Evidence(torch.logspace(0, -4, 96), evidence.columns)
    full, no_scale, no_feedback = (
        weights.loss(uneven - method.encode(uneven, setting, weights).dense())
        for method in (KMeans(), KMeans(row_scale=False), KMeans(feedback=False))
    )
    assert full < 0.5 * no_scale and full < 0.8 * no_feedback


@pytest.mark.parametrize(
    ("name", "setting", "word"),
    [
        ("rtn", {"bits": 9, "group": 64}, "bits"),
        ("rtn", {"bits": 4.5, "group": 64}, "bits"),
        ("gptq", {"bits": True, "group": 64}, "bits"),
        ("gptq", {"bits": 4, "group": 0}, "group"),
        ("gptq", {"bits": 4}, "group"),
        ("kmeans", {"values": 0}, "values"),
        ("kmeans", {"values": "many"}, "values"),
    ],
)
def test_unusable_settings_are_named(name, setting, word, matrix, evidence):
    with pytest.raises(RequestError, match=f"{name}.*{word}"):
        get_method(name).encode(matrix, setting, evidence)


@pytest.mark.parametrize("name", NAMES)
def test_fast_enough(name, evidence_of):
    weight, evidence = torch.randn(384, 1536) * 0.05, evidence_of(384, 1536)
    method = get_method(name)
    settings = method.settings(weight, evidence)
    method.encode(weight, settings[0], evidence)
    start = time.process_time()
    method.encode(weight, settings[-1], evidence)
    assert time.process_time() - start < 4


@pytest.mark.parametrize("edge", ["zero row", "constant row", "one column", "tiny", "huge"])
def test_int8_bears_odd_matrices(edge, matrix, evidence_of):
    weight = matrix[:24, :40].clone()
    if edge == "zero row":
        weight[3] = 0
    elif edge == "constant row":
        weight[3] = 0.5
    elif edge == "one column":
        weight = weight[:, :1]
    elif edge == "tiny":
        weight *= 1e-30
    elif edge == "huge":
        weight *= 1e30
    evidence = evidence_of(*weight.shape)
    for smoothing in (0.0, 0.5, 1.0):
        form = get_method("int8").encode(weight, {"smoothing": smoothing}, evidence)
        assert form.codes.dtype == torch.int8
        assert torch.allclose(form.dense(), weight, atol=0.1 * float(weight.abs().max()))


def test_int8_makes_inputs_alike(matrix, evidence):
    spread = []
    for smoothing in (0.0, 0.5, 1.0):
        form = get_method("int8").encode(matrix, {"smoothing": smoothing}, evidence)
        steps = torch.ones(128) if form.columns is None else 2.0 ** (form.columns.float() / 8)
        sizes = evidence.columns.diagonal().sqrt() * steps
        spread.append(float(sizes.max() / sizes.min()))
        assert evidence.loss(matrix - form.dense()) < 1e-4 * evidence.loss(matrix)
    assert spread[0] > 2 * spread[1] > 2 * spread[2]
    assert spread[2] == pytest.approx(1, abs=0.1)


def test_int8_feeds_errors_back(matrix, evidence):
    plain = get_method("int8").encode(matrix, {"smoothing": 0.0}, Evidence(evidence.rows, None))
    fed = get_method("int8").encode(matrix, {"smoothing": 0.0}, evidence)
    assert evidence.loss(matrix - fed.dense()) < 0.8 * evidence.loss(matrix - plain.dense())
