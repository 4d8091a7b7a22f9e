"""Grids of quantized sources are found again, from the weights alone and bit for bit."""

import pytest
import torch
from torch import Tensor

import octavo
from octavo.allocation.site_curves import profile_site
from octavo.allocation.windows import Window
from octavo.artifact import pack, unpack
from octavo.calibration.evidence import Evidence
from octavo.coding import encode as code
from octavo.methods import get_method
from octavo.sources.sites import Layout, Site

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def usual(rows=24, columns=512, seed=0) -> Tensor:
    """Weights of an ordinary model that was kept in bfloat16: rows and columns of unlike size."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.rand(rows, 1, generator=g) + 0.5, torch.rand(columns, generator=g) + 0.5
    return (torch.randn(rows, columns, generator=g) * 0.03 * sizes[0] * sizes[1]).bfloat16().float()


def grouped(weight: Tensor, width: int) -> Tensor:
    return weight.reshape(len(weight), -1, width)


def nearest(values: Tensor) -> Tensor:
    """Integers as a file holds them: their zero has no sign."""
    return values.round().int().float()


def q4_1(weight: Tensor, levels=15) -> Tensor:
    x = grouped(weight, 32)
    low = x.amin(2, keepdim=True)
    step = ((x.amax(2, keepdim=True) - low) / levels).half().float()
    return nearest((x - low) / step).clamp(0, levels) * step + low.half().float()


def q5_0(weight: Tensor, half=16) -> Tensor:
    """The extreme is given the most negative code, so steps are of either sign, and some zeros are below zero."""
    x = grouped(weight, 32)
    step = (x.gather(2, x.abs().argmax(2, keepdim=True)) / -half).half().float()
    return nearest(x / step).clamp(-half, half - 1) * step


def q8_0(weight: Tensor) -> Tensor:
    x = grouped(weight, 32)
    step = (x.abs().amax(2, keepdim=True) / 127).half().float()
    return nearest(x / step) * step


def q4_k(weight: Tensor) -> Tensor:
    """Steps and offsets are products of a float16 for 256 columns with 6 bits for 32."""
    x = grouped(weight, 32)
    low = x.amin(2, keepdim=True).clamp_max(0)

    def products(values: Tensor) -> Tensor:
        blocks = values.reshape(len(values), -1, 8)
        shared = (blocks.amax(2, keepdim=True) / 63).half().float()
        return (shared * nearest(blocks / shared)).reshape(values.shape)

    step, minimum = products((x.amax(2, keepdim=True) - low) / 15), products(-low)
    return nearest((x + minimum) / step).clamp(0, 15) * step - minimum


def q6_k(weight: Tensor) -> Tensor:
    x = grouped(weight, 16)
    scale = x.gather(2, x.abs().argmax(2, keepdim=True)) / -32
    blocks = scale.reshape(len(weight), -1, 16)
    shared = (blocks.abs().amax(2, keepdim=True) / 127).half().float()
    step = (shared * nearest(blocks / shared)).reshape(scale.shape)
    return nearest(x / step).clamp(-32, 31) * step


def gptq(weight: Tensor, width=128, levels=15) -> Tensor:
    """A float16 scale and an integer zero point a group, as GPTQ and AWQ have them."""
    x = grouped(weight, width)
    low, top = x.amin(2, keepdim=True).clamp_max(0), x.amax(2, keepdim=True).clamp_min(0)
    scale = ((top - low) / levels).half().float()
    zero = nearest(-low / scale)
    return (nearest(x / scale + zero).clamp(0, levels) - zero) * scale


def int8_rows(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return nearest(weight / scale) * scale


QUANTIZERS = {
    "Q4_0": lambda w: q5_0(w, 8), "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": lambda w: q4_1(w, 31), "Q8_0": q8_0,
    "Q4_K": q4_k, "Q6_K": q6_k, "GPTQ 128": gptq, "GPTQ 64, 8 bits": lambda w: gptq(w, 64, 255),
    "GPTQ 3 bits": lambda w: gptq(w, 256, 7), "int8 rows": int8_rows,
}  # fmt: skip
#: Bits a weight that the format itself takes.
BITS = {
    "Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q5_1": 6, "Q8_0": 8.5, "Q4_K": 4.5, "Q6_K": 6.5625, "GPTQ 128": 4.16,
    "GPTQ 64, 8 bits": 8.38, "GPTQ 3 bits": 3.08, "int8 rows": 8.07,
}  # fmt: skip
#: Two offsets and steps fit what rounding has left, or none of those that are tried does.
LOST = {("Q8_0", "bfloat16"), ("GPTQ 64, 8 bits", "bfloat16"), ("int8 rows", "bfloat16"), ("Q4_K", "bfloat16")}
LOST |= {("Q4_K", "float16"), ("GPTQ 64, 8 bits", "float16")}


def recovered(weight: Tensor):
    source_grid, evidence = get_method("source-grid"), Evidence(torch.ones(len(weight)), None)
    settings = source_grid.settings(weight, evidence)
    return next(source_grid.encode_all(weight, settings, evidence), None)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_format_is_restored_bit_for_bit(name, precision):
    weight = usual()
    source = QUANTIZERS[name](weight).reshape(weight.shape).to(PRECISIONS[precision])
    form = recovered(source.float())
    if form is None:
        assert (name, precision) in LOST
        return
    packed = pack(form)
    again = unpack(memoryview(packed.blob), packed.parts, packed.meta, form.shape).dense().to(source.dtype)
    assert torch.equal(again.view(torch.uint8), source.view(torch.uint8)), "zeros keep their sign, too"


@pytest.mark.parametrize("name", QUANTIZERS)
def test_it_is_smaller_than_the_format(name):
    weight = usual(256, 1024)
    form = recovered(QUANTIZERS[name](weight).reshape(weight.shape))
    assert pack(form).bytes * 8 / weight.numel() < 0.97 * BITS[name]


def test_extremes_of_a_bfloat16_model_are_stored_in_place_of_steps():
    """8 bits and an entropy-coded exponent in place of 11: seen in what the steps take."""
    weight = usual(256, 1024)
    fitted = pack(recovered(q4_1(weight).reshape(weight.shape)))
    steps = sum(entry[1] for part, entry in fitted.parts.items() if part.startswith("step/"))
    groups = weight.numel() // 32
    halves = recovered(q4_1(weight).reshape(weight.shape)).step.half().view(torch.int16)
    assert steps * 8 / groups < 8.5 < len(code(halves)) * 8 / groups


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_ordinary_weights_are_offered_nothing(dtype):
    for weight in (torch.randn(64, 256), usual(64, 256), torch.rand(64, 256)):
        assert recovered(weight.to(PRECISIONS[dtype]).float()) is None


def test_one_weight_off_the_grid_is_enough():
    weight = q4_1(usual(64, 512)).reshape(64, 512)
    weight[37, 100] *= 1 + 2**-20
    assert recovered(weight) is None
    with pytest.raises(octavo.RequestError, match="not every group of 32 columns"):
        get_method("source-grid").encode(weight, {"width": 32, "offset": True}, Evidence(torch.ones(64), None))


@pytest.mark.parametrize("value", [0.0, -0.0, 0.3])
def test_constant_groups(value):
    weight = q8_0(usual(8, 64)).reshape(8, 64)
    weight[2] = value
    form = recovered(weight)
    assert torch.equal(form.dense().view(torch.int32), weight.view(torch.int32))


def test_nothing_larger_than_lossless_is_tried():
    weight = q4_1(usual(64, 256)).reshape(64, 256)
    site = Site("w", "linear", (64, 256), torch.float32, Layout())
    names = ("entropy", "keep", "gptq", "rtn", "source-grid")
    evidence = Evidence(torch.ones(64), torch.eye(256))
    curve = profile_site(site, weight, evidence, [get_method(name) for name in names], Window())
    lossless = next(point for point in curve.points if point.method == "source-grid")
    assert lossless.loss == 0
    for name in ("entropy", "gptq", "rtn"):
        sizes = [point.bytes for point in curve.points if point.method == name]
        assert min(sizes) < lossless.bytes, "what is smaller is still wanted"
        assert sum(size >= lossless.bytes for size in sizes) <= 1, "the first one is only known to be larger afterwards"


def test_a_whole_model_is_restored_and_the_report_says_why_it_is_smaller(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(q4_1(layer.weight.bfloat16().float()).reshape(layer.weight.shape))
    batches = [torch.randn(16, 512) for _ in range(2)]
    methods = ["source-grid", "entropy", "keep"]
    done = octavo.compress(model, ratio=4, data=batches, objective="squared", methods=methods, preset="fast")
    report = done.save(tmp_path / "out", report=False)
    state = octavo.load(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor)
    assert report["quality"]["value"] == 0
    assert "bit for bit" in report["artifact"]["note"]


def test_a_site_without_any_point_is_an_error():
    with pytest.raises(octavo.RequestError, match=r"'weight'.*source-grid"):
        octavo.compress(torch.nn.Linear(64, 64), ratio=2, methods=["source-grid"])
