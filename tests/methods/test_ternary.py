"""TernaryDifference differences: signs with one scale, offered where a difference is compressed."""

import pytest
import torch

import octavo
from octavo.calibration.evidence import Evidence
from octavo.methods import select_methods
from octavo.methods.prune.ternary import TernaryDifference

GENERATOR = torch.Generator().manual_seed(0)
CHANGE = 0.01 * torch.randn(48, 64, generator=GENERATOR)
EVIDENCE = Evidence(torch.rand(48, generator=GENERATOR) + 0.1, torch.diag(torch.rand(64, generator=GENERATOR) + 0.1))


def test_the_largest_changes_become_signs_with_the_stated_scale() -> None:
    found = TernaryDifference().encode(CHANGE, {"density": 0.1, "scale": 3}, EVIDENCE).dense()
    kept = CHANGE.abs() >= CHANGE.abs().flatten().topk(round(0.1 * CHANGE.numel())).values.min()
    assert torch.allclose(found, 3 * CHANGE.std(correction=0) * CHANGE.sign() * kept)


@pytest.mark.parametrize("density", [0.02, 0.2, 0.5])
def test_without_a_scale_it_is_that_of_least_expected_loss(density: float) -> None:
    own = TernaryDifference().encode(CHANGE, {"density": density}, EVIDENCE).dense()
    least = EVIDENCE.loss(own - CHANGE)
    assert all(EVIDENCE.loss(factor * own - CHANGE) > least for factor in (0.9, 1.1))
    assert least < EVIDENCE.loss(CHANGE)


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        (torch.zeros(4, 6), {"density": 0.5}),
        (torch.zeros(4, 6), {"density": 0.5, "scale": 2}),
        (CHANGE, {"density": 0.0}),
        (CHANGE, {"density": 0.2, "scale": 0}),
    ],
)
def test_where_nothing_is_kept_there_are_zeros(change: torch.Tensor, setting: dict) -> None:
    form = TernaryDifference().encode(change, setting, Evidence(torch.ones(len(change)), None))
    assert not form.dense().any() and form.values.shape == (1, 0)


@pytest.mark.parametrize("setting", [{"density": 1.5}, {"density": "half"}, {"density": 0.1, "scale": -1}])
def test_a_setting_that_makes_no_sense_is_refused(setting: dict) -> None:
    with pytest.raises(octavo.RequestError, match=r"ternary: .* must be a number"):
        TernaryDifference().encode(CHANGE, setting, EVIDENCE)


def test_it_is_offered_for_differences_or_by_name() -> None:
    def names(*args, **kwargs) -> set[str]:
        return {method.name for method in select_methods(*args, **kwargs)}

    assert "ternary" not in names(None, "best") | names(["prune"], "best")
    assert "ternary" in names(None, "fast", changes=True) & names(["ternary"], "fast")
    assert "ternary" in names(["prune"], "best", changes=True)
