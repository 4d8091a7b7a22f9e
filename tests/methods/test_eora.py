"""EoRA: the best correction of any compressed base, however its inputs' moment is taken apart."""

import pytest
import torch

from octavo.artifact import pack
from octavo.calibration.evidence import Evidence
from octavo.calibration.watches import DAMPING
from octavo.errors import RequestError
from octavo.forms import LowRank, Sum
from octavo.methods import get_method
from octavo.methods.factorize import factors
from octavo.methods.factorize.corrections import compensated, lost

BASES = {
    "rtn": {"bits": 3, "group": 64},
    "gptq": {"bits": 2, "group": 32},
    "trellis": {"step": 0.05},
    "entropy": {"step": 0.1},
    "magnitude": {"sparsity": 0.7, "bits": 6},
    "wanda": {"sparsity": 0.5, "bits": 4},
    "sparsegpt": {"pattern": "2:4", "bits": 4},
}


def setting_of(base, rank=8, bits=6):
    return {"base": base, **{f"base.{key}": value for key, value in BASES[base].items()}, "rank": rank, "bits": bits}


@pytest.fixture(scope="module", params=BASES)
def base(request, matrix, evidence):
    return get_method(request.param).encode(matrix, BASES[request.param], evidence)


def test_no_correction_of_the_rank_is_better(base, matrix, evidence):
    """[V] What remains is the energy of the components left out, and to move either factor makes it worse."""
    error = matrix - base.dense()
    found = lost(matrix, base, evidence)
    best = found.first(6)
    loss = evidence.loss(error - best.left @ best.right)
    assert loss == pytest.approx(float(found.values[6:].square().sum()) / 2, rel=1e-3)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for side in ("left", "right"):
            moved = {"left": best.left, "right": best.right}
            scale = float(moved[side].abs().mean()) * 0.05
            moved[side] = moved[side] + torch.randn(moved[side].shape, generator=generator) * scale
            assert evidence.loss(error - moved["left"] @ moved["right"]) > loss


def test_any_root_of_the_moment_gives_the_same_correction(base, matrix, evidence):
    """[V] The paper's ``Q sqrt(eigenvalues)`` and the symmetric root, each with an SVD of its own."""
    weights, columns = evidence.rows.double(), evidence.columns.double()
    error = weights.sqrt()[:, None] * (matrix - base.dense()).double()
    values, vectors = torch.linalg.eigh(columns)
    found = lost(matrix, base, evidence, 6).first(6)
    expected = found.left.double() @ found.right.double()
    for root in (vectors * values.sqrt(), (vectors * values.sqrt()) @ vectors.t()):
        u, s, v = torch.linalg.svd(error @ root, full_matrices=False)
        product = (u[:, :6] * s[:6]) @ v[:6] @ torch.linalg.inv(root) / weights.sqrt()[:, None]
        torch.testing.assert_close(product, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_a_correction_beats_that_of_the_weights_alone_and_gains_with_rank(base, matrix, evidence):
    plain, losses = Evidence(torch.ones(len(matrix)), None), [evidence.loss(matrix - base.dense())]
    for rank in (2, 8, 24):
        form = compensated(matrix, base, evidence, rank, 6)
        assert isinstance(form, Sum) and isinstance(form.correction, LowRank) and form.base is base
        losses.append(evidence.loss(matrix - form.dense()))
        assert losses[-1] < evidence.loss(matrix - compensated(matrix, base, plain, rank, 6).dense())
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("name", BASES)
def test_a_setting_names_its_base(name, matrix, evidence):
    method = get_method("eora")
    form = method.encode(matrix, setting_of(name), evidence)
    alone = get_method(name).encode(matrix, BASES[name], evidence)
    assert torch.equal(form.base.dense(), alone.dense())
    assert evidence.loss(matrix - form.dense()) < evidence.loss(matrix - alone.dense())
    assert pack(form).blob == pack(method.encode(matrix, setting_of(name), evidence)).blob


def test_settings_share_a_base_and_not_more(matrix, evidence):
    method = get_method("eora")
    settings = [setting_of("rtn", 8), setting_of("gptq", 8), setting_of("rtn", 3)]
    for form, setting in zip(method.encode_all(matrix, iter(settings), evidence), settings, strict=True):
        assert torch.equal(form.dense(), method.encode(matrix, setting, evidence).dense())
        assert form.correction.left.shape[1] == setting["rank"]


def test_the_settings_offered_are_few_and_as_good_as_with_the_plain_base(matrix, evidence, size):
    """They have a trellis for a base, which loses less in equal bytes than ``entropy`` does."""
    method = get_method("eora")
    settings = method.settings(matrix, evidence)
    assert len(settings) <= 15
    named = [setting for setting in settings if setting.get("base") == "trellis"]
    assert named == settings
    other = get_method("entropy")
    setting = next(setting for setting in named if setting["rank"] == 8)
    form = method.encode(matrix, setting, evidence)
    # An entropy-coded base that is just as large, or a little larger.
    steps = [setting["base.step"] * 2 ** (-k / 16) for k in range(-2, 6)]
    plain = (other.encode(matrix, {"step": step}, evidence) for step in steps)
    rival = next(base for base in plain if size(base) >= size(form.base))
    corrected = compensated(matrix, rival, evidence, 8, setting["bits"])
    assert evidence.loss(matrix - form.dense()) < evidence.loss(matrix - corrected.dense())


@pytest.mark.parametrize("kind", ["ill-conditioned", "rank-deficient", "one input"])
def test_moments_that_are_hard_to_invert(kind, matrix):
    generator = torch.Generator().manual_seed(0)
    columns = matrix.shape[1]
    mixing = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    spread = {"ill-conditioned": torch.logspace(0, -12, columns), "rank-deficient": (torch.arange(columns) < 20).float(),
              "one input": (torch.arange(columns) < 1).float()}[kind]  # fmt: skip
    moment = (mixing * spread) @ mixing.t()
    moment = (moment + moment.t()) / 2
    base = get_method("rtn").encode(matrix, BASES["rtn"], Evidence(torch.ones(len(matrix)), None))
    error = matrix - base.dense()
    found = factors.whitened(error, torch.ones(len(matrix)), moment, 24).first(24)
    assert bool(torch.isfinite(found.left).all()) and bool(torch.isfinite(found.right).all())
    before, after = (float(((e @ moment) * e).sum()) for e in (error, error - found.left @ found.right))
    assert after < (0.05 if kind == "ill-conditioned" else 1e-5) * before
    # As evidence a moment is damped, and then the whole method takes it.
    damped = Evidence(torch.ones(len(matrix)), moment + DAMPING * moment.diagonal().mean() * torch.eye(columns))
    form = compensated(matrix, base, damped, 16, 6)
    assert bool(torch.isfinite(form.dense()).all())
    assert damped.loss(matrix - form.dense()) < damped.loss(error)


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (7, 13)])
def test_ranks_beyond_the_matrix_are_cut(shape, evidence_of):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    form = get_method("eora").encode(weight, setting_of("rtn", rank=500), evidence_of(*shape))
    assert form.correction.left.shape[1] <= min(shape)
    assert all(
        setting["rank"] <= max(1, min(shape) // 2)
        for setting in get_method("eora").settings(weight, evidence_of(*shape))
    )


def test_a_base_that_lost_nothing_needs_no_correction(evidence):
    weight = torch.zeros(96, 128)
    form = get_method("eora").encode(weight, setting_of("rtn"), evidence)
    assert torch.equal(form.dense(), weight)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"rank": 0}, "eora: rank is 0"),
        ({"rank": 2.5}, "eora: rank is 2.5"),
        ({"bits": 0.5}, "eora: bits is 0.5"),
        ({"base": "svd"}, "base is 'svd', of the family 'factorize'"),
        ({"base": "nothing"}, "method 'nothing' is not known"),
        ({"base.bits": 40}, "rtn: bits is 40"),
        ({"base": "sparsegpt", "base.pattern": "3:5"}, "pattern 3:5 does not divide the 128 columns"),
    ],
)
def test_unusable_settings_are_named(change, word, matrix, evidence):
    with pytest.raises(RequestError, match=word):
        get_method("eora").encode(matrix, setting_of("rtn") | change, evidence)
