"""AdaRound: how it stands against rounding to nearest and against error feedback."""

import pytest
import torch

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.methods import get_method
from octavo.methods.quantize.adaptive_rounding import AdaptiveRounding

SETTING = {"bits": 3, "group": 32}


@pytest.fixture(scope="module")
def weight():
    torch.manual_seed(0)
    return torch.randn(24, 64) * 0.05


def correlated(spread: float) -> Evidence:
    """Evidence whose directions differ by so many powers of ten."""
    torch.manual_seed(1)
    mixing = torch.linalg.qr(torch.randn(64, 64))[0]
    return Evidence(torch.ones(24), mixing * torch.logspace(0, -spread, 64) @ mixing.t())


def loss(name, weight, evidence, setting=SETTING):
    method = get_method(name) if isinstance(name, str) else name
    return evidence.loss(weight - method.encode(weight, setting, evidence).dense())


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_beats_rounding_to_nearest(weight, bits):
    setting = {"bits": bits, "group": 32}
    evidence = correlated(2)
    assert loss("adaptive-rounding", weight, evidence, setting) < 0.75 * loss("rtn", weight, evidence, setting)


def test_stands_beside_error_feedback_by_the_sizes_of_inputs(weight):
    alike = correlated(2)
    assert loss("adaptive-rounding", weight, alike) < loss("gptq", weight, alike)
    inputs = torch.randn(1000, 64) @ torch.randn(64, 64) * torch.logspace(0, -1, 64)
    moment = inputs.t() @ inputs / 1000
    moment.diagonal().add_(0.01 * moment.diagonal().mean())
    tenfold = Evidence(torch.ones(24), moment)
    assert loss("gptq", weight, tenfold) < loss("adaptive-rounding", weight, tenfold) < loss("rtn", weight, tenfold)


@pytest.mark.parametrize("columns", [None, torch.logspace(0, -2, 64).diag()])
def test_nearest_is_best_where_inputs_are_uncorrelated(weight, columns):
    evidence = Evidence(torch.ones(24), columns)
    ours, plain = (get_method(name).encode(weight, SETTING, evidence) for name in ("adaptive-rounding", "rtn"))
    assert torch.equal(ours.codes, plain.codes) and torch.equal(ours.scale, plain.scale)


def test_codes_are_next_to_the_weight(weight):
    form = get_method("adaptive-rounding").encode(weight, SETTING, correlated(2))
    steps = form.scale.float().repeat_interleave(32, 1)
    inside = (form.codes > 0) & (form.codes < 7)
    assert float(((weight - form.dense()).abs() / steps)[inside].max()) <= 1 + 1e-4


def test_rows_are_independent_and_scale_does_not_count(weight):
    evidence, method = correlated(2), get_method("adaptive-rounding")
    whole = method.encode(weight, SETTING, evidence).codes
    assert torch.equal(method.encode(weight[:5], SETTING, Evidence(torch.ones(5), evidence.columns)).codes, whole[:5])
    larger = Evidence(torch.ones(24), evidence.columns * 2**20)
    assert torch.equal(method.encode(weight, SETTING, larger).codes, whole)


def test_bad_input_is_named(weight):
    for knobs in ({"steps": 0}, {"rate": 0.0}, {"price": -1.0}):
        with pytest.raises(RequestError, match="adaptive-rounding"):
            AdaptiveRounding(**knobs)
    with pytest.raises(RequestError, match="not finite"):
        AdaptiveRounding().encode(weight, SETTING, Evidence(torch.ones(24), torch.full((64, 64), float("nan"))))
