"""Modules that are more than layers: hooks of the state dict, extra state, masks, odd dtypes, and those without content."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import octavo
from octavo.sources.modules import own_tensors, state_of
from octavo.system.raw import raw_bytes

DATA = [torch.randn(48, 64, generator=torch.Generator().manual_seed(1))]


def round_trip(make, folder, ratio=3, data=DATA, recorded=False):
    """A module compressed and saved, and a fresh one of its class with what was read back."""
    torch.manual_seed(0)
    module = make()
    request = {"preset": "data-free"} if data is None else {"preset": "fast", "data": data, "objective": "squared"}
    done = octavo.compress(module, ratio=ratio, **request)
    report = done.save(folder / "out", overwrite=True, report=recorded)
    torch.manual_seed(9)
    return module, octavo.load(folder / "out", into=make()), done, report


def check_measured(module, loaded, done, report):
    """All was calibrated and measured, and the loaded module is the one that was measured."""
    assert not [note for note in report["calibration"]["warnings"] if "typical" in note]
    module.eval(), loaded.eval()
    (batch,) = done.opened.held_data
    with torch.no_grad():
        old, new = module(batch), loaded(batch)
    error = float((old - new).double().square().mean() / old.double().square().mean())
    assert 0 < error < 0.2 and report["quality"]["value"] == pytest.approx(error, rel=1e-3)
    assert done.built.quality == pytest.approx(error, rel=1e-3)


# Hooks of the state dict.


def renaming(module, state, prefix, _):
    for name in list(state):
        state["model." + name] = state.pop(name)


class Renamed(nn.Sequential):
    """Saves under other names than it loads."""

    def __init__(self):
        super().__init__(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 32))
        self.register_state_dict_post_hook(renaming)


class RenamedBack(Renamed):
    """Saves under other names, and knows them when it loads."""

    def __init__(self):
        super().__init__()
        self.register_load_state_dict_pre_hook(self.back)

    @staticmethod
    def back(module, state, prefix, *_):
        for name in list(state):
            state[name.removeprefix("model.")] = state.pop(name)


class StrictlyBack(Renamed):
    """The same, with a hook that fails on names that it does not expect."""

    def __init__(self):
        super().__init__()
        self.register_load_state_dict_pre_hook(self.back)

    @staticmethod
    def back(module, state, prefix, *_):
        for name in ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"):
            state[name] = state.pop("model." + name)


class Fused(nn.Module):
    """One matrix, saved as three that a loader may join again."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 96), nn.Linear(32, 32)
        self.register_state_dict_post_hook(self.part)

    @staticmethod
    def part(module, state, prefix, _):
        for name, piece in zip("qkv", state.pop(prefix + "qkv.weight").chunk(3), strict=True):
            state[f"{prefix}{name}.weight"] = piece

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(torch.tanh(q) * k + v)


class Copying(Renamed):
    """A hook that gives copies, as those of sharded modules do."""

    def __init__(self):
        nn.Sequential.__init__(self, nn.Linear(64, 64), nn.Linear(64, 32))
        self.register_state_dict_post_hook(
            lambda module, state, prefix, _: state.update({name: value.clone() for name, value in state.items()})
        )


class Partial(nn.Module):
    """Its state dict leaves out what is loaded from elsewhere."""

    def __init__(self):
        super().__init__()
        self.frozen, self.layer = nn.Linear(64, 64), nn.Linear(64, 32)
        nn.init.eye_(self.frozen.weight), nn.init.zeros_(self.frozen.bias)
        self.register_state_dict_post_hook(
            lambda module, state, prefix, _: [state.pop(name) for name in list(state) if "frozen" in name] and None
        )

    def forward(self, x):
        return self.layer(self.frozen(x))


@pytest.mark.parametrize("make", [Renamed, RenamedBack, StrictlyBack, Fused, Copying, Partial])
def test_hooks_of_the_state_dict(make, tmp_path):
    check_measured(*round_trip(make, tmp_path))


def test_names_are_those_that_the_class_loads(tmp_path):
    _, loaded, _, _ = round_trip(RenamedBack, tmp_path)
    state, fresh = octavo.load(tmp_path / "out"), RenamedBack()
    assert "model.0.weight" in state
    fresh.load_state_dict(state)
    assert torch.equal(fresh[0].weight, loaded[0].weight)


def test_what_a_state_dict_leaves_out_is_told(tmp_path):
    *_, done, _ = round_trip(Partial, tmp_path)
    assert any("leaves out 2 of its tensors (frozen.weight" in note for note in done.opened.notes)


class Outside(nn.Module):
    """Keeps parts where no state dict sees them."""

    def __init__(self, place):
        super().__init__()
        self.layer, self.list = nn.Linear(64, 64), nn.ModuleList([nn.Linear(64, 64)])
        self.same = [self.layer]
        setattr(self, *place())

    def forward(self, x):
        return self.list[0](self.layer(x))


@pytest.mark.parametrize(
    ("place", "told"),
    [
        (lambda: ("parts", [nn.Linear(64, 64)]), True),
        (lambda: ("parts", {"a": nn.Linear(64, 64)}), True),
        (lambda: ("parts", torch.randn(64, 64)), True),
        (lambda: ("parts", [1, nn.ReLU()]), False),
    ],
)
def test_what_no_state_dict_sees_is_told(place, told, tmp_path):
    *_, done, _ = round_trip(lambda: Outside(place), tmp_path)
    assert any("parts are not in its state dict" in note for note in done.opened.notes) is told
    assert not any("same" in note for note in done.opened.notes)


def test_tensors_that_find_no_place_are_an_error(tmp_path):
    round_trip(Renamed, tmp_path)
    for other in (nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64)), nn.ModuleDict({"model": nn.Linear(64, 63)})):
        with pytest.raises(octavo.ArtifactError, match="does not fit"):
            octavo.load(tmp_path / "out", into=other)


def test_renamed_modules_run_packed(tmp_path):
    torch.manual_seed(0)
    octavo.compress(Renamed(), ratio=3, data=DATA, preset="fast", objective="squared", target="memory").save(
        tmp_path / "out", report=False
    )
    packed, dense = (octavo.load(tmp_path / "out", into=Renamed(), packed=flag).eval() for flag in (True, False))
    with torch.no_grad():
        torch.testing.assert_close(packed(DATA[0]), dense(DATA[0]), rtol=0.05, atol=0.05)


class Reserved(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_parameter("__metadata__", nn.Parameter(torch.randn(64, 32) / 8))
        self.register_buffer("__metadata", torch.ones(3))

    def forward(self, x):
        return x @ self.__metadata__


def test_the_name_that_files_keep_for_themselves(tmp_path):
    check_measured(*round_trip(Reserved, tmp_path, ratio=1.5, recorded=True))
    assert set(octavo.load(tmp_path / "out")) == {"__metadata__", "__metadata"}
    assert octavo.verify(tmp_path / "out").weights_match


# Extra state.


def with_state(state, takes=True):
    class Kept(nn.Linear):
        def __init__(self):
            super().__init__(64, 32)
            self.got = "nothing"

        def get_extra_state(self):
            return state

        if takes:

            def set_extra_state(self, state):
                self.got = state

    return Kept


PLAIN = [{"step": 3}, None, [1, 2.5, "a", {"b": None}], "text \ud800", 7, {}]
OTHER = [b"bytes", (1, 2), {1: 2}, math.nan, object(), {"t": torch.ones(2)}]


@pytest.mark.parametrize("state", PLAIN, ids=repr)
def test_plain_extra_state_comes_back(state, tmp_path):
    make = with_state(state)
    module, loaded, done, report = round_trip(make, tmp_path)
    check_measured(module, loaded, done, report)
    assert loaded.got == state and type(loaded.got) is type(state)
    assert octavo.load(tmp_path / "out")["_extra_state"] == state
    assert done.opened.notes == []


@pytest.mark.parametrize("state", OTHER, ids=lambda state: type(state).__name__)
def test_other_extra_state_is_left_out_and_told(state, tmp_path):
    make = with_state(state)
    module, loaded, done, report = round_trip(make, tmp_path)
    check_measured(module, loaded, done, report)
    assert loaded.got == "nothing"
    assert any("_extra_state" in note and "not stored" in note for note in done.opened.notes)


@pytest.mark.parametrize(
    "state",
    [torch.empty(0), torch.arange(9, dtype=torch.uint8), torch.ones(40, 40) / 3, torch.tensor(2.5)],
    ids=["empty", "bytes", "matrix", "scalar"],
)
def test_tensors_as_extra_state_come_back_bit_for_bit(state, tmp_path):
    _, loaded, _, _ = round_trip(with_state(state), tmp_path, ratio=1, data=None)
    assert torch.equal(loaded.got, state) and loaded.got.dtype == state.dtype


@pytest.mark.parametrize("state", [{"step": 3}, b"x", torch.ones(3)], ids=["plain", "bytes", "tensor"])
def test_extra_state_that_nobody_takes_back(state, tmp_path):
    check_measured(*round_trip(with_state(state, takes=False), tmp_path))


def test_extra_state_that_the_module_refuses_is_an_error(tmp_path):
    round_trip(with_state({"step": 3}), tmp_path)

    class Picky(nn.Linear):
        def get_extra_state(self):
            return 1

        def set_extra_state(self, state):
            raise KeyError("version")

    with pytest.raises(octavo.ArtifactError, match=r"does not fit Picky.*version"):
        octavo.load(tmp_path / "out", into=Picky(64, 32))


# Dtypes and values.


def buffered(value):
    def make():
        module = nn.Linear(64, 32)
        module.register_buffer("extra", value.clone())
        return module

    return make


def randoms(dtype):
    bits = torch.randint(0, 256, (5 * 7 * max(dtype.itemsize, 1),), generator=torch.Generator().manual_seed(2))
    return bits.to(torch.uint8).view(dtype).reshape(5, 7)


NAMES = [
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "complex32"),
    *("complex64", "complex128", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"),
    *("float8_e5m2fnuz", "float8_e8m0fnu"),
]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_comes_back_bit_for_bit(name, tmp_path):
    """Random bits: NaN of every payload among them."""
    dtype = getattr(torch, name, None)
    if dtype is None:
        pytest.skip(f"this torch has no {name}")
    value = randoms(dtype)
    _, loaded, _, _ = round_trip(buffered(value), tmp_path, ratio=2, data=None, recorded=True)
    assert loaded.extra.dtype == dtype and raw_bytes(loaded.extra) == raw_bytes(value)
    found = octavo.load(tmp_path / "out")["extra"]
    assert found.dtype == dtype and found.shape == value.shape and raw_bytes(found) == raw_bytes(value)
    assert octavo.verify(tmp_path / "out").weights_match


@pytest.mark.parametrize("shape", [(), (0, 3), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.complex128, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint64], ids=str)
def test_odd_dtypes_of_any_shape(dtype, shape, tmp_path):
    value = torch.ones(shape).to(dtype)
    _, loaded, _, _ = round_trip(buffered(value), tmp_path, ratio=1, data=None)
    assert loaded.extra.shape == value.shape and raw_bytes(loaded.extra) == raw_bytes(value)


def test_safetensors_reads_what_it_has_a_name_for(tmp_path):
    from safetensors import safe_open

    for dtype in (torch.complex64, torch.uint16, torch.float8_e5m2):
        value = torch.ones(5, 7).to(dtype)
        round_trip(buffered(value), tmp_path, data=None)
        with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
            assert raw_bytes(file.get_tensor("extra")) == raw_bytes(value)


MASKS = {
    "small": torch.triu(torch.full((8, 8), -math.inf), 1),
    "large": torch.triu(torch.full((96, 96), -math.inf), 1),
    "least float": torch.triu(torch.full((96, 96), torch.finfo(torch.float32).min), 1),
    "with inf": torch.randn(40, 40).masked_fill(torch.eye(40).bool(), math.inf),
    "with nan": torch.randn(40, 40).masked_fill(torch.eye(40).bool(), math.nan),
    "vector of nan": torch.full((64,), math.nan),
}


@pytest.mark.parametrize("preset", ["fast", "data-free"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_and_other_buffers_without_finite_values(name, preset, tmp_path):
    module, ratio = buffered(MASKS[name])(), 2.5 if "mask" in name or name in ("large", "least float") else 1.1
    data = {"data": DATA, "objective": "squared"} if preset == "fast" else {}
    octavo.compress(module, ratio=ratio, preset=preset, **data).save(tmp_path / "out", report=False)
    loaded = octavo.load(tmp_path / "out", into=buffered(MASKS[name])())
    assert raw_bytes(loaded.extra) == raw_bytes(MASKS[name])


def test_a_large_mask_takes_next_to_nothing(tmp_path):
    round_trip(buffered(MASKS["large"]), tmp_path, ratio=8, data=None)
    assert octavo.Artifact(tmp_path / "out")._tensors["extra"].length < 1000


def test_a_mask_in_a_file_is_no_weight(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.randn(64, 64), "mask": MASKS["large"]}, tmp_path / "bare.safetensors")
    octavo.compress(tmp_path / "bare.safetensors", ratio=4, preset="fast").save(tmp_path / "out", report=False)
    assert torch.equal(octavo.load(tmp_path / "out")["mask"], MASKS["large"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_small_frozen_parameter_may_be_anything(value, tmp_path):
    class Unused(nn.Linear):
        def __init__(self):
            super().__init__(64, 32)
            self.spare = nn.Parameter(torch.tensor([value, 1.0]), requires_grad=False)

    _, loaded, _, _ = round_trip(Unused, tmp_path)
    assert raw_bytes(loaded.spare) == raw_bytes(torch.tensor([value, 1.0]))
    octavo.compress(Unused(), ratio=3, data=DATA, objective="squared", preset="fast").save(
        tmp_path / "fitted", report=False
    )


def test_float8_weights_are_stored_as_they_are(tmp_path):
    class Eight(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter((torch.randn(64, 64) / 8).to(torch.float8_e4m3fn), requires_grad=False)
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            return self.layer(x @ self.weight.float())

    module, loaded, done, report = round_trip(Eight, tmp_path, ratio=2)
    check_measured(module, loaded, done, report)
    assert raw_bytes(loaded.weight) == raw_bytes(module.weight) and done.opened.left["weight"] == "float8_e4m3fn tensor"


# Modules without content.


def partly_meta():
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    module[1].to("meta")
    return module


def sparse():
    module = nn.Linear(64, 64)
    module.weight = nn.Parameter(module.weight.detach().to_sparse())
    return module


def quantized():
    module = nn.Linear(64, 64)
    module.register_buffer("codes", torch.quantize_per_tensor(torch.randn(8), 0.1, 0, torch.qint8))
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Linear(64, 64, device="meta"), "'weight' is on the meta device.*device_map"),
        (partly_meta, r"'1\.weight' is on the meta device"),
        (lambda: nn.Sequential(nn.LazyLinear(64)), r"'0\.weight' is not initialised.*once"),
        (lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.Linear(64, 64)), r"'0\.weight' is not initialised"),
        (lambda: torch.jit.script(nn.Linear(64, 64)), "scripted or traced.*eager"),
        (lambda: torch.jit.trace(nn.Linear(64, 64), torch.ones(1, 64)), "scripted or traced.*eager"),
        (lambda: nn.Sequential(torch.jit.script(nn.Linear(64, 64))), "scripted or traced"),
        (sparse, "'weight' has layout torch.sparse_coo"),
        (quantized, "'codes' has dtype torch.qint8"),
    ],
)
@pytest.mark.parametrize("data", [None, DATA], ids=["data-free", "data"])
def test_modules_without_content_are_refused(make, words, data):
    with pytest.raises(octavo.RequestError, match=words):
        octavo.compress(make(), ratio=2, data=data, preset="fast")


def test_lazy_modules_take_an_artifact(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64))
    octavo.compress(module, ratio=3, data=DATA, preset="fast").save(tmp_path / "out", report=False)
    loaded = octavo.load(tmp_path / "out", into=nn.Sequential(nn.LazyLinear(64)))
    assert torch.equal(loaded[0].weight, octavo.load(tmp_path / "out")["0.weight"])


# Modules of every kind.


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrices = nn.ParameterList([nn.Parameter(torch.randn(64, 64) / 8) for _ in range(3)])
        self.named = nn.ParameterDict({"last": nn.Parameter(torch.randn(64, 32) / 8)})

    def forward(self, x):
        for matrix in self.matrices:
            x = torch.tanh(x @ matrix)
        return x @ self.named["last"]


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(100, 32, mode="mean"), nn.Linear(32, 32)

    def forward(self, x):
        return self.head(self.bag((x.abs() * 20).long().clamp_max(99)))


class Shared(nn.Module):
    """One layer used three times, and two names of one parameter."""

    def __init__(self):
        super().__init__()
        layer = nn.Linear(64, 64)
        self.layers = nn.ModuleList([layer, layer, nn.Linear(64, 64)])
        self.layers[2].bias = layer.bias

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x)) + x
        return x


class Recurrent(nn.Module):
    """A recurrent layer over eight steps, whose states are averaged."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(48, 32)

    def forward(self, x):
        return self.head(self.layer(x.view(-1, 8, 8))[0].mean(1))


class Cells(nn.Module):
    """A cell that the module itself steps."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(8, 48), nn.Linear(48, 32)

    def forward(self, x):
        state = x.new_zeros(len(x), 48)
        for step in x.view(-1, 8, 8).unbind(1):
            state = self.cell(step, state)
        return self.head(state)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.body = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def forward(self, x):
        x = x.view(-1, 2, 32)
        return self.body(self.attention(x, x, x, need_weights=False)[0]).flatten(1)


class Reused(nn.Module):
    """A table that is a head as well, without a module that says so."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(100, 32)

    def forward(self, x):
        states = self.table((x.abs() * 20).long().clamp_max(99)).mean(1)
        return nn.functional.linear(states, self.table.weight)


class Volumes(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv3d(1, 16, 3, padding=1), nn.Conv3d(16, 32, 2, stride=2, groups=2)
        self.back = nn.ConvTranspose3d(32, 8, 2)

    def forward(self, x):
        x = torch.relu(self.first(x.view(-1, 1, 4, 4, 4)))
        return self.back(torch.relu(self.second(x))).flatten(1)


class Padded(nn.Conv1d):
    """A convolution that pads by itself before it runs."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (2, 0)))


class Custom(nn.Module):
    """Reads the weights of its layers itself, scaled."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x):
        return torch.tanh(x @ (0.5 * self.one.weight.t()) + self.one.bias) @ self.two.weight.t()


KINDS = {
    "lstm": lambda: Recurrent(nn.LSTM(8, 24, num_layers=2, bidirectional=True, batch_first=True)),
    "lstm with projection": lambda: Recurrent(nn.LSTM(8, 64, proj_size=48, batch_first=True)),
    "gru": lambda: Recurrent(nn.GRU(8, 48, batch_first=True)),
    "cells": Cells,
    "attention": Attending,
    "table as head": Reused,
    "volumes": Volumes,
    "own padding": lambda: nn.Sequential(nn.Unflatten(1, (4, 16)), Padded(4, 64, 3), nn.Flatten()),
    "custom": Custom,
    "parameter list": Listed,
    "embedding bag": Bag,
    "shared": Shared,
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(64, 64)), nn.Linear(64, 32)),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(64, 64)), nn.Linear(64, 32)),
    "old weight norm": lambda: nn.Sequential(weight_norm(nn.Linear(64, 64)), nn.Linear(64, 32)),
    "old spectral norm": lambda: nn.Sequential(spectral_norm(nn.Linear(64, 64)), nn.Linear(64, 32)),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_modules(name, tmp_path):
    check_measured(*round_trip(KINDS[name], tmp_path))


def test_ties_survive(tmp_path):
    _, loaded, _, _ = round_trip(Shared, tmp_path)
    assert loaded.layers[0] is loaded.layers[1] and loaded.layers[2].bias is loaded.layers[0].bias


def test_own_tensors_are_those_of_a_plain_state_dict():
    module = Shared()
    assert own_tensors(module).keys() == module.state_dict().keys()
    assert state_of(module).parameters == {name: name for name in module.state_dict()}
    assert json.dumps(state_of(module).extra) == "{}"


def compiled(module):
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize(
    ("given", "taking"), [(compiled, nn.DataParallel), (nn.DataParallel, lambda m: m), (lambda m: m, compiled)]
)
def test_wrappers_are_no_part_of_a_model(given, taking, tmp_path):
    def make():
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))

    torch.manual_seed(0)
    octavo.compress(given(make()), ratio=3, data=DATA, preset="fast", objective="squared").save(
        tmp_path / "out", report=False
    )
    plain, wrapped = octavo.load(tmp_path / "out", into=make()), octavo.load(tmp_path / "out", into=taking(make()))
    assert torch.equal(plain(DATA[0]), wrapped(DATA[0]))
