"""A profile: every site's points, which a file keeps and a new budget is solved from."""

import json

import pytest
import torch
from safetensors.torch import save_file

import octavo

METHODS = ["entropy", "rtn", "svd", "keep"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A matrix of rank 4, which svd stores best, and one of noise, which it does not."""
    file, generator = tmp_path_factory.mktemp("profiles") / "bare.safetensors", torch.Generator().manual_seed(0)
    thin = torch.randn(96, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    save_file({"noise": torch.randn(64, 48, generator=generator), "thin": thin, "bias": torch.zeros(96)}, file)
    return file


@pytest.fixture(scope="module")
def measured(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles") / "measured"
    return octavo.profile(source, folder, preset="fast", methods=METHODS), folder


def test_every_site_has_a_curve_of_methods_that_were_asked_for(measured):
    profile, _ = measured
    assert {curve.site: curve.shape for curve in profile.curves} == {"noise": (64, 48), "thin": (96, 64)}
    for curve in profile.curves:
        assert {"entropy", "keep"} <= {point.method for point in curve.points} <= set(METHODS)
        assert all(point.bytes > 0 and point.loss >= 0 for point in curve.points)


def test_more_bytes_of_one_method_lose_less(measured):
    profile, _ = measured
    for curve in profile.curves:
        points = sorted((point.bytes, point.loss) for point in curve.points if point.method == "entropy")
        losses = [loss for _, loss in points]
        assert len(points) > 2 and losses == sorted(losses, reverse=True)


def test_a_family_that_is_behind_is_not_measured_far(measured):
    """Factors of noise lose many times more than codes; where the rank is low they are the best there is."""
    profile, _ = measured
    counts = {
        curve.site: sum(point.method == "svd" for point in curve.points) for curve in profile.curves
    }  # fmt: skip
    assert counts["noise"] < counts["thin"]
    thin = next(curve for curve in profile.curves if curve.site == "thin")
    fewest = min(point.bytes for point in thin.points if point.method != "svd" and point.loss < 0.01 * _energy(thin))
    assert any(point.bytes < fewest and point.loss < 0.01 * _energy(thin) for point in thin.points)


def _energy(curve):
    """The loss of the coarsest point: what there is to lose, roughly."""
    return max(point.loss for point in curve.points)


def test_bytes_of_points_are_those_of_the_file(source, measured, tmp_path):
    """What a plan states to the byte is what its artifact takes."""
    _, folder = measured
    plan = octavo.plan(folder, ratio=5)
    done = octavo.compress(source, ratio=5, workspace=folder, resume=True, preset="fast", methods=METHODS)
    done.save(tmp_path / "out", report=False)
    size = sum((tmp_path / "out" / name).stat().st_size for name in ("model.safetensors", "octavo.json"))
    assert size == done.built.bytes <= done.budget.bytes == plan.budget.bytes
    assert not any(point.estimated for point in done.built.plan.points.values())


def test_another_budget_is_solved_from_the_file_alone(source, measured):
    profile, folder = measured
    sizes = [octavo.plan(folder, ratio=ratio).bytes for ratio in (3, 6, 9)]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size <= profile.original_bytes / ratio for size, ratio in zip(sizes, (3, 6, 9), strict=True))
    with pytest.raises(octavo.BudgetError) as caught:
        octavo.plan(folder, ratio=1e6)
    assert octavo.plan(folder, ratio=caught.value.limit).bytes >= profile.smallest


def test_a_file_that_was_changed_is_no_profile(measured, tmp_path):
    _, folder = measured
    whole = json.loads((folder / "profile.json").read_text())
    assert {curve["site"] for curve in whole["curves"]} == {"noise", "thin"}
    for content in ("{}", "[]", json.dumps({**whole, "fixed_bytes": 0})):
        (tmp_path / "profile.json").write_text(content)
        with pytest.raises(octavo.RequestError, match="not a profile that this version can read"):
            octavo.plan(tmp_path, ratio=4)
