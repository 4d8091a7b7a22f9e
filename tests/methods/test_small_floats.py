"""Small floating-point formats with scales of blocks."""

import pytest
import torch

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.methods import get_method
from octavo.methods.quantize.small_floats import VALUES, SmallFloats, values_of

PLAIN = Evidence(torch.ones(8), None)
MXFP4 = SmallFloats.words["mxfp4"]


@pytest.mark.parametrize("name, dtype", [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_values_are_those_of_pytorch(name, dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    assert torch.equal(values_of(name), codes[torch.isfinite(codes)].unique())


@pytest.mark.parametrize("name, largest, smallest", [("e3m2", 28.0, 0.0625), ("e2m3", 7.5, 0.125), ("e2m1", 6.0, 0.5)])
def test_ranges_are_those_of_the_standard(name, largest, smallest):
    values = values_of(name)
    assert float(values.max()) == largest and float(values[values > 0].min()) == smallest
    assert len(values) == 2 ** (1 + sum(VALUES[name][:2])) - 1 and torch.equal(values, -values.flip(0))


@pytest.mark.parametrize("word", SmallFloats.words)
def test_every_block_has_values_of_its_format_times_one_scale(word, matrix, evidence):
    setting = SmallFloats.words[word]
    form = SmallFloats().encode(matrix, setting, evidence)
    scales = form.scales.dense()
    assert scales.shape == (len(matrix), -(-matrix.shape[1] // setting["group"]))
    if setting["scale"] == "power":
        assert torch.equal(torch.frexp(scales)[0], torch.full_like(scales, 0.5))
    else:
        ratios = scales / form.scales.values.max() * 448
        assert float((ratios / ratios.to(torch.float8_e4m3fn).float() - 1).abs().max()) < 1e-5
    assert torch.isin(form.base.dense(), values_of(setting["values"])).all()


def test_scales_by_error_are_better_than_by_the_largest(matrix):
    found = SmallFloats().encode(matrix, MXFP4, PLAIN).dense()
    blocks = matrix.view(len(matrix), -1, 32)
    scale = torch.exp2(torch.floor(torch.log2(blocks.abs().amax(2, keepdim=True))) - 2)
    values = values_of("e2m1")
    usual = values[(blocks / scale).clamp(-6, 6)[..., None].sub(values).abs().argmin(-1)] * scale
    assert float((matrix - found).square().sum()) < 0.95 * float((blocks - usual).square().sum())


@pytest.mark.parametrize("word", SmallFloats.words)
def test_feedback_lowers_the_loss(word, matrix, evidence):
    setting = SmallFloats.words[word]
    losses = [
        evidence.loss(matrix - SmallFloats(feedback).encode(matrix, setting, evidence).dense())
        for feedback in (False, True)
    ]
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize("word", SmallFloats.words)
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(3, 64),
        torch.full((3, 64), 0.75),
        torch.cat([torch.full((3, 1), 1e30), torch.full((3, 63), 1e-3)], 1),
        torch.full((3, 64), 1e-39),
        torch.randn(3, 1),
    ],
    ids=["zeros", "one value", "an outlier", "below the range", "one column"],
)
def test_odd_matrices(word, weight):
    dense = SmallFloats().encode(weight, SmallFloats.words[word], PLAIN).dense()
    assert torch.isfinite(dense).all()
    # Below the smallest normal float32 there may be nothing but zero.
    assert float((dense - weight).abs().max()) <= max(0.25 * float(weight.abs().max()), 2.0**-126)


def test_words_and_wrong_settings():
    assert get_method("small-floats").settings(torch.zeros(2, 2), PLAIN)[-1] == MXFP4
    with pytest.raises(RequestError, match="small-floats: values is 'e9m9'"):
        SmallFloats().encode(torch.zeros(2, 2), {**MXFP4, "values": "e9m9"}, PLAIN)
    with pytest.raises(RequestError, match="NaN or Inf"):
        SmallFloats().encode(torch.full((2, 2), torch.nan), MXFP4, PLAIN)
