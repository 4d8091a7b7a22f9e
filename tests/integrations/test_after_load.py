"""After loading a model is an ordinary one: it is copied, cast, trained and saved like any other."""

import copy
import io
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as T
from safetensors import safe_open

import octavo
from octavo.errors import RequestError

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 200, "max_position_embeddings": 64, "initializer_range": 0.1}
EXPERTS = {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TOKENS = {"input_ids": torch.arange(24).view(2, 12)}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)}
#: Plain names, experts that are fused, tied tables, names that are changed.
MODELS = {
    "bert": (lambda: T.BertForSequenceClassification(T.BertConfig(**TEXT)), TOKENS),
    "qwen3-moe": (lambda: T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**TEXT, **EXPERTS, head_dim=8)), TOKENS),
    "gpt2, tied": (
        lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
        TOKENS,
    ),
    "vit": (
        lambda: T.ViTForImageClassification(T.ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=3)),
        PIXELS,
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    torch.manual_seed(0)
    make, batch = MODELS[request.param]
    folder, model = tmp_path_factory.mktemp("loaded"), make()
    model.save_pretrained(folder / "source")
    octavo.compress(folder / "source", ratio=4, preset="data-free", methods=["rtn"]).save(folder / "out")
    return SimpleNamespace(
        kind=type(model), batch=batch, source=folder / "source", out=folder / "out",
        load=lambda: type(model).from_pretrained(folder / "out").eval(),
    )  # fmt: skip


def outputs(model, batch):
    with torch.inference_mode():
        return model(**batch).logits


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "again", [lambda model: pickle.loads(pickle.dumps(model)), through_torch, copy.deepcopy],
    ids=["pickle", "torch.save", "deepcopy"],
)  # fmt: skip
def test_a_copy_gives_the_same_outputs(again, case):
    model = case.load()
    made = again(model)
    assert made is not model and type(made) is case.kind
    assert torch.equal(outputs(made, case.batch), outputs(model, case.batch))
    assert all(type(parameter) is torch.nn.Parameter for parameter in made.parameters())


def test_nothing_says_that_it_was_compressed(case):
    config = pickle.loads(pickle.dumps(case.load().config))
    assert "quantization_config" not in config.to_dict() and not getattr(case.load(), "is_quantized", False)
    assert config.to_dict() == case.load().config.to_dict()
    # What is in the folder still does.
    assert json.loads((case.out / "config.json").read_text())["quantization_config"]["quant_method"] == "octavo"


def test_a_saved_model_is_one_of_transformers(case, tmp_path):
    model = case.load()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert names(tmp_path) == names(case.source)
    again, info = case.kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(outputs(again.eval(), case.batch), outputs(model, case.batch))
    assert {name: p.shape for name, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("case", ["qwen3-moe", "vit"], indirect=True)
def test_a_saved_model_is_compressed_again(case, tmp_path):
    case.load().save_pretrained(tmp_path / "source")
    octavo.compress(tmp_path / "source", ratio=3, preset="data-free", methods=["rtn"]).save(
        tmp_path / "out", report=False
    )
    model, info = case.kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert outputs(model.eval(), case.batch).isfinite().all()


@pytest.mark.parametrize("cast", [lambda model: model.half(), lambda model: model.to(torch.bfloat16)])
def test_it_is_cast(cast, case):
    model = case.load()
    wanted = outputs(model, case.batch)
    cast(model)
    assert {p.dtype for p in model.parameters()} <= {torch.float16, torch.bfloat16}
    batch = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in case.batch.items()}
    assert float((outputs(model, batch).float() - wanted).norm()) < 0.05 * float(wanted.norm())


def test_it_is_dense_already(case):
    model = case.load()
    wanted = outputs(model, case.batch)
    dense = model.dequantize()
    assert torch.equal(outputs(dense if dense is not None else model, case.batch), wanted)


def test_a_trainer_takes_a_step(case, tmp_path):
    model = case.load()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    example = {name: value[0] for name, value in case.batch.items()}
    label = example["input_ids"] if "CausalLM" in case.kind.__name__ or "LMHead" in case.kind.__name__ else 1
    options = T.TrainingArguments(
        str(tmp_path / "run"), max_steps=1, learning_rate=0.01, report_to=[], save_strategy="steps", save_steps=1,
        use_cpu=True, disable_tqdm=True, per_device_train_batch_size=4,
    )  # fmt: skip
    T.Trainer(model, options, train_dataset=[{**example, "labels": torch.as_tensor(label)}] * 8).train()
    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    moved = [name for name in matrices if not torch.equal(before[name], model.get_parameter(name))]
    assert len(moved) >= len(matrices) - 1
    again = case.kind.from_pretrained(tmp_path / "run" / "checkpoint-1").eval()
    assert torch.equal(outputs(again, case.batch), outputs(model.eval(), case.batch))


def test_its_state_is_that_of_the_class(case):
    model, other = case.load(), case.kind(case.kind.config_class.from_pretrained(case.source)).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other, case.batch), outputs(model, case.batch))


@pytest.mark.parametrize("case", ["gpt2, tied"], indirect=True)
def test_ties_hold_in_copies_and_in_saved_models(case, tmp_path):
    model = case.load()
    model.save_pretrained(tmp_path)
    for made in (model, copy.deepcopy(model), through_torch(model), case.kind.from_pretrained(tmp_path)):
        assert made.lm_head.weight is made.transformer.wte.weight


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("packed")
    T.BertModel(T.BertConfig(**{**TEXT, "hidden_size": 64})).save_pretrained(folder / "source")
    done = octavo.compress(folder / "source", ratio=3, target="memory", data=[{"input_ids": texts()}], preset="fast")
    done.save(folder / "out")
    return octavo.load(folder / "out", packed=True)


def texts():
    return torch.randint(0, 200, (24, 12), generator=torch.Generator().manual_seed(0))


def trained(model):
    options = T.TrainingArguments("unused", max_steps=1, report_to=[], save_strategy="no", use_cpu=True)
    T.Trainer(model, options, train_dataset=[{"input_ids": torch.arange(8), "labels": torch.tensor(1)}] * 8)


@pytest.mark.parametrize(
    ("act", "error", "says"),
    [
        (lambda model, folder: model.save_pretrained(folder), ValueError, "not serializable"),
        (lambda model, folder: model.half(), ValueError, "not supported"),
        (lambda model, folder: model.dequantize(), NotImplementedError, "packed codes.*without packed=True"),
        (lambda model, folder: trained(model), ValueError, "fine-tuning"),
        (lambda model, folder: model.pooler.dense.weight.data.zero_(), RequestError, "cannot be changed in place"),
        (lambda model, folder: model.share_memory(), RequestError, "no storage to share between processes"),
    ],
    ids=["save_pretrained", "half", "dequantize", "Trainer", "in place", "processes"],
)
def test_packed_models_say_what_they_cannot_do(act, error, says, packed, tmp_path):
    with pytest.raises(error, match=says):
        act(packed, tmp_path)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch])
def test_copies_of_packed_models_run(again, packed):
    with torch.inference_mode():
        wanted = packed(texts()).last_hidden_state
        assert torch.equal(again(packed)(texts()).last_hidden_state, wanted)
