"""Models of transformers that are given in memory, in every dtype: what is stated, and what verify says of it."""

import pytest
import torch

import octavo

T = pytest.importorskip("transformers")


def llama(**options):
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
    model = llama().eval()
    tie(model)
    octavo.compress(model, ratio=3, preset="data-free").save(tmp_path / "out")
    loaded = octavo.load(tmp_path / "out", packed=packed)
    x = torch.randint(6, 200, (8, 12))
    with torch.no_grad():
        # A cache would mix the states of a layer that is there twice.
        one, two = model(x, use_cache=False).logits, loaded(x, use_cache=False).logits
    assert (one - two).norm() < 0.2 * one.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_models_of_every_dtype_are_verified(dtype, tmp_path):
    model = llama().to(dtype)
    batch = {"input_ids": torch.randint(6, 200, (24, 12))}
    done = octavo.compress(model, ratio=3, data=[batch], preset="fast")
    report = done.save(tmp_path / "out")
    loaded, objective = T.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype), done.job.objective
    held = done.job.held_data
    found = float(objective.measure(loaded.eval(), held, objective.reference(model.eval(), held)).mean())
    assert report["quality"]["value"] == pytest.approx(found, rel=1e-3)
    assert octavo.verify(tmp_path / "out")["outputs_match"] is True
