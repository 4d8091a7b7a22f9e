"""Weights are trained as the matrices as which they are stored, also where inputs and outputs are equally many."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import octavo
from octavo.errors import RequestError
from octavo.training import (
    FormatSearch,
    GradualPruning,
    LearnedLevels,
    OrderedDropout,
    QuantizedTraining,
    Regimen,
    cross_entropy,
    fit,
)

REGIMENS = {
    "masks": lambda names: GradualPruning(0.5, names=names),
    "pattern": lambda names: GradualPruning(0.5, names=names, pattern=(2, 4)),
    "rounding": lambda names: QuantizedTraining(setting={"bits": 3, "group": 4}, names=names),
    "formats": lambda names: FormatSearch(("int3", "e4m3"), names=names),
    "levels": lambda names: LearnedLevels(5, names=names),
}
LAYERS = {
    "transposed": lambda: nn.Sequential(nn.Unflatten(1, (8, 1, 2)), nn.ConvTranspose2d(8, 8, (1, 3)), nn.Flatten()),
    "groups": lambda: nn.Sequential(
        nn.Unflatten(1, (8, 1, 2)), nn.ConvTranspose2d(8, 4, (1, 3), groups=2), nn.Flatten()
    ),
    "GPT-2": lambda: nn.Sequential(nn.Identity(), Conv1D(16, 16)),
}


def net(layer: str) -> nn.Module:
    torch.manual_seed(0)
    first = LAYERS[layer]()
    return nn.Sequential(first, nn.ReLU(), nn.Linear(first(torch.zeros(1, 16)).shape[1], 3))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    inputs = torch.randn(128, 16, generator=torch.Generator().manual_seed(1))
    return list(zip(inputs.split(32), inputs[:, :3].argmax(1).split(32), strict=True))


def stays_the_same(model: nn.Module, regimen: Regimen, fresh: nn.Module, folder: Path) -> None:
    """What is read back computes what was trained."""
    octavo.save((model, regimen.hand_over(model)), folder, dtype=torch.float32, report=False)
    read, inputs = octavo.load(folder, into=fresh).eval(), batches()[0][0]
    with torch.no_grad():
        assert torch.allclose(read(inputs), model.eval()(inputs), atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", REGIMENS)
def test_what_is_stored_is_what_was_trained(name, layer, tmp_path):
    model, regimen = net(layer), REGIMENS[name](("0.1.weight",))
    fit(model, lambda epoch: batches(), cross_entropy, epochs=2, lr=1e-2, regimen=regimen)
    stays_the_same(model, regimen, net(layer), tmp_path / "out")


@pytest.mark.parametrize("layer", LAYERS)
def test_factors_are_those_of_the_stored_matrix(layer, tmp_path):
    model, regimen = net(layer), OrderedDropout(names=("0.1.weight",))
    fit(model, lambda epoch: batches(), cross_entropy, epochs=2, lr=1e-2, regimen=regimen)
    left = regimen.hand_over(model)
    octavo.save((model, left), tmp_path / "out", report=False)
    assert torch.allclose(
        octavo.Artifact(tmp_path / "out").form("0.1.weight").dense(), left.forms["0.1.weight"].dense()
    )


class Recurrent(nn.Module):
    """One class for a sequence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cells, self.head = nn.LSTM(4, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.cells(inputs.unflatten(1, (4, 4)))[0][:, -1])


@pytest.mark.parametrize("name", REGIMENS)
def test_recurrent_layers_train_and_are_saved(name, tmp_path):
    model, regimen = Recurrent(), REGIMENS[name](("cells.weight*",))
    losses = fit(model, lambda epoch: batches(), cross_entropy, epochs=8, lr=3e-2, regimen=regimen)
    assert losses[-1] < losses[0]
    stays_the_same(model, regimen, Recurrent(), tmp_path / "out")


@pytest.mark.parametrize("name", ["rounding", "formats", "levels"])
def test_a_shared_weight_is_refused(name):
    """The other layer would compute with weights that are not stored."""
    tied = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(RequestError, match=r"'0\.weight': is shared with another module"):
        REGIMENS[name](None).begin(tied, 10)


@pytest.mark.parametrize("name", ["rounding", "formats", "levels"])
def test_narrow_floats_train(name):
    model, regimen = net("GPT-2").bfloat16(), REGIMENS[name](None)
    inputs = [(part.bfloat16(), labels) for part, labels in batches()]
    losses = fit(model, lambda epoch: inputs, cross_entropy, epochs=6, lr=1e-2, regimen=regimen)
    assert losses[-1] < losses[0] and model[2].weight.dtype == torch.bfloat16
    for key, form in regimen.forms(model).items():
        held = model.eval().get_submodule(key.rpartition(".")[0]).weight.detach()
        matrix = held.t() if key.startswith("0") else held
        assert torch.equal(form.dense().bfloat16(), matrix)
