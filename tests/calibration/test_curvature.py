"""Curvature: the algebra of K-FAC and EK-FAC, how it is measured, and that methods and runs can use it."""

import json

import pytest
import torch
from torch import nn

import octavo
from octavo.calibration.calibrating import calibrate
from octavo.calibration.curvature import Curvature, kronecker
from octavo.calibration.evidence import Evidence
from octavo.calibration.evidence_folder import EvidenceFolder
from octavo.calibration.objective import objective
from octavo.calibration.watches import DAMPING
from octavo.errors import RequestError
from octavo.methods import get_method
from octavo.methods.factorize.fisher_svd import FisherSVD
from octavo.sources.source import from_module

ROWS, COLUMNS = 5, 7


def draws(count=400, dependent=True):
    """Inputs and gradients of one layer; dependent ones are large together."""
    generator = torch.Generator().manual_seed(0)
    a = (torch.randn(count, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)).double()
    g = (torch.randn(count, ROWS, generator=generator) @ torch.randn(ROWS, ROWS, generator=generator)).double()
    return (a, g * a[:, :1].abs()) if dependent else (a, g)


def moment(x):
    return x.t() @ x / len(x)


@pytest.fixture(scope="module")
def measured():
    """K-FAC and EK-FAC of dependent draws, their gradients, and the dense Fisher matrix."""
    a, g = draws()
    gradients = g[:, :, None] * a[:, None]
    product = kronecker(moment(g), moment(a))
    flat = gradients.flatten(1)
    return product, product.corrected(gradients), gradients, flat.t() @ flat / len(flat)


def dense(curvature: Curvature):
    basis = torch.kron(curvature.outputs, curvature.inputs)
    return basis @ torch.diag(curvature.values.flatten()) @ basis.t()


def test_the_product_of_moments_is_kfac(measured):
    product, _, _, _ = measured
    a, g = draws()
    torch.testing.assert_close(dense(product), torch.kron(moment(g), moment(a)))
    for got, expected in zip(product.moments(), (moment(g), moment(a)), strict=True):
        torch.testing.assert_close(got, expected)


def test_corrected_eigenvalues_are_the_nearest_diagonal_of_the_basis(measured):
    """[V] They are the diagonal of the Fisher matrix in that basis, so no other diagonal is nearer to it."""
    product, corrected, _, fisher = measured
    basis = torch.kron(product.outputs, product.inputs)
    torch.testing.assert_close(corrected.values.flatten(), (basis.t() @ fisher @ basis).diagonal())
    error = float((dense(corrected) - fisher).norm())
    assert error < 0.8 * float((dense(product) - fisher).norm())
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        noise = torch.randn(ROWS, COLUMNS, generator=generator).double() * 0.05 * float(corrected.values.mean())
        other = Curvature(*(getattr(corrected, p) for p in ("outputs", "inputs", "output_values", "input_values")),
                          corrected.values + noise)  # fmt: skip
        assert float((dense(other) - fisher).norm()) > error


def test_the_trace_is_that_of_the_fisher_matrix(measured):
    _, corrected, _, fisher = measured
    assert float(corrected.values.sum()) == pytest.approx(float(fisher.trace()))


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_products_with_the_matrix_and_its_inverse(measured, damping):
    """[V] Both are those of the dense matrix."""
    _, corrected, _, _ = measured
    vector = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2)).double()
    whole = dense(corrected)
    torch.testing.assert_close(corrected.times(vector).flatten(), whole @ vector.flatten())
    inverse = torch.linalg.inv(whole + damping * torch.eye(len(whole), dtype=whole.dtype))
    torch.testing.assert_close(corrected.solve(vector, damping).flatten(), inverse @ vector.flatten())
    torch.testing.assert_close(corrected.inverse_diagonal(damping).flatten(), inverse.diagonal())


def test_a_curvature_with_zeros_is_damped_before_it_is_inverted():
    flat = kronecker(torch.diag(torch.tensor([1.0, 0.0])), torch.eye(3))
    torch.testing.assert_close(flat.solve(torch.ones(2, 3)), torch.tensor([[1 / 1.05] * 3, [20.0] * 3]))
    torch.testing.assert_close(flat.inverse_diagonal(), torch.tensor([[1 / 1.05] * 3, [20.0] * 3]))
    for inverse in (lambda: flat.solve(torch.ones(2, 3), 0.0), lambda: flat.inverse_diagonal(0.0)):
        with pytest.raises(RequestError, match=r"shape \(2, 3\) has no inverse.*damping above 0"):
            inverse()


def test_the_product_nearest_to_zeros():
    rows, columns = kronecker(torch.zeros(2, 2), torch.eye(3)).nearest()
    assert not bool(rows.any())
    torch.testing.assert_close(columns, torch.eye(3) / 3)


def test_the_loss_of_independent_draws_is_that_of_the_dense_fisher_matrix():
    """[V] Every input meets every gradient: K-FAC, EK-FAC and the Fisher matrix are one."""
    a, g = (part[:20] for part in draws(dependent=False))
    gradients = (g[:, None, :, None] * a[None, :, None, :]).reshape(-1, ROWS, COLUMNS)
    flat = gradients.flatten(1)
    fisher = flat.t() @ flat / len(flat)
    error = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    expected = float(error.double().flatten() @ fisher @ error.double().flatten()) / 2
    product = kronecker(moment(g), moment(a))
    for curvature in (product, product.corrected(gradients)):
        rows, columns = curvature.nearest()
        assert Evidence(rows, columns, curvature=curvature).loss(error) == pytest.approx(expected, rel=1e-5)


def test_the_nearest_product_has_the_same_marginals(measured):
    _, corrected, _, _ = measured
    rows, columns = corrected.nearest()
    blocks = dense(corrected).reshape(ROWS, COLUMNS, ROWS, COLUMNS)
    torch.testing.assert_close(rows.double(), torch.einsum("ijij->i", blocks), rtol=1e-4, atol=1e-5)
    total = float(rows.sum()) * float(columns.trace())
    assert total == pytest.approx(float(corrected.values.sum()), rel=1e-4)
    together = torch.einsum("ijik->jk", blocks)
    torch.testing.assert_close(columns.double() * float(rows.sum()), together, rtol=1e-4, atol=1e-4)


class Tokens(nn.Module):
    """Layers over tokens with a mask, whose outputs are pooled."""

    def __init__(self):
        super().__init__()
        self.table, self.inner, self.last = nn.Embedding(60, 24), nn.Linear(24, 32), nn.Linear(32, 24)

    def forward(self, input_ids, attention_mask):
        states = self.last(torch.tanh(self.inner(self.table(input_ids)))) * attention_mask[..., None]
        return states.sum(1)


def _tokens():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 60, (10, 6), generator=generator)
    lengths = torch.randint(2, 7, (10, 1), generator=generator)
    return {"input_ids": tokens, "attention_mask": (torch.arange(6) < lengths).long()}


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.Conv2d(12, 16, 3)

    def forward(self, x):
        return self.last(torch.relu(self.inner(x))).flatten(1)


CASES = {
    "tokens": (Tokens, _tokens, ("inner.weight", "last.weight")),
    "images": (
        Images,
        lambda: torch.randn(10, 8, 7, 8, generator=torch.Generator().manual_seed(0)),
        ("inner.weight", "last.weight"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_eigenvalues_are_squares_of_the_gradients_of_single_examples(case):
    make, data, names = CASES[case]
    torch.manual_seed(0)
    module, batch, wanted = make(), data(), objective("squared")
    source = from_module(module)
    sites, _ = source.sites()
    found = calibrate(source, sites, [batch], wanted, seed=5, curvature="ekfac").evidence
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        outputs = wanted.outputs(module, batch)
        noise = torch.randn(outputs.shape, generator=generator)
    scale = (2 / (outputs.detach().square().mean() * outputs.shape[1])).sqrt()
    weights = [module.get_parameter(name) for name in names]
    singles = [
        torch.autograd.grad((outputs[n] * noise[n]).sum() * scale, weights, retain_graph=True)
        for n in range(len(outputs))
    ]
    for name, gradients in zip(names, zip(*singles, strict=True), strict=True):
        curvature = found[name].curvature
        values = curvature.rotated(torch.stack(gradients).flatten(2)).square().mean(0)
        torch.testing.assert_close(curvature.values, values + DAMPING * values.mean(), rtol=1e-3, atol=1e-6)
        assert found[name].rows.shape == (len(curvature.outputs),)


def test_what_has_no_plain_layer_keeps_its_evidence():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.tied = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
            self.tied.weight = self.table.weight
            self.grouped, self.plain = nn.Conv1d(16, 80, 3, groups=2, padding=1), nn.Linear(80, 16)

        def forward(self, ids):
            states = self.grouped(self.table(ids).transpose(1, 2)).transpose(1, 2)
            return self.tied(self.plain(states)).mean(1)

    torch.manual_seed(0)
    source, ids = from_module(Odd()), torch.randint(0, 40, (12, 5))
    sites, _ = source.sites()
    usual = calibrate(source, sites, [ids], objective("squared")).evidence
    found = calibrate(source, sites, [ids], objective("squared"), curvature="ekfac").evidence
    assert {name for name, evidence in found.items() if evidence.curvature is not None} == {"plain.weight"}
    for name in found.keys() - {"plain.weight"}:
        assert torch.equal(found[name].rows, usual[name].rows)
        assert torch.equal(found[name].columns, usual[name].columns)


@pytest.fixture(scope="module")
def evidence():
    """Of the wider layer of a small net."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 10))
    source = from_module(module)
    sites, _ = source.sites()
    x = torch.randn(200, 32) @ torch.randn(32, 32) * 0.3
    found = calibrate(source, sites, list(x.split(50)), objective("kl"), curvature="ekfac")
    return module[0].weight.detach(), found.evidence["0.weight"]


def test_fisher_svd_fits_the_curvature(evidence):
    """Both moments beat inputs alone, and every sweep towards the corrected eigenvalues lowers the loss."""
    weight, found = evidence
    for rank in (4, 10):
        setting = {"rank": rank, "bits": 12}
        methods = (get_method("svd"), get_method("activation-svd"), FisherSVD(0), FisherSVD(1), FisherSVD(4))
        losses = [found.loss(weight - method.encode(weight, setting, found).dense()) for method in methods]
        assert losses == sorted(losses, reverse=True)
        assert losses[4] < 0.995 * losses[2] < 0.95 * losses[1]


def test_fisher_svd_without_a_curvature(evidence):
    weight, found = evidence
    without = Evidence(found.rows, found.columns)
    method = get_method("fisher-svd")
    assert method.settings(weight, without) == []
    with pytest.raises(RequestError, match=r"fisher-svd.*curvature='ekfac'"):
        method.encode(weight, {"rank": 4, "bits": 6}, without)
    for setting, word in (({"rank": 0, "bits": 6}, "rank"), ({"rank": 4, "bits": 0}, "bits")):
        with pytest.raises(RequestError, match=f"fisher-svd: {word}"):
            method.encode(weight, setting, found)
    assert method.encode(weight, {"rank": 999, "bits": 6}, found).left.shape[1] <= 32


@pytest.mark.parametrize("change", ["zeros", "zero rows", "constant", "one column"])
def test_fisher_svd_of_odd_matrices(evidence, change):
    weight, found = evidence
    odd = {
        "zeros": torch.zeros_like(weight),
        "zero rows": torch.where(torch.arange(len(weight))[:, None] % 2 == 0, 0.0, weight),
        "constant": torch.full_like(weight, 0.3),
        "one column": torch.where(torch.arange(weight.shape[1]) == 3, weight, 0.0),
    }[change]
    form = get_method("fisher-svd").encode(odd, {"rank": 8, "bits": 8}, found)
    again = get_method("fisher-svd").encode(odd, {"rank": 8, "bits": 8}, found)
    assert bool(torch.isfinite(form.dense()).all()) and torch.equal(form.dense(), again.dense())
    assert found.loss(odd - form.dense()) <= found.loss(odd) + 1e-12


def test_evidence_on_the_disk_keeps_its_curvature(evidence, tmp_path):
    _, found = evidence
    EvidenceFolder(tmp_path).write("whole", {"with": found, "without": Evidence(found.rows, found.columns)})
    read = EvidenceFolder(tmp_path)
    assert read["without"].curvature is None
    error = torch.randn(found.curvature.values.shape, generator=torch.Generator().manual_seed(0))
    assert read["with"].loss(error) == found.loss(error)
    assert torch.equal(read["with"].curvature.inputs, found.curvature.inputs)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 24))


def test_compress_measures_it_and_resumes_with_it(tmp_path):
    data = list(torch.randn(96, 32, generator=torch.Generator().manual_seed(0)).split(16))
    request = {"ratio": 6, "data": data, "methods": ["entropy", "fisher-svd"], "preset": "fast"}
    request["workspace"] = tmp_path / "work"
    done = octavo.compress(small(), curvature="ekfac", **request)
    assert all(done.run.calibration.evidence[site.name].curvature is not None for site in done.opened.sites)
    assert {point.method for curve in done.profile.curves for point in curve.points} >= {"entropy", "fisher-svd"}
    first = done.save(tmp_path / "first", report=False)
    again = octavo.compress(small(), curvature="ekfac", resume=True, **request).save(tmp_path / "again", report=False)
    assert again["artifact"]["bytes"] == first["artifact"]["bytes"]
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()
    with pytest.raises(RequestError, match=r"another job.*curvature"):
        octavo.compress(small(), resume=True, **request)


def test_a_saved_profile_remembers_it(tmp_path):
    data = list(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).split(16))
    octavo.profile(small(), tmp_path / "p", data=data, methods=["entropy"], curvature="ekfac")
    assert json.loads((tmp_path / "p" / "request.json").read_text())["curvature"] == "ekfac"


def test_requests_that_cannot_be_served():
    data = list(torch.randn(64, 32).split(16))
    with pytest.raises(RequestError, match="curvature is 'hessian'; choose from kfac, ekfac"):
        octavo.compress(small(), ratio=4, data=data, curvature="hessian")
    for request in ({}, {"preset": "data-free"}):
        with pytest.raises(RequestError, match="curvature 'ekfac' is measured, which needs a model that runs and data"):
            octavo.compress(small(), ratio=4, curvature="ekfac", **request)
    with pytest.raises(RequestError, match=r"for speed.*curvature"):
        octavo.compress(small(), target="speed", speedup=2, data=data, curvature="ekfac")
