"""Large matrices are judged by a sample of their rows, and their plans are carried out exactly."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import octavo
from octavo.allocation.sampling import MEDIUM, sample_of, table_sample_of
from octavo.allocation.site_curves import profile_site
from octavo.allocation.windows import Window
from octavo.artifact import pack
from octavo.calibration.curvature import kronecker
from octavo.calibration.evidence import Evidence
from octavo.methods import get_method
from octavo.sources.sites import Site


def large(rows=2400, columns=1024, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp(0.5 * torch.randn(rows, 1, generator=generator))
    return torch.randn(rows, columns, generator=generator) * scales * 0.02


def evidence_of(weight, moment=False):
    columns = None
    if moment:
        inputs = torch.randn(512, weight.shape[1], generator=torch.Generator().manual_seed(1))
        columns = inputs.t() @ inputs / 512 + 0.1 * torch.eye(weight.shape[1])
    return Evidence(torch.linspace(0.5, 2, len(weight)) / float(weight.square().sum()), columns)


def test_small_matrices_are_looked_at_as_a_whole():
    weight = torch.ones(MEDIUM // 512, 512)
    assert sample_of(weight, evidence_of(weight)) is None
    # Nor are matrices of few rows sampled, however long these are.
    weight = torch.ones(3, MEDIUM)
    assert sample_of(weight, evidence_of(weight)) is None


@pytest.mark.parametrize(
    ("name", "setting", "moment"),
    [
        ("entropy", {"step": 2e-3}, False),
        ("entropy", {"step": 4e-5}, False),
        ("entropy", {"step": 2e-3}, True),
        ("rtn", {"bits": 4, "group": 64}, False),
        ("sparsegpt", {"sparsity": 0.7, "bits": 3}, False),
        ("keep", {"dtype": "bfloat16"}, False),
    ],
)
def test_a_sample_tells_of_the_whole(name, setting, moment):
    weight = large()
    evidence, method = evidence_of(weight, moment), get_method(name)
    sample = sample_of(weight, evidence)
    assert len(sample.weight) < len(weight) / 3
    found, whole = method.encode(sample.weight, setting, sample.evidence), method.encode(weight, setting, evidence)
    estimate, exact = sample.packed(found), pack(whole)
    assert estimate.bytes == pytest.approx(exact.bytes, rel=0.01)
    assert sample.loss(found) == pytest.approx(evidence.loss(whole.dense() - weight), rel=0.03, abs=1e-9)
    assert set(estimate.parts) == set(exact.parts) and estimate.meta["form"] == exact.meta["form"]
    assert estimate.bytes == sum(part[1] for part in estimate.parts.values())


def test_a_sample_has_the_loss_of_the_curvature():
    generator = torch.Generator().manual_seed(0)
    weight = large(1200, 256)
    seen = evidence_of(weight, moment=True)
    values = torch.rand(1200, 256, generator=generator).pow(4) / float(weight.square().sum())
    basis = torch.linalg.qr(torch.randn(1200, 1200, generator=generator))[0]
    product = kronecker(basis @ torch.diag(seen.rows) @ basis.t(), seen.columns)
    seen = replace(seen, curvature=replace(product, values=values))
    sample, method = sample_of(weight, seen), get_method("rtn")
    found, whole = (method.encode(part, {"bits": 4, "group": 64}, seen) for part in (sample.weight, weight))
    assert len(sample.weight) < 600
    assert sample.loss(found) == pytest.approx(seen.loss(whole.dense() - weight), rel=0.05)


def test_methods_of_a_curvature_are_tried_on_large_matrices():
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(512, 640), nn.ReLU(), nn.Linear(640, 8)), [torch.randn(16, 512)]
    with torch.no_grad():
        net[0].weight.copy_(torch.randn(640, 8) @ torch.randn(8, 512) * 0.05)
    done = octavo.compress(net, ratio=6, data=data, methods=["entropy", "fisher-svd"], curvature="ekfac", preset="fast")
    curve = next(curve for curve in done.profile.curves if curve.site == "0.weight")
    assert math.prod(curve.shape) > MEDIUM
    assert {point.method for point in curve.points} == {"entropy", "fisher-svd"}


@pytest.mark.parametrize(("rows", "columns", "expected"), [(3000, 256, 2049), (33_000, 256, 2049), (2000, 256, None)])
def test_a_sample_of_a_table_is_a_table(rows, columns, expected):
    weight = torch.zeros(1).expand(rows, columns)
    sample = table_sample_of(weight, Evidence(torch.ones(rows), None))
    assert (sample and len(sample.weight)) == expected


def test_no_sample_of_a_table_is_huge():
    weight = torch.zeros(1).expand(40_000, 4096)
    evidence = Evidence(torch.ones(40_000), None)
    assert table_sample_of(weight, evidence) is None and sample_of(weight, evidence).weight.numel() == 1 << 19


def test_errors_of_methods_name_the_site():
    site = Site("some.layer", "linear", (8, 8), torch.float32)
    with pytest.raises(octavo.RequestError, match=r"site 'some\.layer': evidence of shape \(8,\)"):
        profile_site(
            site, torch.ones(8, 8), Evidence(torch.full((8,), math.nan), None), [get_method("entropy")], Window()
        )


def test_points_of_a_sample_are_marked():
    weight = large()
    site = Site("big", "linear", tuple(weight.shape), torch.float32)
    methods = [get_method(name) for name in ("keep", "entropy", "activation-svd")]
    curve = profile_site(site, weight, evidence_of(weight), methods, Window(2, 5, 4))
    # Random weights have no low rank, and the whole matrix was not decomposed to find that out.
    assert {point.method for point in curve.points} == {"keep", "entropy"}
    assert all(point.estimated for point in curve.points)


def test_a_table_is_turned_into_principal_components_if_that_is_better():
    """The rotation belongs to the columns: a sample of the rows does not pay for it as often as it was taken."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(40, 40, generator=generator) @ torch.diag(torch.logspace(0, -1, 40))
    weight = torch.randn(20_000, 40, generator=generator) @ mixed
    site = Site("table", "embedding", tuple(weight.shape), torch.float32)
    methods = [get_method(name) for name in ("keep", "entropy", "trellis", "trellis-svd")]
    curve = profile_site(site, weight, evidence_of(weight), methods, Window(1, 6, 3))
    ours = [point for point in curve.points if point.method == "trellis-svd"]
    assert ours and not any(point.estimated for point in ours)
    others = sorted((point.bytes, point.loss) for point in curve.points if point.method in ("entropy", "trellis"))
    for point in ours:
        assert all(loss > point.loss for size, loss in others if size <= point.bytes)


def test_near_a_budget_a_table_is_looked_at_as_a_whole_once():
    """Other settings are tried on a smaller table, and corrected by what that one setting shows."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(40, 40, generator=generator) @ torch.diag(torch.logspace(0, -1, 40))
    weight = torch.randn(20_000, 40, generator=generator) @ mixed
    site, evidence = Site("table", "embedding", tuple(weight.shape), torch.float32), evidence_of(weight)
    methods = [get_method(name) for name in ("keep", "entropy", "trellis-svd")]
    quick, whole = (
        {
            str(point.setting): point
            for point in profile_site(site, weight, evidence, methods, window).points
            if point.method == "trellis-svd"
        }
        for window in (Window(1, 6, bits=3.5), Window(1, 6))
    )
    assert [point.setting["bits"] for point in quick.values() if not point.estimated] == [3.5]
    assert len(quick) >= 3 and not any(point.estimated for point in whole.values())
    for name, point in quick.items():
        assert point.bytes == pytest.approx(whole[name].bytes, rel=0.02)
        assert point.loss == pytest.approx(whole[name].loss, rel=0.06)


def test_a_low_rank_is_found_in_a_sample_and_measured_on_the_whole():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2400, 40, generator=generator) @ torch.randn(40, 1024, generator=generator)
    site = Site("thin", "linear", tuple(weight.shape), torch.float32)
    methods = [get_method(name) for name in ("keep", "entropy", "activation-svd")]
    curve = profile_site(site, weight, evidence_of(weight), methods, Window(1, 5, 4))
    thin = [point for point in curve.points if point.method == "activation-svd"]
    assert thin and not any(point.estimated for point in thin)


@pytest.mark.parametrize("request_", [{}, {"methods": ["rtn", "keep"]}])
def test_budgets_are_met_exactly_all_the_same(tmp_path, request_):
    save_file({"one": large().bfloat16(), "two": large(seed=1).bfloat16()}, tmp_path / "m.safetensors")
    done = octavo.compress(tmp_path / "m.safetensors", ratio=3, preset="data-free", **request_)
    report = done.save(tmp_path / "out", report=False)
    assert sum(file.stat().st_size for file in octavo.Artifact(tmp_path / "out").files()) == report["artifact"]["bytes"]
    # Round-to-nearest has no continuous setting.
    assert report["artifact"]["used"] > 0.98 or "methods" in request_
    assert report["artifact"]["used"] <= 1
    assert not any(point.estimated for point in done.built.plan.points.values())


def test_an_unreachable_budget_is_refused_from_samples(tmp_path):
    save_file({"one": large().bfloat16()}, tmp_path / "m.safetensors")
    with pytest.raises(octavo.BudgetError, match="ratio of at most"):
        octavo.compress(tmp_path / "m.safetensors", ratio=100_000, preset="data-free")
