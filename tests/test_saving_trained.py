"""Saving what was trained: forms become an artifact as they are, or smaller, and load into a plain module."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModel, BertConfig, BertModel

import octavo
from octavo.forms import Dense, DenseSparse, LowRank, Separable, Sparse, TensorTrain
from octavo.sources.sites import Layout
from octavo.training import HandOver, formed, settle


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(12, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(384, 64), nn.ReLU(), nn.Linear(64, 10),
    ).eval()  # fmt: skip


def drawn(*shape):
    return Dense(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / shape[-1] ** 0.5)


def low_rank():
    return "5.weight", LowRank(drawn(64, 16), drawn(16, 384))


def train():
    cores = (drawn(8 * 16, 12), drawn(12 * 8 * 24, 1))
    return "5.weight", TensorTrain(cores, (8, 8), (16, 24), 64, 384)


def masked():
    mask = torch.rand(64, 384, generator=torch.Generator().manual_seed(1)) < 0.2
    return "5.weight", Sparse(mask, drawn(1, int(mask.sum())))


def separable():
    return "0.weight", Separable(drawn(2 * 24, 12), drawn(2 * 24, 3), drawn(2 * 24, 3), 2)


def dictionary():
    index = torch.arange(64 * 12).view(64, 12).remainder(16).sort(1).values.to(torch.uint8)
    return "5.weight", DenseSparse(
        drawn(64, 12 * 2),
        index.repeat_interleave(2, 1) // 2 * 2 + torch.tensor([0, 1], dtype=torch.uint8).repeat(12),
        drawn(12 * 16, 32),
        2,
        384,
    )


EVERY = [low_rank, train, masked, separable, dictionary]


@pytest.mark.parametrize("made", EVERY, ids=lambda made: made.__name__)
def test_what_was_trained_is_stored_as_it_is_and_smaller(made, tmp_path):
    name, form = made()
    model, images = net(), torch.randn(48, 12, 8, 8)
    formed(model, {name: form})
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    octavo.save(model, tmp_path / "as-it-is", progress=False)
    assert octavo.verify(tmp_path / "as-it-is").weights_match
    found = octavo.load(tmp_path / "as-it-is", into=net())
    assert torch.equal(found.get_parameter(name), model.get_submodule(name[0]).weight)
    assert torch.equal(found(images), model(images))
    assert octavo.Artifact(tmp_path / "as-it-is").form(name).meta()["form"] == form.name

    report = octavo.save(
        model, tmp_path / "smaller", ratio=6, data=images, objective="squared", preset="fast", progress=False
    )
    assert octavo.verify(tmp_path / "smaller").weights_match
    size = sum((tmp_path / "smaller" / file).stat().st_size for file in ("model.safetensors", "octavo.json"))
    original = 4 * sum(tensor.numel() for tensor in net().parameters()) + 4 * 48 + 8
    assert size == report.artifact.bytes and 0.98 * original / 6 <= size <= original / 6
    outputs = octavo.load(tmp_path / "smaller", into=net())(images)
    power = (model(images) - model(images).mean(0)).square().mean()
    assert (outputs - model(images)).square().mean() < 0.1 * power
    assert report.quality.loader and report.quality.value < 0.1
    # A part of the form was compressed, and stands in the form.
    assert any(row.name.startswith(f"{name}/") for row in report.sites)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_fresh_process_loads_the_forms_without_the_training(tmp_path):
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 4))
    formed(model, {"0.weight": LowRank(drawn(64, 6), drawn(6, 48))})
    forms = settle(model)
    octavo.save((model, forms), tmp_path / "out", report=False, progress=False)
    script = "import octavo, sys; print(octavo.load(sys.argv[1])['0.weight'].double().sum().item())"
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert float(done.stdout) == model[0].weight.double().sum().item()


def test_quality_is_measured_on_the_file_and_nothing_is_lost_without_a_budget(tmp_path):
    name, form = low_rank()
    handed_over = net(), HandOver({name: form})
    report = octavo.save(handed_over, tmp_path / "out", data=torch.randn(32, 12, 8, 8), progress=False)
    assert report.quality.value == 0 and "8 held-out examples" in report.quality.data
    assert [row.reason for row in report.kept if row.name == name] == ["a form: stored as it was trained"]
    rounded = octavo.save(handed_over, tmp_path / "half", dtype=torch.float16, progress=False)
    assert rounded.artifact.bytes < 0.55 * report.artifact.bytes
    assert octavo.Artifact(tmp_path / "half").form(name).left.weight.dtype == torch.float16


def test_forms_and_tensors_alone(tmp_path):
    forms = {"a.weight": LowRank(drawn(96, 8), drawn(8, 64)), "b": torch.randn(64, 48), "c": torch.arange(5)}
    octavo.save(forms, tmp_path / "out", progress=False)
    found = octavo.load(tmp_path / "out")
    assert torch.equal(found["a.weight"], forms["a.weight"].dense())
    assert torch.equal(found["b"], forms["b"]) and torch.equal(found["c"], forms["c"])
    report = octavo.save(forms, tmp_path / "small", size="6kB", preset="fast", progress=False)
    assert 5880 <= report.artifact.bytes <= 6000 and octavo.verify(tmp_path / "small").weights_match


def test_the_form_of_a_tied_weight_is_stored_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(80, 32), nn.Linear(32, 80, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens):
            return self.head(self.table(tokens))

    form = LowRank(drawn(80, 12), drawn(12, 32))
    tokens = torch.randint(0, 80, (32, 6))
    report = octavo.save(
        (Tied(), {"table.weight": form}), tmp_path / "out", ratio=4, data=tokens, preset="fast", progress=False
    )
    found = octavo.load(tmp_path / "out", into=Tied())
    assert found.head.weight is found.table.weight and report.artifact.ratio >= 4
    assert (found.head.weight - form.dense()).norm() < 0.3 * form.dense().norm()


def test_a_transformers_model_loads_from_its_folder(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes))
    name = "encoder.layer.0.intermediate.dense.weight"
    form = LowRank(drawn(64, 10), drawn(10, 32))
    octavo.save((model, {name: form}), tmp_path / "out", progress=False)
    found = AutoModel.from_pretrained(tmp_path / "out")
    assert torch.equal(found.get_parameter(name), form.dense())
    assert octavo.verify(tmp_path / "out").outputs_match


def test_a_form_may_be_read_in_another_layout(tmp_path):
    model = nn.Sequential(nn.Linear(40, 40))
    form, layouts = LowRank(drawn(40, 3), drawn(3, 40)), {"0.weight": Layout("columns_first")}
    octavo.save((model, {"0.weight": form}), tmp_path / "out", layouts=layouts, progress=False)
    assert torch.equal(octavo.load(tmp_path / "out")["0.weight"], form.dense().t())


@pytest.mark.parametrize(
    ("given", "choices", "said"),
    [
        ((net(), {"5.wight": low_rank()[1]}), {}, r"has no parameter '5.wight'; choose from 0.weight"),
        ((net(), {"7.weight": low_rank()[1]}), {}, r"shape \(10, 64\), but its form has shape \(64, 384\)"),
        ((net(), {"5.weight": Dense(torch.full((64, 384), torch.nan))}), {}, "'5.weight' holds NaN or Inf"),
        ((net(), {"5.weight": torch.ones(64, 384)}), {}, "'5.weight' is Tensor; give forms"),
        ((net(), HandOver({}, {"5": torch.ones(64).bool()})), {}, "apply the cut to the module"),
        (HandOver({}), {}, "give .module, handed_over"),
        ({}, {}, "nothing was given"),
        ("folder", {}, "str cannot be stored"),
        (net(), {"preset": "best"}, "preset: says how to compress, and without a budget"),
        (net(), {"ratio": 4, "target": "memory"}, "'memory' counts something else"),
        (net(), {"ratio": 4, "dtype": torch.float16}, "leave one of them out"),
        (net(), {"dtype": torch.int8}, "give a floating one"),
    ],
)
def test_what_cannot_be_saved_is_said(given, choices, said, tmp_path):
    with pytest.raises(octavo.RequestError, match=said):
        octavo.save(given, tmp_path / "out", progress=False, **choices)
    assert not list(tmp_path.iterdir())


def test_a_budget_out_of_reach_names_the_largest(tmp_path):
    with pytest.raises(octavo.BudgetError) as caught:
        octavo.save(dict([low_rank()]), tmp_path / "out", ratio=5000, progress=False)
    assert 10 < caught.value.limit < 5000


def test_the_report_says_what_was_not_compressed(tmp_path):
    name, form = masked()
    octavo.save((net(), {name: form}), tmp_path / "out", progress=False)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["budget"]["asked"] == "none" and report["sites"] == []
    assert "Nothing was compressed" in (tmp_path / "out" / "README.md").read_text()
    assert "No budget was given" in (tmp_path / "out" / "report.html").read_text()
