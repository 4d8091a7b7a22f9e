"""What a report states was measured on the model as its users load it, and is checked again by ``verify``."""

import hashlib
import json
import shutil
import zlib
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import transformers as T
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import octavo
from octavo.artifact import Artifact
from octavo.cli import app
from octavo.errors import ArtifactError
from octavo.system.records import FieldError, plain_json, record_of
from octavo.verification.probes import Outputs, fixed_input, probe
from octavo.verification.proof import prove

SIZES = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "bert": lambda: T.BertModel(T.BertConfig(**SIZES)),
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**SIZES, num_key_value_heads=2)),
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**EXPERTS)),
}
#: Too little for any model as a whole.
LITTLE = "1GB"
WAYS = [(name, memory) for memory in (None, LITTLE) for name in MODELS]


def padded():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(4, 13, (24, 1), generator=generator)
    mask = (torch.arange(12) < lengths).long()
    return {"input_ids": torch.randint(1, 120, (24, 12), generator=generator) * mask, "attention_mask": mask}


@pytest.fixture(
    scope="module", params=WAYS, ids=[f"{name}, {'blocks' if memory else 'whole'}" for name, memory in WAYS]
)
def case(request, tmp_path_factory):
    name, memory = request.param
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("proof"), MODELS[name]()
    model.save_pretrained(folder / "source")
    done = octavo.compress(folder / "source", ratio=4, data=[padded()], preset="fast", methods=["rtn"], memory=memory)
    report = done.save(folder / "out")
    return SimpleNamespace(
        kind=type(model), source=folder / "source", out=folder / "out", done=done, report=report, blocks=bool(memory)
    )


def test_the_stated_quality_is_that_of_the_loaded_model(case):
    objective, held = case.done.opened.objective, case.done.opened.held_data
    old, new = (case.kind.from_pretrained(folder).eval() for folder in (case.source, case.out))
    real = objective.measure(new, held, objective.reference(old, held))
    stated = case.report["quality"]
    assert 0 < stated["value"] == pytest.approx(float(real.mean()), rel=1e-3) and stated["why"] == ""
    way = "{}, block by block" if case.blocks else "{}.from_pretrained(path)"
    assert stated["loader"] == way.format(case.kind.__name__)
    # Report, card and verify state the same.
    assert (
        plain_json(octavo.verify(case.out).quality)
        == json.loads((case.out / "report.json").read_text())["quality"]
        == stated
    )
    card = (case.out / "README.md").read_text().replace("\\_", "_")
    assert f"{stated['value']:.3g}" in card and stated["loader"] in card


@pytest.mark.parametrize(
    ("layers", "says"), [(3, "the artifact does not fill"), (1, "the model does not use")], ids=["lacks", "is over"]
)
def test_a_part_that_does_not_fit_is_an_error(layers, says, case, tmp_path):
    """Nothing is stated of a model of which a part is random."""
    shutil.copytree(case.out, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if "layer_types" in config:
        config["layer_types"] = (config["layer_types"] or ["full_attention"]) * 3
        config["layer_types"] = config["layer_types"][:layers]
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    with pytest.raises(ArtifactError, match=rf"{says}.*layers?\.{min(layers, 2) if layers > 1 else 1}\."):
        prove(case.done.run, Artifact(tmp_path / "out"))


CHANGES = {
    "activation": {"hidden_act": "relu"},
    "norm": {"layer_norm_eps": 1.0},
    "heads": {"num_attention_heads": 8},
    "depth": {"num_hidden_layers": 1},
    "more depth": {"num_hidden_layers": 3},
}


@pytest.fixture(scope="module", params=[True, False], ids=["data", "data-free"])
def artifact(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("verified")
    MODELS["bert"]().save_pretrained(folder / "source")
    how = {"data": [padded()], "preset": "fast"} if request.param else {"preset": "data-free"}
    octavo.compress(folder / "source", ratio=4, methods=["rtn"], **how).save(folder / "out")
    return folder / "out"


def test_a_figure_says_in_which_dtype_the_model_ran(tmp_path):
    torch.manual_seed(0)
    MODELS["bert"]().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    done = octavo.compress(tmp_path / "source", bits=8, methods=["rtn"], data=[padded()], preset="fast")
    loader = done.save(tmp_path / "out").quality.loader
    assert loader == "BertModel.from_pretrained(path, dtype=torch.float32)"


def test_what_was_not_changed_is_verified(artifact):
    found = octavo.verify(artifact)
    assert found.outputs_match is True and found.outputs_difference == 0
    assert found.loader == "BertModel.from_pretrained(path)"
    result = CliRunner().invoke(app, ["verify", str(artifact), "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["outputs_match"] is True


def signed_again(folder):
    """The manifest with the checksum of the configuration that is there now."""
    body = json.loads((folder / "octavo.json").read_text())
    del body["sha256"]
    content = (folder / "config.json").read_bytes()
    body["configurations"]["config.json"] = [len(content), zlib.crc32(content)]
    text = json.dumps(body, separators=(",", ":"))[1:].encode()
    (folder / "octavo.json").write_bytes(b'{"sha256":"' + hashlib.sha256(text).hexdigest().encode() + b'",' + text)


@pytest.mark.parametrize("change", CHANGES)
def test_other_outputs_are_an_error(change, artifact, tmp_path):
    shutil.copytree(artifact, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, **CHANGES[change]}))
    with pytest.raises(ArtifactError, match=r"config\.json was changed"):
        octavo.verify(tmp_path / "out")
    # Nor does it help to sign the change: what the model gives is recorded as well.
    signed_again(tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"outputs differ from those recorded|does not fill"):
        octavo.verify(tmp_path / "out")
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 1 and json.loads(result.stdout)["error"] == "ArtifactError"


def test_rounding_is_no_difference(artifact, tmp_path):
    """What another machine or another number of threads computes is not the same bit for bit."""
    shutil.copytree(artifact, tmp_path / "out")
    file = tmp_path / "out" / "report.json"
    report = json.loads(file.read_text())
    outputs = report["digests"]["outputs"]
    outputs["sha256"] = "0" * 64
    outputs["samples"] = [value + 1e-4 * outputs["scale"] for value in outputs["samples"]]
    file.write_text(json.dumps(report))
    found = octavo.verify(tmp_path / "out")
    assert found.outputs_match is True and 0 < found.outputs_difference < 2e-4


def test_without_a_report_nothing_is_claimed(artifact, tmp_path):
    shutil.copytree(artifact, tmp_path / "out", ignore=shutil.ignore_patterns("report.*"))
    found = octavo.verify(tmp_path / "out")
    assert found.weights_match is found.outputs_match is found.quality is None


def folder_of_a_model(folder):
    MODELS["bert"]().save_pretrained(folder)
    return folder


def bare_file(folder):
    folder.mkdir()
    save_file({"a.weight": torch.randn(64, 64)}, folder / "bare.safetensors")
    return folder / "bare.safetensors"


def module(folder):
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


@pytest.mark.parametrize(
    ("make", "loader", "why"),
    [
        (folder_of_a_model, "BertModel.from_pretrained(path)", "no data were given"),
        (bare_file, "", "bare tensors have no model to run"),
        (module, "", "no data were given"),
    ],
)
def test_without_data_no_number_is_stated(make, loader, why, tmp_path):
    torch.manual_seed(0)
    source = make(tmp_path / "source")
    report = octavo.compress(source, ratio=4, preset="data-free", methods=["rtn"]).save(tmp_path / "out")
    quality = report["quality"]
    assert quality["value"] is quality["p95"] is quality["uniform"] is None
    assert quality["loader"] == loader and why in quality["why"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Quality was not measured: " + quality["why"] in card


class Keeping(nn.Module):
    """A module with state beside its tensors, of which parts are trained."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Linear(64, 16)
        self.register_buffer("hidden", torch.ones(3), persistent=False)
        self.steps = 7

    def forward(self, x):
        return self.two(torch.tanh(self.norm(self.one(x))))

    def get_extra_state(self):
        return {"steps": self.steps}

    def set_extra_state(self, state):
        self.steps = state["steps"]


def seen(module):
    return (
        {name: (id(p), p.data_ptr(), p.requires_grad, p.detach().clone()) for name, p in module.named_parameters()},
        {name: (id(b), b.data_ptr(), b.clone()) for name, b in module.named_buffers()},
        [part.training for part in module.modules()],
        module.get_extra_state(),
    )


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_a_module_is_measured_and_left_as_it_was(tmp_path):
    torch.manual_seed(0)
    model, x = Keeping().train(), torch.randn(64, 32)
    model(x)
    model.two.eval()
    model.one.weight.requires_grad_(False)
    before = seen(model)
    done = octavo.compress(model, ratio=3, data=[x], objective="squared", preset="fast")
    report = done.save(tmp_path / "out")
    assert same(seen(model), before)
    other, objective, held = Keeping().eval(), done.opened.objective, done.opened.held_data
    octavo.load(tmp_path / "out", into=other)
    real = objective.measure(other, held, objective.reference(model.eval(), held)).mean()
    assert report["quality"]["loader"] == "octavo.load(path, into=module)"
    assert 0 < report["quality"]["value"] == pytest.approx(float(real), rel=1e-3)


def test_a_module_that_does_not_take_its_artifact_is_left_as_it_was(tmp_path):
    class Refusing(Keeping):
        #: Of the class: what the module itself holds is put back when it refuses.
        refusals: ClassVar[list[str]] = []

        def set_extra_state(self, state):
            if self.refusals:
                raise ValueError(self.refusals.pop())
            super().set_extra_state(state)

    torch.manual_seed(0)
    model, x = Refusing().train(), torch.randn(64, 32)
    done = octavo.compress(model, ratio=3, data=[x], objective="squared", preset="fast", methods=["rtn"])
    before = seen(model)
    # Once by the module's own way, and once by ours.
    model.refusals.extend(["not now", "not now"])
    with pytest.raises(ArtifactError, match="not now"):
        done.save(tmp_path / "out")
    assert same(seen(model), before) and not (tmp_path / "out").exists()


def test_fixed_inputs_fit_their_models():
    vision = T.ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=16,
                         patch_size=8)  # fmt: skip
    pair = T.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    for model, keys in (
        (MODELS["llama"](), {"input_ids"}),
        (T.T5ForConditionalGeneration(pair), {"input_ids", "decoder_input_ids"}),
        (T.ViTModel(vision), {"pixel_values"}),
    ):
        model.eval()
        assert set(fixed_input(model)) == keys
        one, other, third = probe(model), probe(model), probe(model, seed=1)
        assert one == other and one.differ(other) == 0 and one.differ(third) > 0
        assert record_of(Outputs, json.loads(json.dumps(plain_json(one)))) == one
    assert fixed_input(nn.Linear(3, 3)) is None and probe(nn.Linear(3, 3)) is None


def test_outputs_are_compared_by_their_size():
    one = Outputs("a", 100.0, (1.0, -100.0))
    assert one.differ(Outputs("b", 100.0, (1.5, -100.0))) == pytest.approx(0.005)
    assert one.differ(Outputs("b", 50.0, (1.0, -100.0))) == pytest.approx(0.5)
    assert one.differ(Outputs("b", 100.0, (1.0,))) == one.differ(Outputs("b", 1.0, (1.0, float("nan")))) == float("inf")
    for damaged in (
        None,
        {},
        [],
        {"sha256": "a", "scale": "x", "samples": []},
        {"sha256": "a", "scale": 1, "samples": 3},
    ):
        with pytest.raises(FieldError):
            record_of(Outputs, damaged)
