"""Formats that are searched while a net trains."""

import pytest
import torch
from torch import nn

import octavo
from octavo.errors import RequestError
from octavo.training import FormatSearch, fit
from octavo.training.number_formats import NumberFormat

BATCHES = [(torch.randn(64, 16, generator=torch.Generator().manual_seed(k)),) for k in range(8)]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def task(model, batch):
    """The sum of the inputs, four times."""
    return (model(batch[0]) - batch[0].sum(1, keepdim=True) / 4).square().mean()


def mean_bits(model, chosen):
    sizes = {name: tensor.numel() for name, tensor in net().named_parameters() if name in chosen}
    return sum(NumberFormat(chosen[name]).bits * size for name, size in sizes.items()) / sum(sizes.values())


@pytest.mark.parametrize("bits", [4.5, 7.0])
def test_the_search_ends_near_the_bits_that_were_asked_for(bits):
    model, search = net(), FormatSearch(("int4", "int6", "int8"), bits, pressure=10, rate=0.2, entropy=0.5)
    fit(model, lambda epoch: BATCHES, task, epochs=60, regimen=search)
    assert abs(mean_bits(model, search.chosen) - bits) < 1
    assert search.certainty > 0.8


def test_what_was_searched_is_saved_and_loaded(tmp_path):
    model, search = net(), FormatSearch(("e2m1", "e4m3"))
    fit(model, lambda epoch: BATCHES, task, epochs=5, regimen=search)
    octavo.save((model, search.forms(model)), tmp_path / "net", dtype=torch.float32)
    loaded, batch = octavo.load(tmp_path / "net", into=net()).eval(), BATCHES[0][0]
    assert torch.allclose(loaded(batch), model.eval()(batch), atol=1e-6)


def test_assigned_formats_are_not_searched():
    model = net()
    search = FormatSearch(("int4", "int8"), assigned={"0.weight": "e4m3"})
    fit(model, lambda epoch: BATCHES, task, regimen=search)
    assert search.chosen["0.weight"] == "e4m3"
    assert {search.chosen["2.weight"], search.chosen["4.weight"]} <= {"int4", "int8"}


@pytest.mark.parametrize("name", ["int2", "int5", "int8", "e2m1", "e3m2", "e4m3", "e5m2"])
def test_a_format_has_no_more_values_than_its_bits_allow(name):
    matrix = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0))
    matrix[3] = 0
    matrix[4, 0] = 1e4
    form, chosen = NumberFormat(name).form(matrix), NumberFormat(name)
    assert all(len(row.unique()) <= 2**chosen.bits for row in form.dense())
    assert bool((form.dense()[3] == 0).all())
    assert form.dense()[4, 0] == pytest.approx(1e4, rel=1e-3)
    # Nothing is clipped: each error is below half of the largest distance of neighbouring values.
    largest = matrix.abs().amax(1, keepdim=True)
    assert bool(((form.dense() - matrix).abs() <= largest * (0.51 if name == "int2" else 0.2)).all())


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({"formats": ()}, "give at least one"),
        ({"formats": ("int9",)}, "int9"),
        ({"formats": ("fp8",)}, "choose int2 to int8"),
        ({"formats": "int4"}, r"one as \('int4',\)"),
        ({"formats": (4, 8)}, "4 is not known"),
        ({"bits": 9.0}, "the formats have 4 to 8"),
        ({"bits": "5"}, "the formats have 4 to 8"),
        ({"delay": 1.0}, "a share below 1"),
    ],
)
def test_bad_choices_are_refused(choices, told):
    with pytest.raises(RequestError, match=told):
        FormatSearch(**choices)


def test_what_cannot_be_searched_is_refused():
    tied = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(RequestError, match="shared"):
        FormatSearch().begin(tied, 10)
    with pytest.raises(RequestError, match="assigned names"):
        FormatSearch(assigned={"9.weight": "int4"}).begin(net(), 10)
    with pytest.raises(RequestError, match="nothing was trained"):
        FormatSearch().forms(net())
