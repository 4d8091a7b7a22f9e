"""Texts of a causal language model: windows of equal length, and figures that do not depend on how they are batched."""

import math

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import octavo
from octavo.calibration.objective import KL
from octavo.errors import RequestError
from octavo.sources.tokens import window_batches

WORDS = [f"word{index}" for index in range(60)]
TEXTS = [" ".join(WORDS[(7 * line + 3 * place) % 60] for place in range(5 + line % 9)) for line in range(80)]


def folder(path, *, first):
    """A tiny Llama with a tokenizer that begins a text with a token of its own, or does not."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(["<s>", *WORDS])}, unk_token="<s>"))
    tokenizer.pre_tokenizer = Whitespace()
    if first:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<s>").save_pretrained(path)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "first token"])
def llama(request, tmp_path_factory):
    return folder(tmp_path_factory.mktemp("llama"), first=request.param), request.param


def test_windows_hold_all_the_text_once(llama):
    path, first = llama
    rows = torch.cat([batch["input_ids"] for batch in window_batches(path, TEXTS, 20)])
    assert rows.shape[1] == 20 and set(window_batches(path, TEXTS, 20)[0]) == {"input_ids"}
    text = rows[:, 1:] if first else rows
    assert bool((rows[:, 0] == 0).all()) == first
    words = [WORDS.index(word) + 1 for line in TEXTS for word in line.split()]
    assert text.flatten().tolist() == words[: text.numel()]
    assert len(words) - text.numel() < text.shape[1]


def test_a_limit_takes_windows_from_the_whole_text(llama):
    path, _ = llama
    every = torch.cat([batch["input_ids"] for batch in window_batches(path, TEXTS, 16)]).tolist()
    some = torch.cat([batch["input_ids"] for batch in window_batches(path, TEXTS, 16, limit=320)]).tolist()
    assert len(some) == 20 and all(row in every for row in some)
    assert every.index(some[-1]) > 0.8 * len(every)


def test_short_texts_make_short_windows_and_too_short_ones_an_error(llama):
    path, _ = llama
    assert (
        window_batches(path, TEXTS[:40], 256)[0]["input_ids"].shape[1] == sum(len(t.split()) for t in TEXTS[:40]) // 20
    )
    with pytest.raises(RequestError, match="give at least 160 tokens"):
        window_batches(path, TEXTS[:10], 256)


@pytest.mark.parametrize("kind", ["windows", "padded"])
def test_divergence_does_not_depend_on_the_batch_size(llama, kind):
    path, _ = llama
    model = LlamaForCausalLM.from_pretrained(path).eval()
    other = LlamaForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.2)
    rows = torch.cat([batch["input_ids"] for batch in window_batches(path, TEXTS, 16)])[:12]
    mask = torch.ones_like(rows)
    if kind == "padded":
        for index in range(len(rows)):
            mask[index, 16 - index :] = 0
    results = []
    for size in (1, 5, 12):
        batches = [
            {"input_ids": rows[at : at + size], "attention_mask": mask[at : at + size]}
            for at in range(0, len(rows), size)
        ]
        objective = KL()
        results.append(objective.measure(other, batches, objective.reference(model, batches)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-9)
    assert float(results[0].mean()) > 0


def test_perplexity_is_that_of_the_next_token(llama, tmp_path):
    path, _ = llama
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS))
    found = octavo.evaluate(path, data=file, metric="perplexity")
    rows = torch.cat([batch["input_ids"] for batch in window_batches(path, TEXTS, 64)])
    with torch.no_grad():
        loss = LlamaForCausalLM.from_pretrained(path).eval()(input_ids=rows, labels=rows).loss
    assert found.tokens == rows[:, 1:].numel()
    assert found.perplexity == pytest.approx(math.exp(float(loss)), rel=1e-4)
