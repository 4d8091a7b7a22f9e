"""Soft prompts: read before the tokens, trained alone, kept in a file beside an artifact."""

import itertools

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import octavo
from octavo.errors import ArtifactError, RequestError
from octavo.training import Prompted, SoftPrompt, fit, next_token


def llama(seed=0, width=32):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=width, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
        )
    ).eval()  # fmt: skip


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=24)).eval()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_prompt_of_embeddings_is_read_as_their_tokens(make):
    model, ahead, ids = make(), torch.tensor([7, 3, 9]), torch.randint(0, 50, (2, 8))
    prompt = SoftPrompt(model.get_input_embeddings()(ahead))
    whole = model(torch.cat([ahead.expand(2, -1), ids], 1)).logits
    torch.testing.assert_close(Prompted(model, prompt)(ids), whole[:, 3:], rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing():
    model = Prompted(llama(), SoftPrompt.start(llama(), 4))
    ids = torch.randint(0, 50, (1, 6))
    padded, mask = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], 1), torch.tensor([[1] * 6 + [0] * 3])
    torch.testing.assert_close(model(padded, mask)[:, :6], model(ids), rtol=1e-4, atol=1e-5)


def test_training_changes_the_prompt_alone(tmp_path):
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(0, 50, (1, 12)).repeat(8, 1)
    prompted = Prompted(model, SoftPrompt.start(model, 5))
    batches = [{"input_ids": part} for part in ids.split(4)]
    first = next_token(prompted, batches[0]).item()
    fit(prompted, lambda epoch: batches, next_token, epochs=20, lr=5e-2)
    assert next_token(prompted, batches[0]).item() < first - 0.5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training


def test_it_is_kept_beside_an_artifact(tmp_path):
    model = llama()
    octavo.save(model, tmp_path / "folded")
    size = octavo.Artifact(tmp_path / "folded").bytes
    prompt = SoftPrompt.start(model, 6, seed=3)
    prompt.save(tmp_path / "folded" / "soft_prompt.safetensors")
    assert octavo.verify(tmp_path / "folded").weights_match and octavo.Artifact(tmp_path / "folded").bytes == size
    read = SoftPrompt.load(tmp_path / "folded" / "soft_prompt.safetensors")
    assert torch.equal(read.vectors, prompt.vectors.half().float()) and read.length == 6
    again = octavo.load(tmp_path / "folded")
    ids = torch.randint(0, 50, (1, 6))
    torch.testing.assert_close(Prompted(again, read)(ids), Prompted(model, read)(ids))
    written = again.generate(**Prompted(again, read).embedded(ids), max_new_tokens=3, do_sample=False)
    assert written.shape == (1, 3)


def test_bad_input_is_named(tmp_path):
    model, prompt = llama(), SoftPrompt(torch.randn(20, 32))
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    for refused, says in (
        (lambda: Prompted(bert, prompt), "predicts no next token"),
        (lambda: Prompted(llama(width=16), prompt), "vectors of 32 numbers"),
        (lambda: SoftPrompt.start(model, 0), "length is 0"),
        (lambda: SoftPrompt.start(nn.Linear(2, 2)), "no embedding of tokens"),
        (lambda: SoftPrompt(torch.randn(3)), r"shape \(3,\)"),
        (lambda: Prompted(model, prompt)(torch.zeros(1, 60, dtype=torch.long)), "take 80 positions"),
        (lambda: Prompted(gpt2(), prompt)(torch.zeros(1, 5, dtype=torch.long)), "has 24"),
        (lambda: SoftPrompt.load(tmp_path / "missing.safetensors"), "no such file"),
    ):
        with pytest.raises(RequestError, match=says):
            refused()


def test_damaged_files_are_refused(tmp_path):
    file = tmp_path / "prompt.safetensors"
    SoftPrompt(torch.randn(4, 8)).save(file)
    content = file.read_bytes()
    numbers = itertools.count()

    def written(give) -> object:
        path = tmp_path / f"{next(numbers)}.safetensors"
        give(path)
        return path

    for give, says in (
        (lambda path: path.write_bytes(content[:-3]), "cannot be read"),
        (lambda path: save_file({"weight": torch.ones(2, 2)}, path), "holds weight and no soft prompt"),
        (lambda path: save_file({"soft_prompt": torch.ones(2)}, path), "no soft prompt"),
        (lambda path: save_file({"soft_prompt": torch.full((2, 2), float("nan"))}, path), "NaN or Inf"),
    ):
        with pytest.raises(ArtifactError, match=says):
            SoftPrompt.load(written(give))
