"""Several deltas on one base: merged into one model, and served in turn without a copy of the base."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import octavo
from octavo.errors import ArtifactError, RequestError


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base and two models tuned from it, the second with one weight more changed, with their deltas in 16 bits."""
    folder = tmp_path_factory.mktemp("many")
    base = net()
    save_file(base.state_dict(), folder / "base.safetensors")
    for number, name in enumerate(("one", "two")):
        tuned = deepcopy(base)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            tuned[0].weight += 0.01 * torch.randn(48, 32, generator=generator)
            tuned[2].weight += 0.01 * torch.randn(32, 48, generator=generator) * number
        save_file(tuned.state_dict(), folder / f"{name}.safetensors")
        choices = {"methods": ["keep"], "keep": {"*": "float16"}, "preset": "data-free"}
        octavo.compress(tuned, base=folder / "base.safetensors", size="1MB", **choices).save(folder / name)
    return folder


@pytest.fixture
def deltas(folder):
    return [folder / "one", folder / "two"]


def difference(folder, name, key):
    return load_file(folder / f"{name}.safetensors")[key] - load_file(folder / "base.safetensors")[key]


def test_a_sum_is_the_base_and_the_sum_of_differences(folder, deltas):
    state = octavo.merge(deltas, base=folder / "base.safetensors", how="sum", scale=0.5)
    base = load_file(folder / "base.safetensors")
    for key in ("0.weight", "2.weight"):
        wanted = base[key] + 0.5 * sum(difference(folder, name, key) for name in ("one", "two"))
        assert torch.allclose(state[key], wanted, atol=1e-5)
    assert torch.equal(state["0.bias"], base["0.bias"]) and set(state) == set(base)


def test_ties_trims_elects_and_averages(folder, deltas):
    merged = net()
    octavo.merge(deltas, merged, base=folder / "base.safetensors", keep=0.3)
    changes = {name: torch.cat([difference(folder, name, key).flatten() for key in ("0.weight", "2.weight")])
               for name in ("one", "two")}  # fmt: skip
    for name, stored in (("one", 48 * 32), ("two", 2 * 48 * 32)):
        # Only what a delta stores counts for its share.
        least = changes[name].abs().topk(round(0.3 * stored)).values.min()
        changes[name] = torch.where(changes[name].abs() >= 0.999 * least, changes[name], torch.zeros(()))
    both = torch.stack(list(changes.values()))
    agree = (both != 0) & (both.sign() == both.sum(0).sign())
    wanted = (both * agree).sum(0) / agree.sum(0).clamp_min(1)
    base = load_file(folder / "base.safetensors")
    found = torch.cat([(merged.state_dict()[key] - base[key]).flatten() for key in ("0.weight", "2.weight")])
    assert (found - wanted).abs().gt(1e-4).float().mean() < 0.01


def test_one_delta_whole_is_the_tuned_model(folder, deltas):
    state = octavo.merge(deltas[1:], base=folder / "base.safetensors", how="ties", keep=1)
    tuned = load_file(folder / "two.safetensors")
    assert all(torch.allclose(state[key], tuned[key], atol=5e-5) for key in tuned)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"how": "mean"}, "choose from sum, ties"),
        ({"keep": 0}, "above 0 and at most 1"),
        ({"keep": 2}, "at most 1"),
        ({"how": "sum", "keep": 0.2}, "how='sum' keeps all changes; leave keep out"),
        ({"scale": "2"}, "scale is '2'; give a number"),
        ({"keep": "0.2"}, "keep is '0.2'; give a share"),
        ({"scale": float("nan")}, "scale is nan, with which differences are not finite"),
        ({"how": "sum", "scale": float("inf")}, "scale is inf, with"),
        ({"scale": 1e300}, r"scale is 1e\+300, with"),
    ],
)
def test_choices_of_a_merge_are_checked(folder, deltas, how, said):
    with pytest.raises(RequestError, match=said):
        octavo.merge(deltas, base=folder / "base.safetensors", **how)


def test_what_is_no_delta_of_the_base_is_not_merged(folder, deltas, tmp_path):
    with pytest.raises(RequestError, match="at least one"):
        octavo.merge([], base=folder / "base.safetensors")
    octavo.compress(net(), ratio=3, preset="data-free", methods=["rtn"]).save(tmp_path / "whole")
    with pytest.raises(RequestError, match="is no delta"):
        octavo.merge([*deltas, tmp_path / "whole"], base=folder / "base.safetensors")
    with pytest.raises(ArtifactError, match="another model"):
        octavo.merge(deltas, base=folder / "one.safetensors")
    narrow = nn.Sequential(nn.Linear(32, 40), nn.ReLU(), nn.Linear(40, 32))
    before = deepcopy(narrow.state_dict())
    with pytest.raises(ArtifactError, match="does not fit"):
        octavo.merge(deltas, narrow, base=folder / "base.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in narrow.state_dict().items())


def test_deltas_are_served_in_turn_and_the_base_comes_back_bit_for_bit(folder, deltas):
    model, base = net(), load_file(folder / "base.safetensors")
    held = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    served = octavo.Deltas(model, dict(zip(("one", "two"), deltas, strict=True)), base=folder / "base.safetensors")
    for name in ("one", "two", "one", None, "two"):
        assert served.use(name) is model and served.active == name
        wanted = base if name is None else octavo.load(folder / name, base=folder / "base.safetensors")
        assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
    assert held == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with pytest.raises(RequestError, match="'three' is not one of the deltas; choose from 'one', 'two'"):
        served.use("three")


def test_the_tensors_of_a_model_are_listed_once_for_a_switch(folder, deltas):
    class Counted(nn.Sequential):
        calls = 0

        def named_parameters(self, *args, **options):
            self.calls += 1
            return super().named_parameters(*args, **options)

    model = Counted(*net())
    served = octavo.Deltas(model, {"one": deltas[0], "two": deltas[1]}, base=folder / "base.safetensors")
    for name in ("two", "one", None):
        model.calls = 0
        served.use(name)
        assert model.calls == 1


def test_a_damaged_delta_leaves_the_base(folder, deltas):
    model, base = net(), load_file(folder / "base.safetensors")
    served = octavo.Deltas(model, {"one": deltas[0], "two": deltas[1]}, base=folder / "base.safetensors")
    served.use("one")
    file = deltas[1] / "model.safetensors"
    sound = file.read_bytes()
    try:
        file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        with pytest.raises(ArtifactError, match="damaged"):
            served.use("two")
    finally:
        file.write_bytes(sound)
    assert served.active is None
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())


def test_a_model_that_is_not_the_base_is_not_served(folder, deltas):
    other = net()
    other[2].bias.data += 1
    with pytest.raises(RequestError, match=r"the model's '2.bias' is not that of the base 'base'; load the base"):
        octavo.Deltas(other, {"one": deltas[0]}, base=folder / "base.safetensors")
    with pytest.raises(RequestError, match="a second copy in memory"):
        octavo.Deltas(net(), {"one": deltas[0]}, base=net())
    with pytest.raises(RequestError, match="which Linear lacks"):
        octavo.Deltas(nn.Linear(3, 3), {"one": deltas[0]}, base=folder / "base.safetensors")


def test_deltas_name_no_place(deltas, folder):
    assert str(folder) not in (deltas[0] / "octavo.json").read_text()
    assert json.loads((deltas[0] / "octavo.json").read_text())["base"]["title"] == "base"
