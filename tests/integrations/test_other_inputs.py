"""Folders of models that take no text, or more than text; and texts for models with a decoder."""

import re

import pytest
import torch
import transformers as T
from tokenizers import Tokenizer, models, pre_tokenizers

import octavo
from octavo.calibration.inputs import load_data, model_of, prepared
from octavo.calibration.objective import KL
from octavo.errors import RequestError
from octavo.sources.files import from_path
from octavo.sources.tokens import check_tokens, is_causal

TEXTS = [" ".join(f"w{(5 * line + place) % 90 + 5}" for place in range(4 + line % 7)) for line in range(24)]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {
    **SIZES,
    "vocab_size": 100,
    "max_position_embeddings": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SEEN = {**SIZES, "image_size": 16, "patch_size": 8}
HEARD = {
    **SIZES, "vocab_size": 32, "conv_dim": (32,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
PAIRED = {
    "vocab_size": 100, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
CLIP = T.CLIPConfig(text_config=TEXT, vision_config=SEEN, projection_dim=16)


def vit():
    return T.ViTForImageClassification(T.ViTConfig(**SEEN))


def wav2vec2():
    return T.Wav2Vec2ForCTC(T.Wav2Vec2Config(**HEARD))


def whisper():
    return T.WhisperForConditionalGeneration(
        T.WhisperConfig(**PAIRED, num_mel_bins=8, max_source_positions=20, max_target_positions=40)
    )


def bart():
    return T.BartForConditionalGeneration(T.BartConfig(**PAIRED, max_position_embeddings=40))


def t5(kind=T.T5ForConditionalGeneration):
    return kind(T.T5Config(vocab_size=100, d_model=32, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0))


def llava():
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**SEEN), text_config=T.LlamaConfig(**TEXT), image_token_index=5
    )
    return T.LlavaForConditionalGeneration(config)


def write(model, folder, *, tokenizer=True):
    model.save_pretrained(folder)
    if tokenizer:
        words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(100)}, unk_token="w3"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        T.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w3", pad_token="w0").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model", "tokenizer", "says"),
    [
        (vit(), False, 'takes pixel_values, not text.*"pixel_values": tensor'),
        (vit(), True, 'takes pixel_values, not text.*"pixel_values": tensor'),
        (wav2vec2(), False, 'takes input_values, not text.*"input_values": tensor'),
        (whisper(), True, 'takes input_features, not text.*"input_features": tensor'),
        (T.CLIPModel(CLIP), True, "CLIPModel takes image besides text"),
        (T.BertModel(T.BertConfig(**TEXT)), False, 'vocab.txt.*"input_ids": tensor'),
        (T.LlamaForCausalLM(T.LlamaConfig(**TEXT)), False, "its tokenizer cannot be loaded"),
        (T.GPT2LMHeadModel(T.GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2)), False, "vocab.json"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_without_texts_that_serve_nothing_is_run_and_that_is_said(model, tokenizer, says, tmp_path):
    source = from_path(write(model, tmp_path, tokenizer=tokenizer))
    assert load_data(source, None, limit=8) == ([], "none (data-free)")
    (note,) = source.notes
    assert "compressed without data" in note
    assert re.search(says, note), note
    with pytest.raises(RequestError, match="texts cannot be used"):
        load_data(source, TEXTS, limit=8)


def test_the_note_reaches_the_report(tmp_path):
    done = octavo.compress(write(vit(), tmp_path / "vit", tokenizer=False), ratio=3, preset="fast", methods=["rtn"])
    assert any("pixel_values" in note for note in done.save(tmp_path / "out", report=False)["calibration"]["warnings"])


@pytest.mark.parametrize("model", [bart(), t5(), t5(T.T5Model)], ids=lambda model: type(model).__name__)
def test_a_decoder_gets_the_same_text_one_token_later(model, tmp_path):
    source = from_path(write(model, tmp_path))
    batches, label = load_data(source, TEXTS, limit=None)
    assert label == "texts given, 24 texts"
    start = model.config.decoder_start_token_id
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
        assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["input_ids"][:, :-1])
        assert bool((batch["decoder_input_ids"][:, 0] == start).all())
        assert torch.equal(batch["decoder_attention_mask"].sum(1), (batch["attention_mask"].sum(1) + 1).clamp_max(18))
    if not isinstance(model, T.T5Model):
        (outputs,) = model_of(source, blockwise=False).outputs(prepared(source, KL(), batches), KL())
        assert torch.equal((outputs != 0).any(-1).long(), batches[0]["decoder_attention_mask"])


@pytest.mark.parametrize("kind", [T.BartForSequenceClassification, T.BartModel], ids=lambda kind: kind.__name__)
def test_heads_that_give_their_decoder_its_tokens_get_none(kind, tmp_path):
    model = kind(T.BartConfig(**PAIRED, max_position_embeddings=40))
    batches, _ = load_data(from_path(write(model, tmp_path)), TEXTS, limit=None)
    assert ("decoder_input_ids" in batches[0]) is (kind is T.BartModel)


def test_models_that_see_are_calibrated_on_text_as_language_models_are(tmp_path):
    source = from_path(write(llava(), tmp_path))
    assert is_causal(source.module)
    batches, label = load_data(source, TEXTS, limit=None)
    assert "windows" in label and set(batches[0]) == {"input_ids"}


@pytest.mark.parametrize("kind", [tuple, iter, lambda texts: (text for text in texts)])
def test_texts_come_from_any_iterable(kind, tmp_path):
    source = from_path(write(llava(), tmp_path))
    (one, label), (two, _) = (load_data(source, given, limit=None) for given in (kind(TEXTS), list(TEXTS)))
    assert "texts given" in label and all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, two, strict=True)
    )


def test_texts_are_cut_to_what_a_model_takes(tmp_path):
    model = T.DistilBertModel(
        T.DistilBertConfig(vocab_size=100, dim=32, hidden_dim=32, n_layers=1, n_heads=2, max_position_embeddings=6)
    )
    source = from_path(write(model, tmp_path))
    batches, _ = load_data(source, TEXTS, limit=None)
    assert batches[0]["input_ids"].shape == (24, 6) and set(batches[0]) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (
            T.CLIPModel(CLIP),
            {"input_ids": torch.ones(2, 5, dtype=torch.long), "pixel_values": torch.zeros(2, 3, 16, 16)},
        ),
        (wav2vec2(), {"input_values": torch.zeros(2, 100)}),
        (vit(), {"pixel_values": torch.zeros(2, 3, 16, 16)}),
        (whisper(), {"input_features": torch.zeros(2, 8, 40), "decoder_input_ids": torch.ones(2, 5, dtype=torch.long)}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_batches_of_models_without_a_table_of_tokens_are_taken(model, batch):
    check_tokens(model, [batch])


def test_tokens_of_a_decoder_are_checked():
    ids = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(RequestError, match="token 100, but BartForConditionalGeneration knows tokens 0 to 99"):
        check_tokens(bart(), [{"input_ids": ids, "decoder_input_ids": ids + 99}])
