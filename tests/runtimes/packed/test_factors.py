"""Factors that run: equal to the dense weight in every form and geometry, taken only where they are measured cheaper."""

import copy
import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import BertConfig, BertModel
from transformers.pytorch_utils import Conv1D

import octavo
from octavo.errors import ArtifactError, RequestError
from octavo.forms import (
    Dense,
    Folded,
    Grid,
    GroupedLowRank,
    LowRank,
    RowBlocks,
    Scaled,
    Separable,
    Sparse,
    Sum,
    TensorTrain,
    Trellis,
    Trimmed,
)
from octavo.runtimes.packed import PackedWeight, factored, factors, held_bytes, kernels_of
from octavo.runtimes.packed.factors import FactorKernel, is_factorization, run_as_factors
from octavo.sources.sites import Layout


def dense(*shape):
    return Dense(torch.randn(*shape) / shape[1] ** 0.5)


def grid(*shape):
    return Grid(torch.randint(-9, 10, shape, dtype=torch.int8), torch.full((1, 1), 0.1))


def gains(rows):
    return torch.arange(rows, dtype=torch.int16) % 100 - 50


def blocks():
    member = torch.arange(40) % 3 % 2
    sizes = member.bincount().tolist()
    return RowBlocks(member.to(torch.uint8), tuple(LowRank(dense(n, 2 + n % 3), dense(2 + n % 3, 24)) for n in sizes))


#: Forms of a matrix of 40 x 24.
MATRICES = {
    "low rank": lambda: LowRank(grid(40, 5), grid(5, 24)),
    "grouped": lambda: GroupedLowRank(dense(40, 8), dense(8, 6), 4),
    "tensor train": lambda: TensorTrain(
        (dense(20, 3), dense(3 * 12, 4), dense(4 * 4, 1)), (5, 4, 2), (4, 3, 2), 40, 24
    ),
    "row blocks": blocks,
    "sum": lambda: Sum(grid(40, 24), LowRank(dense(40, 2), dense(2, 24))),
    "scaled": lambda: Scaled(LowRank(grid(40, 5), grid(5, 24)), gains(40)),
    "correction of a trellis": lambda: Sum(Trellis(grid(40, 24)), LowRank(dense(40, 2), dense(2, 24))),
    "cut": lambda: Trimmed(LowRank(dense(30, 4), dense(4, 20)), torch.arange(40) < 30, torch.arange(24) > 3),
    "deep": lambda: LowRank(LowRank(grid(40, 6), dense(6, 5)), Sparse(torch.eye(5, 24) > 0, Dense(torch.randn(1, 5)))),
}
#: Forms of a convolution of 12 filters over 8 channels of 3 x 5.
KERNELS = {
    "low rank": lambda: LowRank(grid(12, 4), grid(4, 120)),
    "grouped": lambda: GroupedLowRank(dense(12, 6), dense(6, 60), 2),
    "spatial": lambda: Folded(LowRank(grid(24, 4), grid(4, 60)), "spatial", (8, 3, 5)),
    "spatial in groups": lambda: Folded(GroupedLowRank(dense(24, 6), dense(6, 20), 3), "spatial", (8, 3, 5)),
    "separable": lambda: Separable(dense(12, 8), dense(12, 3), dense(12, 5), 1),
    "separable of three terms": lambda: Separable(dense(36, 8), dense(36, 3), dense(36, 5), 3),
    "sum": lambda: Sum(grid(12, 120), LowRank(dense(12, 2), dense(2, 120))),
    "correction of a trellis": lambda: Sum(Trellis(grid(12, 120)), LowRank(dense(12, 2), dense(2, 120))),
    "sum of factors": lambda: Sum(Separable(dense(12, 8), dense(12, 3), dense(12, 5), 1), LowRank(dense(12, 2), dense(2, 120))),
    "scaled": lambda: Scaled(Folded(LowRank(grid(24, 4), grid(4, 60)), "spatial", (8, 3, 5)), gains(12)),
    "scaled separable": lambda: Scaled(Separable(dense(24, 8), dense(24, 3), dense(24, 5), 2), gains(12)),
}  # fmt: skip
GEOMETRIES = {
    "plain": {},
    "stride": {"stride": (2, 3)},
    "padding": {"padding": (1, 2)},
    "dilation": {"dilation": (2, 1)},
    "all": {"stride": 2, "padding": (3, 1), "dilation": (1, 2)},
    "same": {"padding": "same", "dilation": (1, 2)},
    "valid": {"padding": "valid"},
    "reflected": {"padding": (1, 2), "padding_mode": "reflect", "stride": 2},
    "no bias": {"padding": 1, "bias": False},
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    factors._MEASURED.clear()


@pytest.fixture
def always(monkeypatch):
    """Factors are taken whatever they cost, and nothing is timed."""
    monkeypatch.setattr(factors, "_measure", lambda *_: {"factors": 1.0, "dense": 2.0})


def both(module, form, layout=None, batch=None, attribute="weight"):
    """A module with the form's dense weight, and a copy that was asked to run its factors."""
    weight = getattr(module, attribute)
    layout = layout or Layout()
    with torch.no_grad():
        weight.copy_(layout.from_matrix(form.dense(), tuple(weight.shape)))
    other = copy.deepcopy(module).eval()
    run_as_factors(other, [("site", [attribute], form, layout)], batch)
    return module.eval(), other


def close(out, expected, rtol=1e-4):
    expected = expected.detach()
    assert type(out) is torch.Tensor and out.shape == expected.shape and out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=0, atol=rtol * float(expected.abs().max()))


@pytest.mark.parametrize("name", MATRICES)
@torch.inference_mode()
def test_layers_of_every_form(name, always):
    form = MATRICES[name]()
    assert is_factorization(form.meta())
    cases = [
        (nn.Linear(24, 40), Layout(), torch.randn(3, 2, 24)),
        (nn.Linear(24, 40, bias=False), Layout(), torch.randn(24)),
        (Conv1D(40, 24), Layout("columns_first"), torch.randn(2, 3, 24)),
        (nn.Embedding(40, 24), Layout(), torch.randint(0, 40, (3, 5))),
    ]
    for module, layout, x in cases:
        plain, other = both(module, form, layout)
        assert isinstance(other.weight.data, PackedWeight) and factored(other)["site"].as_factors
        close(other(x), plain(x))
        close(other.weight.data.decode(), plain.weight)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", KERNELS)
@torch.inference_mode()
def test_convolutions_of_every_form_and_geometry(name, geometry, always):
    form = KERNELS[name]()
    plain, other = both(nn.Conv2d(8, 12, (3, 5), **GEOMETRIES[geometry]), form, batch=torch.randn(1, 8, 11, 13))
    assert factored(other)["site"].as_factors and list(kernels_of(other)) != ["none (decoded while running)"]
    for shape in ((2, 8, 11, 13), (8, 12, 14)):
        x = torch.randn(shape)
        close(other(x), plain(x))


@torch.inference_mode()
def test_convolutions_of_one_and_three_axes(always):
    cases = [
        (nn.Conv1d(6, 10, 4, stride=2, padding=3), (2, 6, 15), 24),
        (nn.Conv1d(6, 10, 4, padding="same", dilation=2), (2, 6, 15), 24),
        (nn.Conv3d(6, 10, 2, stride=(1, 2, 1), padding=1), (2, 6, 5, 4, 3), 48),
    ]
    for module, shape, columns in cases:
        for form in (LowRank(dense(10, 3), dense(3, columns)), GroupedLowRank(dense(10, 6), dense(6, columns // 3), 3)):
            x = torch.randn(shape)
            plain, other = both(copy.deepcopy(module), form, batch=x)
            close(other(x), plain(x))


REFUSED = {
    "in groups": (nn.Conv2d(16, 12, 3, groups=2), LowRank(dense(12, 2), dense(2, 72)), "groups"),
    "groups that cut a channel": (nn.Conv2d(3, 12, 2), GroupedLowRank(dense(12, 6), dense(6, 2), 6), "not convolutions"),
    "tensor train": (
        nn.Conv2d(3, 8, 2), TensorTrain((dense(8, 2), dense(12, 1)), (2, 4), (4, 3), 8, 12), "not convolutions"
    ),
    "filter by filter": (
        nn.Conv2d(3, 8, 2), Folded(GroupedLowRank(dense(4, 8), dense(8, 3), 8), "filter", (3, 2, 2)), "not convolutions"
    ),
    "groups that cut a filter": (
        nn.Conv2d(3, 8, 2), Folded(GroupedLowRank(dense(6, 16), dense(16, 1), 16), "spatial", (3, 2, 2)),
        "not convolutions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@torch.inference_mode()
def test_what_is_no_convolution_of_its_own_is_multiplied_out(name, always):
    module, form, word = REFUSED[name]
    x = torch.randn(2, module.in_channels, 6, 6)
    plain, other = both(module, form, batch=x)
    choice = factored(other)["site"]
    assert not choice.as_factors and choice.seconds is None and word in choice.reason
    assert type(other.weight) is nn.Parameter and not isinstance(other.weight.data, PackedWeight)
    assert torch.equal(other(x), plain(x))


def test_the_measured_times_decide():
    x = torch.randn(256, 1024)
    thin = LowRank(dense(1024, 4), dense(4, 1024))
    thick = LowRank(dense(1024, 1024), dense(1024, 1024))
    for form, expected in ((thin, True), (thick, False)):
        _, other = both(nn.Linear(1024, 1024), form, batch=x)
        choice = factored(other)["site"]
        assert choice.as_factors is expected and isinstance(other.weight.data, PackedWeight) is expected
        assert (choice.seconds["factors"] < choice.seconds["dense"]) is expected
        assert ("not to be" in choice.reason) is not expected


def test_the_measured_times_decide_of_convolutions():
    x = torch.randn(4, 64, 16, 16)
    for rank, expected in ((4, True), (64, False)):
        for form in (
            LowRank(dense(64, rank), dense(rank, 576)),
            Folded(LowRank(dense(192, 3 * rank), dense(3 * rank, 192)), "spatial", (64, 3, 3)),
        ):
            plain, other = both(nn.Conv2d(64, 64, 3, padding=1), form, batch=x)
            assert factored(other)["site"].as_factors is expected
            assert not isinstance(plain.weight.data, PackedWeight)


def test_a_shape_and_form_are_measured_once(monkeypatch):
    calls = []
    monkeypatch.setattr(factors, "_measure", lambda *args: calls.append(args) or {"factors": 1.0, "dense": 2.0})
    module = nn.Sequential(*(nn.Linear(24, 24) for _ in range(4)))
    made = [LowRank(dense(24, 3), dense(3, 24)) for _ in range(3)] + [LowRank(dense(24, 4), dense(4, 24))]
    sites = [(f"{k}.weight", [f"{k}.weight"], form, Layout()) for k, form in enumerate(made)]
    run_as_factors(module, sites, torch.randn(5, 24))
    assert len(calls) == 2
    run_as_factors(
        nn.Sequential(copy.deepcopy(module[0])), [("0.weight", ["0.weight"], made[0], Layout())], torch.randn(9, 24)
    )
    assert len(calls) == 3, "another batch is another measurement"


def test_what_cannot_be_measured_stays_dense(always):
    form = LowRank(dense(12, 2), dense(2, 120))
    _, other = both(nn.Conv2d(8, 12, (3, 5)), form)
    assert "no batch" in factored(other)["site"].reason

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(24, 40), nn.Linear(24, 40)

        def forward(self, x):
            return self.used(x)

    idle, matrix = Idle(), MATRICES["low rank"]()
    run_as_factors(idle, [(n, [f"{n}.weight"], matrix, Layout()) for n in ("used", "idle")], torch.randn(2, 24))
    found = factored(idle)
    assert found["used"].as_factors and "does not run it" in found["idle"].reason
    attention = nn.MultiheadAttention(24, 2)
    run_as_factors(attention, [("in", ["in_proj_weight"], LowRank(dense(72, 3), dense(3, 24)), Layout())])
    assert "MultiheadAttention" in factored(attention)["in"].reason
    assert factored(nn.Linear(2, 2)) == {}


def test_loading_measures_in_evaluation_mode_and_leaves_the_mode_alone(always):
    module = nn.Sequential(nn.Linear(24, 40), nn.BatchNorm1d(40), nn.Dropout())
    module[1].eval()
    before = copy.deepcopy(module.state_dict())
    run_as_factors(module, [("0.weight", ["0.weight"], MATRICES["low rank"](), Layout())], torch.randn(4, 24))
    assert [part.training for part in module] == [True, False, True]
    assert torch.equal(module[1].running_mean, before["1.running_mean"])


@torch.inference_mode()
def test_tied_weights_share_their_factors(always):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(40, 24), nn.Linear(24, 40, bias=False)
            self.head.weight = self.table.weight

        def forward(self, index):
            return self.head(self.table(index))

    module, form = Tied(), LowRank(dense(40, 3), dense(3, 24))
    module.table.weight.copy_(form.dense())
    index = torch.randint(0, 40, (2, 3))
    expected = module(index)
    run_as_factors(module, [("table.weight", ["table.weight", "head.weight"], form, Layout())], index)
    assert module.table.weight is module.head.weight and isinstance(module.head.weight.data, PackedWeight)
    close(module(index), expected)
    assert held_bytes(module) == 4 * 3 * (40 + 24)


def test_copies_casts_and_state(always):
    form = KERNELS["spatial"]()
    x = torch.randn(2, 8, 9, 9)
    plain, other = both(nn.Conv2d(8, 12, (3, 5), padding=1), form, batch=x)
    again = copy.deepcopy(other)
    with torch.inference_mode():
        assert torch.equal(again(x), other(x)) and factored(again) == factored(other)
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            cast = copy.deepcopy(other).to(dtype)
            assert isinstance(cast.weight.data, PackedWeight) and cast.weight.dtype == dtype
            close(cast(x.to(dtype)).float(), plain(x), rtol=2e-2)
    state = other.state_dict()
    assert list(state) == ["weight", "bias"] and tuple(state["weight"].shape) == (12, 8, 3, 5)
    fresh = nn.Conv2d(8, 12, (3, 5), padding=1)
    fresh.load_state_dict(state)
    close(fresh.weight.detach(), plain.weight.detach())
    other.half()
    assert other(x.half()).dtype == torch.float16


def test_factors_of_a_module_in_half_precision(always):
    module = nn.Linear(24, 40).bfloat16()
    plain, other = both(module, MATRICES["low rank"](), batch=torch.randn(2, 24).bfloat16())
    x = torch.randn(5, 24).bfloat16()
    assert other.weight.dtype == torch.bfloat16
    close(other(x), plain(x), rtol=3e-2)


def test_parts_are_decoded_once():
    kernel = FactorKernel(MATRICES["low rank"](), (40, 24))
    assert all(part.dtype == torch.float32 for part in kernel.tensors())
    assert kernel.form.left.dense() is kernel.form.left.weight
    # Stages of a convolution are views of the same numbers where no order is changed.
    kernel = FactorKernel(KERNELS["low rank"](), (12, 8, 3, 5))
    assert len({part.data_ptr() for part in kernel.tensors()}) == 2


def test_an_artifact_runs_as_factors(tmp_path, always):
    def make():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 64),
            nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip

    batches = [torch.randn(16, 8, 12, 12) for _ in range(2)]
    octavo.compress(make(), ratio=8, data=batches, objective="squared", methods=["svd"], preset="fast").save(
        tmp_path / "a", report=False
    )
    plain, other = (
        octavo.load(tmp_path / "a", make()),
        octavo.load(tmp_path / "a", make(), factors=True, batch=batches[0]),
    )
    found = factored(other)
    assert set(found) == {"0.weight", "4.weight", "6.weight"} and all(choice.as_factors for choice in found.values())
    with torch.inference_mode():
        close(other.eval()(batches[1]), plain.eval()(batches[1]), rtol=1e-3)
    without = factored(octavo.load(tmp_path / "a", make(), factors=True))
    assert [name for name, choice in without.items() if not choice.as_factors] == ["0.weight"]


def test_a_transformers_artifact_runs_as_factors(tmp_path, always):
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    batches = [{"input_ids": torch.randint(0, 64, (8, 6))} for _ in range(2)]
    octavo.compress(tmp_path / "bert", ratio=3, data=batches, methods=["svd"], preset="fast").save(
        tmp_path / "a", report=False
    )
    plain, other = octavo.load(tmp_path / "a"), octavo.load(tmp_path / "a", factors=True, batch=batches[0])
    assert sum(choice.as_factors for choice in factored(other).values()) >= 6
    with torch.inference_mode():
        close(other(**batches[0]).last_hidden_state, plain(**batches[0]).last_hidden_state, rtol=1e-3)


class Small(nn.Module):
    """Tied tables and two layers, of which every weight is of rank 2."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.up, self.down = nn.Embedding(96, 32, padding_idx=0), nn.Linear(32, 128), nn.Linear(128, 32)
        self.head = nn.Linear(32, 96, bias=False)
        self.head.weight = self.table.weight
        with torch.no_grad():
            for layer in (self.table, self.up, self.down):
                rows, columns = layer.weight.shape
                layer.weight.copy_(torch.randn(rows, 2) @ torch.randn(2, columns) / columns**0.5)

    def forward(self, index):
        x = self.table(index)
        return self.head(x + self.down(self.up(x).relu()))


@pytest.fixture
def saved(tmp_path):
    """Two artifacts of one architecture, the first all factors."""
    for name, seed, methods in (("a", 1, ["svd"]), ("b", 2, ["entropy"])):
        octavo.compress(Small(seed), ratio=4, methods=methods, preset="fast").save(tmp_path / name)
    return tmp_path


INDEX = torch.arange(1, 25).reshape(4, 6)


def test_another_artifact_is_loaded_into_factors(saved, always):
    module = octavo.load(saved / "a", Small(), factors=True)
    assert all(choice.as_factors for choice in factored(module).values()) and len(factored(module)) == 3
    module = octavo.load(saved / "b", module)
    assert factored(module) == {} and not any(isinstance(part, PackedWeight) for part in module.parameters())
    assert module.head.weight is module.table.weight and module.up.weight.requires_grad
    assert torch.equal(module(INDEX), octavo.load(saved / "b", Small())(INDEX))
    again = octavo.load(saved / "a", module, factors=True)
    assert torch.equal(again(INDEX), octavo.load(saved / "a", Small(), factors=True)(INDEX))


def test_factors_cannot_be_changed_in_place(saved, always):
    module = octavo.load(saved / "a", Small(), factors=True)
    before = module(INDEX)

    def assign():
        module.up.weight[0] = 1.0

    changes = [
        lambda: nn.init.zeros_(module.up.weight), lambda: module.up.weight.data.mul_(2), assign,
        lambda: torch.add(torch.ones(128, 32), 1, out=module.up.weight.data),
    ]  # fmt: skip
    for change in changes:
        with torch.no_grad(), pytest.raises(RequestError, match=r"\(128, 32\) cannot be changed in place"):
            change()
    assert torch.equal(module(INDEX), before)
    with pytest.raises(RuntimeError, match="cannot be changed in place"):
        module.load_state_dict(Small().state_dict())


def test_the_state_of_factors_is_dense(saved, always, tmp_path):
    module = octavo.load(saved / "a", Small(), factors=True)
    whole = nn.Sequential(module)
    state = whole.state_dict()
    assert all(type(part) is torch.Tensor for part in state.values()) and held_bytes(module) < held_bytes(Small())
    assert state["0.table.weight"].data_ptr() == state["0.head.weight"].data_ptr()
    assert type(module.up.state_dict()["weight"]) is torch.Tensor
    torch.save(state, tmp_path / "state")
    plain = nn.Sequential(Small())
    plain.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    close(whole(INDEX), plain(INDEX))
    save_file({name: part for name, part in state.items() if "head" not in name}, tmp_path / "s.safetensors")
    assert copy.deepcopy(module).half().state_dict()["up.weight"].dtype == torch.float16


def test_factors_stay_on_the_cpu_and_in_their_process(saved, always):
    module = octavo.load(saved / "a", Small(), factors=True)
    with pytest.raises(RequestError, match="runs on a CPU, not on meta"):
        copy.deepcopy(module).to("meta")
    with pytest.raises(RequestError, match="no storage to share"):
        module.share_memory()


def test_tables_of_factors_compile(saved, always):
    module = octavo.load(saved / "a", Small(), factors=True).eval()
    with torch.no_grad():
        close(torch.compile(module, backend="eager")(INDEX), module(INDEX))


def test_indices_outside_of_a_table_are_refused(always):
    _, table = both(nn.Embedding(40, 24), MATRICES["low rank"]())
    for index in (40, -1):
        with pytest.raises(IndexError, match="table of 40 rows"):
            table(torch.tensor([3, index]))
    assert table(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 24)


@torch.inference_mode()
def test_no_inputs_at_all(always):
    for name in MATRICES:
        _, other = both(nn.Linear(24, 40), MATRICES[name]())
        assert other(torch.ones(3, 0, 24)).shape == (3, 0, 40)


class OtherForward(nn.Linear):
    def forward(self, x, scale):
        return super().forward(x) * scale


class Unusual(Small):
    """A layer that takes more than its input, inputs by keyword, and a tensor that is kept from the first call."""

    def __init__(self):
        super().__init__()
        self.up, self.kept = OtherForward(32, 128), None

    def forward(self, index):
        x = self.table(input=index)
        if self.kept is None:
            self.kept = torch.ones(32)
        return self.head(input=x + self.kept * self.down(input=self.up(x, 2.0).relu()))


def test_unusual_modules_are_measured_where_they_can_be(saved):
    for batch in (INDEX, None):
        module = octavo.load(saved / "a", Unusual(), factors=True, batch=batch)
        found = factored(module)
        assert "OtherForward" in found["up.weight"].reason
        assert all(found[name].seconds for name in ("table.weight", "down.weight"))
    octavo.load(saved / "a", module, factors=True, batch=INDEX)
    module.down.weight = nn.Parameter(module.down.weight.detach().clone())
    module(INDEX).sum().backward()


def test_a_batch_that_does_not_fit_is_named(saved):
    for batch in (torch.randn(3, 3), {"x": INDEX}):
        with pytest.raises(RequestError, match=r"Small fails on (the|a) batch"):
            octavo.load(saved / "a", Small(), factors=True, batch=batch)


def test_factors_that_are_far_slower_are_not_measured_for_long():
    calls = []

    class Count(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.extend([func] if func is nn.functional.linear else [])
            return func(*args, **(kwargs or {}))

    module = nn.Linear(256, 256)
    with Count():
        run_as_factors(
            module, [("site", ["weight"], LowRank(dense(256, 4096), dense(4096, 256)), Layout())], torch.ones(64, 256)
        )
    choice = factored(module)["site"]
    assert not choice.as_factors and choice.seconds["factors"] > choice.seconds["dense"] and len(calls) < 10


def test_a_description_without_end_is_refused(saved):
    manifest = saved / "a" / "octavo.json"
    content = json.loads(manifest.read_bytes())
    nested = {}
    for _ in range(600):
        nested = {"inner": nested}
    next(iter(content["sites"].values()))["form"]["more"] = nested
    del content["sha256"]
    rest = json.dumps(content).encode()[1:]
    manifest.write_bytes(b'{"sha256":"' + hashlib.sha256(rest).hexdigest().encode() + b'",' + rest)
    with pytest.raises(ArtifactError, match="more"):
        octavo.load(saved / "a", Small(), factors=True)


def test_requests_that_make_no_sense_are_refused(tmp_path):
    octavo.compress(nn.Linear(64, 64), ratio=4, preset="data-free").save(tmp_path / "a", report=False)
    with pytest.raises(RequestError, match="into="):
        octavo.load(tmp_path / "a", factors=True)
    with pytest.raises(RequestError, match="packed"):
        octavo.load(tmp_path / "a", nn.Linear(64, 64), factors=True, packed=True)
    assert factored(octavo.load(tmp_path / "a", nn.Linear(64, 64), factors=True)) == {}
