"""Kernels and tiles by their cosine coefficients: the transform, what moves into its domain, and what it gains."""

import math

import pytest
import scipy.fft
import torch
from torch import nn

import octavo
from octavo.artifact import pack
from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import Frequency, Grid, Sum
from octavo.forms.frequency import cosines, to_frequency, to_space
from octavo.methods.quantize.cnnpack import CNNpack
from octavo.methods.quantize.cosine import CosineSteps
from octavo.methods.quantize.entropy import Entropy


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def smooth(rows: int, channels: int, side: int) -> torch.Tensor:
    """Kernels whose coefficients fall with frequency."""
    falling = 4.0 ** -torch.arange(side).float()
    coefficients = noise(rows, channels, side, side) * falling[:, None] * falling
    return to_space(coefficients.reshape(rows, -1), (1, side, side))


def plain(rows: int) -> Evidence:
    return Evidence(torch.ones(rows), None)


def test_the_transform_is_the_orthonormal_cosine_transform():
    matrix = noise(12, 2 * 5 * 4)
    found = to_frequency(matrix, (3, 5, 4)).reshape(4, 3, 2, 5, 4)
    wanted = scipy.fft.dctn(matrix.reshape(4, 3, 2, 5, 4).double().numpy(), axes=(1, 3, 4), norm="ortho")
    assert torch.allclose(found.double(), torch.from_numpy(wanted), atol=1e-6)
    assert torch.allclose(to_space(to_frequency(matrix, (3, 5, 4)), (3, 5, 4)), matrix, atol=1e-6)
    assert torch.allclose(cosines(7) @ cosines(7).t(), torch.eye(7), atol=1e-6)


def test_an_error_costs_the_same_in_either_domain():
    weight, inputs = noise(6, 36), noise(200, 36, seed=1)
    evidence = Evidence(torch.rand(6) + 0.1, inputs.t() @ inputs / 200)
    method = CNNpack(block=(1, 3, 3))
    coefficients, moved, block = method.moved(weight, evidence)
    error = 0.1 * noise(6, 36, seed=2)
    assert math.isclose(moved.loss(error), evidence.loss(to_space(error, block)), rel_tol=1e-4)
    assert torch.allclose(to_space(coefficients, block), weight, atol=1e-6)


def test_smooth_kernels_take_fewer_bytes_than_their_weights_would():
    weight = smooth(64, 16, 5)
    spatial = min(
        (Entropy().encode(weight, setting, plain(64)) for setting in Entropy().settings(weight, plain(64))[::2]),
        key=lambda form: abs(float((form.dense() - weight).norm() / weight.norm()) - 0.05),
    )
    error = float((spatial.dense() - weight).norm())
    method = CosineSteps(block=(1, 5, 5))
    fitting = (method.encode(weight, s, plain(64)) for s in method.settings(weight, plain(64)))
    found = [form for form in fitting if float((form.dense() - weight).norm()) <= error]
    assert min(pack(form).bytes for form in found) < 0.8 * pack(spatial).bytes


def test_shrinking_solves_the_penalized_problem_before_it_rounds():
    weight = noise(8, 8)
    form = CNNpack(block=(1, 1, 1)).encode(weight, {"step": 1e-4, "threshold": 3000.0, "centres": 0}, plain(8))
    assert isinstance(form, Frequency) and isinstance(form.coefficients, Grid)
    wanted = torch.sign(weight) * (weight.abs() - 0.3).clamp_min(0)
    assert torch.allclose(form.coefficients.codes * 1e-4, wanted, atol=6e-5)
    # The scale is the one of least squared error.
    codes = form.coefficients.codes.float()
    assert torch.allclose((form.dense() - weight).mul(codes).sum(), torch.zeros(()), atol=1e-2 * codes.norm())


def test_centres_hold_what_kernels_share():
    few = smooth(4, 1, 3)
    weight = few[torch.arange(512) % 4].view(64, 72) + 1e-3 * noise(64, 72)
    method = CNNpack(block=(1, 3, 3))
    setting = {"step": 0.01, "threshold": 0.5}
    alone, with_centres = (method.encode(weight, {**setting, "centres": n}, plain(64)) for n in (0, 4))
    assert isinstance(with_centres.coefficients, Sum)
    assert float((with_centres.dense() - weight).norm()) < float((alone.dense() - weight).norm())
    assert pack(with_centres).bytes < 0.7 * pack(alone).bytes


def test_rows_that_the_loss_does_not_depend_on_have_centres():
    weight, method = noise(64, 72), CNNpack(block=(1, 3, 3))
    form = method.encode(weight, {"step": 0.1, "threshold": 0.0, "centres": 16}, Evidence(torch.zeros(64), None))
    assert float((form.dense() - weight).norm()) < 0.1 * float(weight.norm())


def test_a_network_is_compressed_with_it(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 16, 5), nn.ReLU(), nn.Conv2d(16, 32, 5), nn.Flatten(), nn.Linear(512, 10))
    octavo.compress(module, ratio=6, data=[noise(16, 3, 12, 12)], methods=["cnnpack"]).save(
        tmp_path / "out", report=False
    )
    artifact = octavo.Artifact(tmp_path / "out")
    assert artifact.bytes <= sum(p.nbytes for p in module.parameters()) / 6
    form = artifact.form("2.weight")
    assert isinstance(form, Frequency) and form.block == (1, 5, 5)


@pytest.mark.parametrize(
    ("method", "setting", "said"),
    [
        (CNNpack(block=(1, 3, 3)), {"step": 0.1, "threshold": 0.0, "centres": 99}, "99 centres for 32 vectors"),
        (CNNpack(block=(1, 5, 5)), {"step": 0.1, "threshold": 0.0, "centres": 0}, "do not divide a matrix of 8 x 36"),
        (CNNpack(block=(1, 0, 3)), {"step": 0.1, "threshold": 0.0, "centres": 0}, "from 1 to 64"),
        (CNNpack(block=(1, 3, 3)), {"step": 0.1, "threshold": -1.0, "centres": 0}, "threshold is -1.0"),
        (CNNpack(block=(1, 3, 3)), {"step": 1e-30, "threshold": 0.0, "centres": 0}, "too fine"),
        (CosineSteps(block=(5, 3, 3)), {"step": 0.1}, "do not divide"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(method, setting, said):
    with pytest.raises(RequestError, match=said):
        method.encode(noise(8, 36), setting, plain(8))
