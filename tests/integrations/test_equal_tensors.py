"""Matrices that are equal: those that the model ties are loaded through one copy, all others by their own names."""

from types import SimpleNamespace

import pytest
import torch
import transformers as T
from safetensors import safe_open
from safetensors.torch import save_file

import octavo

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 120, "max_position_embeddings": 64, "initializer_range": 0.1}
BERT = {**TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def upscaled():
    """Depth up-scaling, as mergekit's passthrough does it."""
    model = T.LlamaForCausalLM(T.LlamaConfig(**{**TEXT, "num_hidden_layers": 4}, tie_word_embeddings=False))
    model.model.layers[2].load_state_dict(model.model.layers[1].state_dict())
    return model


def untied_head():
    model = T.LlamaForCausalLM(T.LlamaConfig(**TEXT, tie_word_embeddings=False))
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    return model


def tied_head():
    return T.LlamaForCausalLM(T.LlamaConfig(**TEXT, tie_word_embeddings=True))


def from_one_encoder():
    encoder = T.BertModel(T.BertConfig(**BERT))
    config = T.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    decoder = T.BertLMHeadModel(config)
    decoder.bert.load_state_dict(encoder.state_dict(), strict=False)
    model = T.EncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model


def two_zeros():
    """Adapters and gates often start at zero."""
    model = T.LlamaForCausalLM(T.LlamaConfig(**TEXT, tie_word_embeddings=False))
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    return model


def tokens():
    return {"input_ids": torch.randint(10, 120, (24, 12), generator=torch.Generator().manual_seed(1))}


def both_sides():
    x = tokens()["input_ids"]
    return {"input_ids": x, "attention_mask": torch.ones_like(x), "decoder_input_ids": x[:, :7]}


#: A model, a batch, how many pairs of matrices are equal and not tied, and how many names the model ties.
MODELS = {
    "up-scaled": (upscaled, tokens, 7, 0),
    "untied head": (untied_head, tokens, 1, 0),
    "tied head": (tied_head, tokens, 0, 1),
    "one encoder": (from_one_encoder, both_sides, 14, 1),
    "two zeros": (two_zeros, tokens, 1, 0),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    torch.manual_seed(0)
    make, batch, equal, tied = MODELS[request.param]
    folder, model = tmp_path_factory.mktemp("equal"), make()
    model.save_pretrained(folder / "source")
    # Older files hold tied matrices under every name.
    every = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(every, folder / "source" / "model.safetensors", metadata={"format": "pt"})
    done = octavo.compress(folder / "source", ratio=4, data=[batch()], preset="fast", methods=["rtn"])
    report = done.save(folder / "out")
    return SimpleNamespace(
        kind=type(model), source=folder / "source", out=folder / "out", done=done, report=report, equal=equal, tied=tied
    )


def test_nothing_is_left_to_chance(case):
    model, info = case.kind.from_pretrained(case.out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    # Equal before, equal after.
    old, new = case.kind.from_pretrained(case.source).state_dict(), model.state_dict()
    sites = [name for name, tensor in old.items() if tensor.numel() >= 4096]
    pairs = [(a, b) for i, a in enumerate(sites) for b in sites[i + 1 :] if torch.equal(old[a], old[b])]
    assert len(pairs) >= case.equal + case.tied > 0
    assert all(torch.equal(new[a], new[b]) for a, b in pairs)
    again = case.kind.from_pretrained(case.out).state_dict()
    assert all(torch.equal(new[name], again[name]) for name in new)


def test_the_stated_quality_is_that_of_the_loaded_model(case):
    objective, held = case.done.opened.objective, case.done.opened.held_data
    old, new = (case.kind.from_pretrained(folder).eval() for folder in (case.source, case.out))
    real = float(objective.measure(new, held, objective.reference(old, held)).mean())
    assert 0 < real == pytest.approx(case.report["quality"]["value"], rel=1e-3)
    octavo.verify(case.out)


def test_equal_matrices_are_stored_once(case):
    artifact, source = octavo.Artifact(case.out), case.done.opened.source
    sites = {alias: name for alias, name in artifact.aliases.items() if name in artifact.sites}
    assert len(sites) == case.equal + case.tied and artifact.aliases == source.aliases
    # Original bytes are those of distinct tensors, and the artifact's are so many times fewer.
    stored = sum(file.stat().st_size for file in case.out.glob("*.safetensors"))
    assert stored + (case.out / "octavo.json").stat().st_size == artifact.bytes
    assert case.report["source"]["bytes"] == source.original_bytes >= 4 * artifact.bytes


def test_only_what_the_model_ties_has_no_entry_of_its_own(case):
    with safe_open(case.out / "model.safetensors", framework="pt") as file:
        entries = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    artifact = octavo.Artifact(case.out)
    without = {alias for alias, name in artifact.aliases.items() if name in artifact.sites and alias not in entries}
    assert len(without) == case.tied
    model = case.kind.from_pretrained(case.out)
    if case.tied:
        assert model.get_output_embeddings().weight is getattr(model, "decoder", model).get_input_embeddings().weight


def test_equal_matrices_of_a_plain_module_stay_apart(tmp_path):
    """Of a module, those that share their memory are tied, and no others."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3)))
    module[1].load_state_dict(module[0].state_dict())
    module[2].weight = module[0].weight
    done = octavo.compress(module, ratio=4, data=[torch.randn(32, 64)], preset="fast", methods=["rtn"])
    done.save(tmp_path / "out", report=False)
    artifact = octavo.Artifact(tmp_path / "out")
    assert artifact.aliases == {"2.weight": "0.weight"} and {"0.weight", "1.weight"} <= set(artifact.sites)
    other = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3)))
    octavo.load(tmp_path / "out", into=other)
    assert torch.equal(other[2].weight, other[0].weight)


@pytest.mark.parametrize("make", [upscaled, untied_head, tied_head])
def test_equal_matrices_without_data(make, tmp_path):
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "source")
    octavo.compress(tmp_path / "source", ratio=4, preset="data-free", methods=["rtn"]).save(
        tmp_path / "out", report=False
    )
    old = T.AutoModelForCausalLM.from_pretrained(tmp_path / "source").state_dict()
    model, info = T.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    for name, tensor in model.state_dict().items():
        assert float((tensor - old[name]).norm()) <= 0.2 * float(old[name].norm())
