"""Integers with scales of either sign: a lower loss than GPTQ on the same codes, with and without compiled code."""

import pytest
import torch

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.methods import get_method
from octavo.methods.quantize import descent


def matrix(rows=48, columns=128, seed=0):
    """A weight and evidence of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    mixed = torch.eye(columns) + 0.2 * torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(1024, columns, generator=generator) * torch.rand(columns, generator=generator) @ mixed
    moment = inputs.T @ inputs / len(inputs)
    return weight, Evidence(torch.ones(rows), moment + 0.01 * moment.diagonal().mean() * torch.eye(columns), 1024)


@pytest.mark.parametrize("group", [32, 64, "row"])
def test_it_loses_much_less_than_gptq_with_as_many_scales(group):
    weight, evidence = matrix()
    setting = {"bits": 4, "group": group}
    ours, theirs = (
        evidence.loss(get_method(name).encode(weight, setting, evidence).dense() - weight)
        for name in ("wna16", "gptq:symmetric=true")
    )
    assert ours < 0.75 * theirs


def test_codes_fit_their_bits_and_scales_are_bfloat16_of_either_sign():
    weight, evidence = matrix()
    form = get_method("wna16").encode(weight, {"bits": 4, "group": 32}, evidence)
    assert form.codes.dtype == torch.int8 and int(form.codes.min()) == -8 and int(form.codes.max()) <= 7
    assert form.scale.dtype == torch.bfloat16 and bool((form.scale < 0).any()) and bool((form.scale > 0).any())
    assert form.zero is None and form.scale.shape == (48, 4)


def test_settings_are_those_that_divide_the_columns_from_large_to_small():
    settings = get_method("wna16").settings(torch.randn(4, 192), Evidence(torch.ones(4), None))
    assert settings == [
        {"bits": 8, "group": "row"}, {"bits": 4, "group": 32}, {"bits": 4, "group": 64}, {"bits": 4, "group": "row"}
    ]  # fmt: skip


def test_without_compiled_code_the_loss_is_the_same(monkeypatch):
    weight, evidence = matrix(24, 64)
    setting, method = {"bits": 4, "group": 32}, get_method("wna16")
    one = evidence.loss(method.encode(weight, setting, evidence).dense() - weight)
    monkeypatch.setattr(descent, "compiled", lambda function: None)
    other = evidence.loss(method.encode(weight, setting, evidence).dense() - weight)
    assert other == pytest.approx(one, rel=0.02)


def test_fitted_scales_are_the_best_for_their_codes():
    weight, evidence = matrix(8, 64)
    codes, moment = (weight * 60).round(), evidence.columns
    scale = descent.fitted_scales(weight, codes, torch.full((8, 2), 1 / 60), moment)

    def loss(scale):
        return evidence.loss(codes * scale.repeat_interleave(32, 1) - weight)

    for change in torch.randn(8, 8, 2, generator=torch.Generator().manual_seed(1)):
        assert loss(scale) <= loss(scale * (1 + 0.01 * change))


@pytest.mark.parametrize(
    ("setting", "said"),
    [({"bits": 5, "group": 32}, "choose 4 or 8"), ({"bits": 4, "group": 48}, "do not divide the 128 columns")],
)
def test_settings_that_no_kernel_runs_are_refused(setting, said):
    weight, evidence = matrix()
    with pytest.raises(RequestError, match=f"wna16: .*{said}"):
        get_method("wna16").encode(weight, setting, evidence)
