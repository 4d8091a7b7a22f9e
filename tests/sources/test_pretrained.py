"""Models of ``transformers`` given in memory: their artifacts load like those of folders."""

import copy
import json

import pytest
import torch
import transformers as T
from torch import nn

import octavo
from octavo.sources.pretrained import is_pretrained

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 200, "max_position_embeddings": 64, "initializer_range": 0.2}
EXPERTS = {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FORCED = {"max_new_tokens": 3, "do_sample": False}


def tokens():
    return {"input_ids": torch.randint(10, 200, (24, 12), generator=torch.Generator().manual_seed(1))}


def images():
    return {"pixel_values": torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def both_sides():
    return {**tokens(), "decoder_input_ids": tokens()["input_ids"][:, :7]}


def llama(**options):
    return T.LlamaForCausalLM(T.LlamaConfig(**TEXT, **{"num_key_value_heads": 2, **options}))


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    return T.T5ForConditionalGeneration(T.T5Config(vocab_size=200, **sizes, decoder_start_token_id=0))


MODELS = {
    "llama": (llama, tokens),
    "bert": (lambda: T.BertForSequenceClassification(T.BertConfig(**TEXT, num_labels=3)), tokens),
    "qwen3-moe": (lambda: T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**TEXT, **EXPERTS, head_dim=8)), tokens),
    "vit": (lambda: T.ViTForImageClassification(T.ViTConfig(**SIZES, image_size=32, patch_size=8)), images),
    "t5": (t5, both_sides),
}


def compressed(model, folder, data, **options):
    done = octavo.compress(
        model, **{"ratio": 4, "data": [data], "objective": "kl", "preset": "fast", "methods": ["rtn"], **options}
    )
    return done, done.save(folder, report=False)


def measured(done, old, new):
    objective, held = done.opened.objective, done.opened.held_data
    with torch.inference_mode():
        return float(objective.measure(new.eval(), held, objective.reference(old.eval(), held)).mean())


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_memory_loads_by_its_own_class(name, tmp_path):
    torch.manual_seed(0)
    make, data = MODELS[name]
    model = make().eval()
    before = copy.deepcopy(model)
    done, report = compressed(model, tmp_path / "out", data())
    new, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert report["quality"]["loader"] == f"{type(model).__name__}.from_pretrained(path)"
    assert 0 < report["quality"]["value"] == pytest.approx(measured(done, model, new), rel=1e-3)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.state_dict().items())
    assert model.config.to_dict() == before.config.to_dict()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    assert {
        key: config[key] for key in ("hidden_size", "d_model") if key in config
    }.items() <= before.config.to_dict().items()
    octavo.verify(tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 4, "preset": "fast"},
        {"target": "memory", "ratio": 3, "preset": "fast"},
        {"target": "speed", "speedup": 1.01},
    ],
    ids=str,
)
def test_a_model_that_nobody_else_holds_is_saved_too(options, tmp_path):
    """What is made of a source outlives it, and so must the folder of its configuration."""
    done = octavo.compress(llama(), data=[tokens()], progress=False, **options)
    done.save(tmp_path / "out", report=False)
    assert type(octavo.load(tmp_path / "out")) is T.LlamaForCausalLM


@pytest.mark.parametrize("name", ["llama", "bert", "qwen3-moe"])
def test_it_loads_into_the_model_as_well(name, tmp_path):
    torch.manual_seed(0)
    make, data = MODELS[name]
    model = make().eval()
    compressed(model, tmp_path / "out", data())
    other, new = make().eval(), type(model).from_pretrained(tmp_path / "out").eval()
    octavo.load(tmp_path / "out", into=other)
    with torch.inference_mode():
        torch.testing.assert_close(other(**data()).logits, new(**data()).logits, rtol=1e-4, atol=1e-5)


def test_a_model_in_half_precision_stays_in_it(tmp_path):
    torch.manual_seed(0)
    model = llama().to(torch.bfloat16).eval()
    _, report = compressed(model, tmp_path / "out", tokens(), ratio=2)
    new = T.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in new.parameters()} == {torch.bfloat16}
    assert report["source"]["bytes"] == sum(2 * parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a tokenizer and settings for generation."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("pretrained") / "source"
    words = {word: index for index, word in enumerate(["<pad>", "<unk>", *(f"w{i}" for i in range(198))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    T.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", chat_template="{{ messages }}"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    model = llama()
    model.generation_config = T.GenerationConfig(**FORCED)
    model.save_pretrained(folder)
    return folder


def test_a_tokenizer_comes_along_from_the_model_s_folder(folder, tmp_path):
    model = T.AutoModelForCausalLM.from_pretrained(folder)
    compressed(model, tmp_path / "out", tokens())
    tokenizer = T.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("w1 w2")["input_ids"] == T.AutoTokenizer.from_pretrained(folder)("w1 w2")["input_ids"]
    assert tokenizer.chat_template == "{{ messages }}"
    new = T.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert new.generation_config.max_new_tokens == 3
    made = new.generate(**tokenizer("w1 w2 w3", return_tensors="pt", return_token_type_ids=False))
    assert made.shape[1] <= 6


def test_settings_of_generation_that_were_changed_in_memory_are_kept(folder, tmp_path):
    model = T.AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.max_new_tokens = 5
    compressed(model, tmp_path / "out", tokens())
    assert T.GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 5


def test_a_model_from_an_artifact_is_compressed_again(folder, tmp_path):
    octavo.compress(folder, ratio=2, preset="data-free", methods=["rtn"]).save(tmp_path / "one", report=False)
    model = T.AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    done, report = compressed(model, tmp_path / "two", tokens(), ratio=4)
    new = T.AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert report["quality"]["value"] == pytest.approx(measured(done, model, new), rel=1e-3)


def tied_by_hand():
    model = llama(tie_word_embeddings=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def layers_by_hand():
    """Layers that share their weights, which no configuration says."""
    model = llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


def untied_by_hand():
    """A head of its own where the configuration ties it."""
    model = llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 0.1 * torch.randn(200, 32))
    return model


@pytest.mark.parametrize("make", [tied_by_hand, layers_by_hand])
def test_what_was_tied_by_hand_reaches_the_loader(make, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    done, report = compressed(model, tmp_path / "out", tokens())
    new, info = T.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert report["quality"]["value"] == pytest.approx(measured(done, model, new), rel=1e-3)
    ((alias, name),) = done.opened.source.aliases.items()
    assert torch.equal(new.get_parameter(alias), new.get_parameter(name))
    # It is stored once.
    assert report["source"]["bytes"] == sum(4 * parameter.numel() for parameter in model.parameters())


def test_what_was_untied_by_hand_is_never_loaded_as_tied(tmp_path):
    torch.manual_seed(0)
    model = untied_by_hand().eval()
    done, report = compressed(model, tmp_path / "out", tokens())
    new = T.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert new.lm_head.weight is not new.model.embed_tokens.weight
    assert report["quality"]["value"] == pytest.approx(measured(done, model, new), rel=1e-3)
    assert report["quality"]["value"] < 0.5


def wider(model):
    model.model.layers[0].mlp.up_proj = nn.Sequential(nn.Linear(32, 48, bias=False), nn.Linear(48, 64, bias=False))


def pruned(model):
    del model.model.layers[1]


def more_words(model):
    model.lm_head = nn.Linear(32, 300, bias=False)


def one_more_layer(model):
    model.extra = nn.Linear(64, 64)


def test_a_model_with_more_words_is_opened_by_the_manifest(tmp_path):
    torch.manual_seed(0)
    model = llama()
    more_words(model)
    done, report = compressed(model.eval(), tmp_path / "out", tokens())
    new = T.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert len(new.lm_head.weight) == 300
    assert 0 < report["quality"]["value"] == pytest.approx(measured(done, model, new), rel=1e-3)


@pytest.mark.parametrize("change", [wider, pruned, one_more_layer])
def test_a_model_of_another_structure_is_a_plain_module(change, tmp_path):
    torch.manual_seed(0)

    def make():
        model = llama()
        change(model)
        return model.eval()

    model = make()
    done, report = compressed(model, tmp_path / "out", tokens())
    assert [note for note in done.notes if "loads with octavo.load(path, into=...)" in str(note)]
    assert not (tmp_path / "out" / "config.json").exists()
    assert report["quality"]["loader"] == "octavo.load(path, into=module)"
    new = octavo.load(tmp_path / "out", into=make())
    assert 0 < report["quality"]["value"] == pytest.approx(measured(done, model, new), rel=1e-3)


class Own(T.LlamaForCausalLM):
    """A class that no one finds in ``transformers``."""


def test_only_models_of_the_library_s_own_classes_are_taken_for_theirs(tmp_path):
    torch.manual_seed(0)
    model = Own(llama().config).eval()
    assert is_pretrained(llama()) and not is_pretrained(model) and not is_pretrained(nn.Linear(2, 2))
    _, report = compressed(model, tmp_path / "out", tokens())
    assert report["quality"]["loader"] == "octavo.load(path, into=module)"


def larger(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {"vocab_size": 200, "num_hidden_layers": 3, "max_position_embeddings": 64, "initializer_range": 0.1}
    return T.LlamaForCausalLM(T.LlamaConfig(**{**sizes, **config, **options}))


def one_layer_twice(model):
    model.model.layers[2] = model.model.layers[1]


def one_norm_twice(model):
    model.model.layers[2].input_layernorm = model.model.layers[0].input_layernorm


def head_is_the_table(model):
    model.lm_head.weight = model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("tie", "packed"),
    [(one_layer_twice, False), (one_layer_twice, True), (one_norm_twice, False), (head_is_the_table, False)],
)
def test_what_is_tied_by_hand_is_loaded_under_each_name(tie, packed, tmp_path):
    model = larger().eval()
    tie(model)
    octavo.compress(model, ratio=3, preset="data-free", methods=["rtn", "keep"]).save(tmp_path / "out", report=False)
    loaded = octavo.load(tmp_path / "out", packed=packed)
    x = torch.randint(6, 200, (8, 12))
    with torch.no_grad():
        # A cache would mix the states of a layer that is there twice.
        one, two = model(x, use_cache=False).logits, loaded(x, use_cache=False).logits
    assert (one - two).norm() < 0.2 * one.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_models_of_every_dtype_are_verified(dtype, tmp_path):
    model = larger().to(dtype)
    batch = {"input_ids": torch.randint(6, 200, (24, 12))}
    done = octavo.compress(model, ratio=3, data=[batch], preset="fast", methods=["rtn"])
    report = done.save(tmp_path / "out")
    loaded, objective = T.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype), done.opened.objective
    held = done.opened.held_data
    found = float(objective.measure(loaded.eval(), held, objective.reference(model.eval(), held)).mean())
    # Attention over short sequences is computed in another way while Octavo measures.
    assert report["quality"]["value"] == pytest.approx(found, rel=1e-2 if dtype == torch.bfloat16 else 1e-3)
    assert octavo.verify(tmp_path / "out").outputs_match is True
