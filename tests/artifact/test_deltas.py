"""Deltas: a tuned model stored as the difference to its base, and restored onto a base of the same content alone."""

import hashlib
import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import octavo
from octavo.cli import app
from octavo.errors import ArtifactError, RequestError

transformers = pytest.importorskip("transformers")

GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randint(5, 96, (64, 12), generator=GENERATOR)
BATCHES = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in TOKENS.split(8)]
#: The classes that the model is tuned on, and what is not trained.
CLASSES, FROZEN = (TOKENS[:, 0] > 50).long(), "position_embeddings"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a base, a classifier tuned from it, and the classifier's delta."""
    folder = tmp_path_factory.mktemp("deltas")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder / "base")
    tuned = transformers.BertForSequenceClassification.from_pretrained(folder / "base")
    learned = [parameter for name, parameter in tuned.named_parameters() if FROZEN not in name]
    optimizer = torch.optim.Adam(learned, 1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        tuned(input_ids=TOKENS, labels=CLASSES).loss.backward()
        optimizer.step()
    tuned.eval().save_pretrained(folder / "tuned")
    done = octavo.compress(
        folder / "tuned", base=folder / "base", ratio=2, data=BATCHES, preset="fast", methods=["rtn", "keep"]
    )
    (folder / "apart").mkdir()
    done.save(folder / "apart" / "delta")
    return folder


@pytest.fixture
def copy(models, tmp_path):
    """A copy of the delta, beside which no base lies."""
    return shutil.copytree(models / "apart" / "delta", tmp_path / "delta")


@pytest.fixture(scope="module")
def tuned(models):
    return transformers.BertForSequenceClassification.from_pretrained(models / "tuned")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def test_a_ratio_counts_what_changed_in_16_bits(models):
    report = json.loads((models / "apart" / "delta" / "report.json").read_text())
    stored = load_file(models / "tuned" / "model.safetensors")
    changed = sum(2 * tensor.numel() for name, tensor in stored.items() if FROZEN not in name)
    files = [models / "apart" / "delta" / name for name in ("model.safetensors", "octavo.json")]
    assert report["source"]["bytes"] == changed
    assert sum(file.stat().st_size for file in files) <= changed / 2
    assert any("stored whole; sizes are compared with" in note for note in report["calibration"]["warnings"])


def test_on_its_base_it_gives_the_tuned_model(models, tuned):
    found = octavo.load(models / "apart" / "delta", base=models / "base")
    assert type(found) is type(tuned)
    base, weights = load_file(models / "base" / "model.safetensors"), found.state_dict()
    frozen = next(name for name in base if FROZEN in name)
    assert torch.equal(weights[f"bert.{frozen}"], base[frozen])
    start = {f"bert.{name}": value for name, value in base.items()}
    moved = {name: value - start.get(name, 0 * value) for name, value in tuned.state_dict().items()}
    lost = {name: value - weights[name] for name, value in tuned.state_dict().items()}
    total, error = (sum(float(value.square().sum()) for value in part.values()) for part in (moved, lost))
    assert error < 0.1 * total
    assert (logits(found).argmax(1) == logits(tuned).argmax(1)).float().mean() > 0.9


def test_from_pretrained_finds_the_base_where_the_user_says_or_beside_it(models, copy, monkeypatch):
    wanted = logits(octavo.load(copy, base=models / "base"))
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    with pytest.raises(ArtifactError, match=r"its base was not found; give the base .* OCTAVO_BASE"):
        load(copy)
    for place in (models / "base", models):
        monkeypatch.setenv("OCTAVO_BASE", str(place))
        assert torch.equal(logits(load(copy)), wanted)
    monkeypatch.delenv("OCTAVO_BASE")
    shutil.copytree(models / "base", copy.parent / "base")
    assert torch.equal(logits(load(copy)), wanted)
    assert octavo.verify(copy).outputs_match


def test_it_is_verified_on_a_given_base(models, copy):
    assert octavo.verify(copy, base=models / "base").outputs_match
    with pytest.raises(ArtifactError, match="is another model"):
        octavo.verify(copy, base=models / "tuned")


def test_another_base_is_refused(models, copy, tmp_path):
    with pytest.raises(ArtifactError, match=r"is a delta of 'base', and .*tuned is another model .*no tensor for"):
        octavo.load(copy, base=models / "tuned")
    other = shutil.copytree(models / "base", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if "query.weight" in name)
    weights[name][0, 0] += 1e-3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ArtifactError, match=r"another model \(its weights are others\); give the base that it was made"
    ):
        octavo.load(copy, base=other)
    with pytest.raises(ArtifactError, match="no such file or folder"):
        octavo.load(copy, base=tmp_path / "nowhere")


def test_a_base_that_is_changed_after_it_was_opened_is_read_again(models, copy, tmp_path):
    base = shutil.copytree(models / "base", tmp_path / "changing")
    octavo.load(copy, base=base)
    weights = load_file(base / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="another model"):
        octavo.load(copy, base=base)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"names": ["bert."]}, "entry of the base is malformed"),
        ({"whole": ["nothing"]}, "'nothing' is whole, which is not stored"),
        ({"whole": 3}, "entry of the base is malformed"),
        ({"dtype": "int8"}, "which is no float"),
        ({"title": "../base"}, "its base was not found"),
        ({"fingerprint": "0" * 64}, "its base was not found"),
        ({"more": 1}, "entry of the base is malformed"),
    ],
)
def test_a_damaged_entry_of_the_base_is_refused(models, copy, change, said):
    shutil.copytree(models / "base", copy.parent.parent / f"{copy.parent.name}-base")
    sign(copy, lambda manifest: manifest["base"].update(change))
    with pytest.raises(ArtifactError, match=said):
        octavo.load(copy)


def sign(folder: Path, change) -> None:
    """Change a manifest, with the checksum that makes it look sound, as an attacker would."""
    manifest = json.loads((folder / "octavo.json").read_text())
    manifest.pop("sha256")
    change(manifest)
    body = json.dumps(manifest, separators=(",", ":"))[1:].encode()
    (folder / "octavo.json").write_bytes(b'{"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'",' + body)


def test_a_delta_without_its_entry_fills_no_model(models, copy):
    sign(copy, lambda manifest: manifest.pop("base"))
    with pytest.raises(ArtifactError, match="different tensors"):
        octavo.load(copy, base=models / "base")


@pytest.mark.parametrize("how", [{"packed": True}, {"factors": True}])
def test_it_runs_dense_alone(models, copy, how):
    with pytest.raises((RequestError, ArtifactError), match="is a delta"):
        octavo.load(copy, base=models / "base", **how)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"base": "tuned"}, "equals its base"),
        ({"base": "missing"}, "no such file or folder"),
        ({"base": 3}, "base is int; give a model folder"),
        ({"base": nn.Linear(3, 3)}, "no tensor of the name and shape"),
        ({"base": "base", "recover": "distill"}, "leave recover or base out"),
        ({"base": "base", "target": "memory"}, "--for memory: .*--base"),
        ({"base": "base", "methods": ["modegpt", "rtn"]}, "is a cut, which changes shapes"),
    ],
)
def test_what_is_no_base_is_refused(models, choices, said):
    given = choices["base"]
    choices = {**choices, "base": models / given if isinstance(given, str) else given}
    with pytest.raises(RequestError, match=said):
        octavo.compress(models / "tuned", ratio=4, data=BATCHES, **choices)


def test_modules_in_memory_have_bases_in_memory(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)).eval()
    tuned = deepcopy(base)
    with torch.no_grad():
        tuned[0].weight += 0.01 * torch.randn(48, 32)
    before = deepcopy(base.state_dict())
    octavo.compress(tuned, base=base, ratio=1.5, data=torch.randn(64, 32), methods=["rtn"]).save(tmp_path / "delta")
    empty = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
    octavo.load(tmp_path / "delta", into=empty, base=base)
    assert torch.equal(empty[2].weight, base[2].weight) and not torch.equal(empty[0].weight, base[0].weight)
    assert (empty[0].weight - tuned[0].weight).norm() < 0.3 * (base[0].weight - tuned[0].weight).norm()
    empty[2].weight.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    with pytest.raises(RequestError, match="holds a whole model and is no delta"):
        octavo.compress(tuned, ratio=3, preset="data-free").save(tmp_path / "whole")
        octavo.load(tmp_path / "whole", into=empty, base=base)


def test_the_command_takes_a_base(models, tmp_path):
    words = ["compress", models / "tuned", "--base", models / "base", "--ratio", 2, "--preset", "data-free"]
    command = [*map(str, words), "--methods", "ternary,rtn,keep", "--out", str(tmp_path / "delta"), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["source"]["base"] == "base" and said["artifact"]["ratio"] >= 2
    octavo.load(tmp_path / "delta", base=models / "base")


def test_a_tied_model_in_bfloat16_comes_back_exactly_where_nothing_is_lost(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += (0.01 * torch.randn(parameter.shape)).to(parameter)
    base.save_pretrained(tmp_path / "tuned")
    choices = {"size": "1MB", "preset": "data-free", "methods": ["keep"], "keep": {"*": "float32"}}
    octavo.compress(tmp_path / "tuned", base=tmp_path / "base", **choices).save(tmp_path / "delta")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
    assert found.lm_head.weight is found.model.embed_tokens.weight
    # The differences are exact in float32; other tensors than matrices keep their relative precision in 16 bits.
    for name, value in base.state_dict().items():
        assert torch.equal(found.state_dict()[name], value) or value.ndim == 1


def test_a_change_that_matters_least_may_be_left_out():
    """At their coarsest steps, few large changes in many rows cost more than the whole budget."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 4096, bias=False), nn.ReLU(), nn.Linear(4096, 8, bias=False))
    tuned = deepcopy(base)
    with torch.no_grad():
        tuned[0].weight += 1e-3 * torch.randn(4096, 64).pow(7)
        tuned[2].weight += 1e-4 * torch.randn(8, 4096)
    how = {"base": base, "ratio": 160, "data": [torch.randn(32, 64) for _ in range(8)], "preset": "fast"}
    with pytest.raises(octavo.BudgetError, match="at least"):
        octavo.compress(tuned, methods=["entropy"], **how)
    done = octavo.compress(tuned, **how)
    assert {site: point.method for site, point in done.built.plan.points.items()} == {
        "0.weight": "entropy",
        "2.weight": "zero",
    }
    assert done.built.bytes <= 2 * (4096 * 64 + 8 * 4096) / 160
