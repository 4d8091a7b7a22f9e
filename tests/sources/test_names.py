"""Tensors that ``transformers`` renames or fuses while it loads: all of them are calibrated and measured."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file

import octavo
from octavo.errors import RequestError
from octavo.sources.conversions import Conversion
from octavo.sources.files import from_path
from octavo.sources.names import names_of
from octavo.sources.skeletons import skeleton

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 120, "num_key_value_heads": 2, "max_position_embeddings": 64}
VISION = {**SIZES, "image_size": 32, "patch_size": 8, "num_channels": 3}
IMAGE, PLACES, EXAMPLES = 5, 16, 24


def llava():
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**VISION), text_config=T.LlamaConfig(**TEXT), image_token_id=IMAGE,
        vision_feature_layer=-1,
    )  # fmt: skip
    return T.LlavaForConditionalGeneration(config)


def experts(per_token=2):
    sizes = {**TEXT, "num_experts": 4, "num_experts_per_tok": per_token, "moe_intermediate_size": 32, "head_dim": 8}
    return T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**sizes))


def mixtral():
    sizes = {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}
    return T.MixtralForCausalLM(T.MixtralConfig(**sizes))


def tokens():
    x = torch.randint(10, 120, (EXAMPLES, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": x, "attention_mask": torch.ones_like(x)}


def images():
    return {"pixel_values": torch.randn(EXAMPLES, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def told():
    x = torch.cat([torch.full((EXAMPLES, PLACES), IMAGE), tokens()["input_ids"]], 1)
    return {"input_ids": x, "attention_mask": torch.ones_like(x), **images()}


MODELS = {
    "llava": (llava, told),
    "qwen3-moe": (experts, tokens),
    "mixtral": (mixtral, tokens),
    "vit": (lambda: T.ViTForImageClassification(T.ViTConfig(**VISION, num_labels=10)), images),
    "dinov2": (lambda: T.Dinov2Model(T.Dinov2Config(**VISION)), images),
    "gpt-neox": (lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**TEXT)), tokens),
}


def written(model, folder):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.12)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """A model that was compressed from its folder."""
    torch.manual_seed(0)
    make, batch = MODELS[request.param]
    folder, model = tmp_path_factory.mktemp(request.param), make()
    source = written(model, folder / "source")
    done = octavo.compress(source, ratio=5, data=[batch()], preset="fast", methods=["rtn"])
    report = done.save(folder / "out")
    return SimpleNamespace(kind=type(model), source=source, out=folder / "out", done=done, report=report)


def test_every_tensor_of_the_folder_has_a_place(case):
    source, stored = case.done.opened.source, load_file(case.source / "model.safetensors")
    assert set(stored) == {*source.shapes, *source.aliases}
    assert set(source.parameters) == set(stored) and source.unused == source.unfilled == []
    module = case.kind.from_pretrained(case.source).state_dict(keep_vars=True)
    filled = {*source.parameters.values(), *(target for item in source.conversions for target in item.targets)}
    assert {id(tensor) for tensor in module.values()} == {id(module[name]) for name in filled}
    assert all(module[target].shape == stored[name].shape for name, target in source.direct.items())


def test_every_site_has_evidence(case):
    evidence = case.done.run.calibration.evidence
    assert {site.name for site in case.done.opened.sites} == set(evidence)
    assert not [note for note in case.done.notes if "typical" in str(note)]


def test_the_stated_quality_is_that_of_its_own_class(case):
    objective, held = case.done.opened.objective, case.done.opened.held_data
    old = case.kind.from_pretrained(case.source).eval()
    new, info = case.kind.from_pretrained(case.out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    real = float(objective.measure(new.eval(), held, objective.reference(old, held)).mean())
    assert 0 < real == pytest.approx(case.report["quality"]["value"], rel=1e-4)


@pytest.mark.parametrize("case", ["qwen3-moe", "mixtral"], indirect=True)
def test_experts_are_sites_with_evidence_of_their_own(case):
    evidence = case.done.run.calibration.evidence
    names = [site.name for site in case.done.opened.sites if ".experts." in site.name]
    assert len(names) == 2 * 4 * 3
    one, other = ([evidence[name] for name in names if f".experts.{number}." in name] for number in (0, 1))
    for a, b in zip(one, other, strict=True):
        assert not torch.allclose(a.rows, b.rows, rtol=0.05)
        assert not torch.allclose(a.columns, b.columns, rtol=0.05)


def test_an_expert_that_no_token_reaches_is_told(tmp_path):
    torch.manual_seed(0)
    model = experts(per_token=1)
    with torch.no_grad():
        for layer in model.model.layers:
            # One of two opposite numbers is above zero, which is what the last expert always gets.
            layer.mlp.gate.weight.normal_()
            layer.mlp.gate.weight[1] = -layer.mlp.gate.weight[0]
            layer.mlp.gate.weight[3] = 0
    model.save_pretrained(tmp_path / "source")
    done = octavo.compress(tmp_path / "source", ratio=4, data=[tokens()], preset="fast", methods=["rtn"])
    idle = {name for note in done.notes if "no output" in note.text for name in note.sites}
    assert idle == {site.name for site in done.opened.sites if ".experts.3." in site.name}


def bound(name, folder):
    """The source of a folder, bound to a skeleton as block-by-block runs are."""
    make, _ = {
        **MODELS,
        "dinov2, gated": (lambda: T.Dinov2Model(T.Dinov2Config(**VISION, use_swiglu_ffn=True)), images),
    }[name]
    torch.manual_seed(0)
    make().save_pretrained(folder)
    return from_path(folder)


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral", "dinov2, gated"])
def test_gradients_go_back_as_the_values_came(name, tmp_path):
    source = bound(name, tmp_path)
    assert source.conversions and source.is_skeleton
    generator = torch.Generator().manual_seed(0)
    for conversion in source.conversions:
        shapes = [source.shapes[name] for name in conversion.names]
        given = [torch.randn(shape, generator=generator) for shape in shapes]
        made = conversion.values(given)
        gradients = {key: torch.randn(value.shape, generator=generator) for key, value in made.items()}
        found = conversion.back(gradients, shapes)
        # A linear map and its adjoint give the same inner products.
        forward = sum(float((made[key] * gradients[key]).sum()) for key in made)
        backward = sum(float((one * other).sum()) for one, other in zip(given, found, strict=True))
        assert forward == pytest.approx(backward, rel=1e-4, abs=1e-3)
        # What is missing is zero.
        assert not any(tensor.any() for tensor in conversion.back({}, shapes))


def test_gradients_of_experts_are_those_of_autograd(tmp_path):
    """Both projections of every expert are laid together, then the experts: ``Concatenate`` of ``MergeModulelist``."""
    source = bound("qwen3-moe", tmp_path)
    conversion = next(
        item for item in source.conversions if item.targets[0].endswith("layers.0.mlp.experts.gate_up_proj")
    )
    given = {name: source.read(name).requires_grad_() for name in conversion.names}
    prefix = "model.layers.0.mlp.experts"
    fused = torch.stack(
        [torch.cat([given[f"{prefix}.{n}.{part}_proj.weight"] for part in ("gate", "up")]) for n in range(4)]
    )
    (made,) = conversion.values([tensor.detach() for tensor in given.values()]).values()
    assert torch.equal(made, fused)
    gradient = torch.randn(fused.shape)
    fused.backward(gradient)
    found = conversion.back({conversion.targets[0]: gradient}, [tuple(tensor.shape) for tensor in given.values()])
    assert all(torch.equal(one, given[name].grad) for one, name in zip(found, given, strict=True))


def test_a_loader_that_computes_gives_no_gradients_back():
    doubled = Conversion(("a",), ("b",), lambda tensors: {"b": tensors[0].float() * 2})
    with pytest.raises(RequestError, match="computes with this tensor"):
        doubled.back({"b": torch.ones(4)}, [(4,)])


def test_parts_of_a_conversion_that_are_not_replaced_are_read(tmp_path):
    source = bound("qwen3-moe", tmp_path)
    conversion = next(item for item in source.conversions if len(item.names) == 8)
    first, *others = conversion.names
    changed = torch.ones(source.shapes[first])
    (fused,) = source.placed({first: changed}).values()
    wanted = conversion.values([changed, *map(source.read, others)])[conversion.targets[0]]
    torch.testing.assert_close(fused, wanted)


def extra_tensor(state, config):
    state["model.layers.0.mlp.forgotten.weight"] = torch.randn(64, 32)


def extra_layer(state, config):
    config["num_hidden_layers"] = 1


def extra_head(state, config):
    state["score.weight"] = torch.randn(48, 32)


@pytest.mark.parametrize("change", [extra_tensor, extra_layer, extra_head])
def test_what_the_class_has_no_place_for_is_told(change, tmp_path):
    """It is stored, since another class may read it, but no quality speaks of it."""
    torch.manual_seed(0)
    source = written(T.LlamaForCausalLM(T.LlamaConfig(**TEXT)), tmp_path / "source")
    state, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    change(state, config)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(config))
    _, info = T.AutoModelForCausalLM.from_pretrained(source, output_loading_info=True)
    done = octavo.compress(source, ratio=4, data=[tokens()], preset="fast", methods=["rtn"])
    done.save(tmp_path / "out", report=False)
    (note,) = (note for note in done.notes if "LlamaForCausalLM does not use this weight" in note.text)
    sites = {site.name for site in done.opened.sites}
    assert set(note.sites) == info["unexpected_keys"] & sites and note.sites
    assert set(done.opened.source.unused) == info["unexpected_keys"]
    _, again = T.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert again["unexpected_keys"] == info["unexpected_keys"] and not again["missing_keys"]


def test_a_tensor_of_another_shape_has_no_place(tmp_path):
    written(experts(), tmp_path)
    module = skeleton(tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert names_of(module, shapes).missing == []
    shapes["model.norm.weight"] = (31,)
    found = names_of(module, shapes)
    assert found.unused == ["model.norm.weight"] and found.missing == ["model.norm.weight"]
    del shapes["model.layers.0.self_attn.q_proj.weight"]
    assert names_of(module, shapes).missing == ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]
