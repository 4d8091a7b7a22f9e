"""Encoders of sentence-transformers under every target: what runs as a whole is measured, what does not is said."""

import pytest
import torch

import octavo

sentences = pytest.importorskip("sentence_transformers")
WORDS = ["the", "ship", "king", "sun", "old", "big", "red", "sea", "two", "one"]
TEXTS = [" ".join(WORDS[(k * m) % 10] for m in range(1, 8)) for k in range(48)]


@pytest.fixture(scope="module", params=[False, True], ids=["pooling alone", "a layer behind"])
def encoder(request, tmp_path_factory):
    from sentence_transformers import models
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=120, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "bert")
    vocabulary = {word: k for k, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=32, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(folder / "bert")
    transformer = models.Transformer(str(folder / "bert"))
    modules = [transformer, models.Pooling(32)]
    modules += [models.Dense(32, 16)] if request.param else []
    sentences.SentenceTransformer(modules=modules).save(str(folder / "encoder"))
    return folder / "encoder", request.param


def test_memory(encoder, tmp_path):
    source, layered = encoder
    done = octavo.compress(source, ratio=1.8, target="memory", data=TEXTS, preset="fast")
    report = done.save(tmp_path / "out")
    packed = octavo.verify(tmp_path / "out").packed
    assert 0 < packed.held <= packed.stated
    assert (report["running"]["quality"] is None) == layered
    assert ("cannot run packed" in report["running"]["note"]) == layered
    if layered:
        with pytest.raises(octavo.RequestError, match="layers after its transformer"):
            octavo.evaluate(tmp_path / "out", against=source, data=TEXTS, packed=True)
    else:
        assert octavo.evaluate(tmp_path / "out", against=source, data=TEXTS, packed=True).mean < 0.1
    assert octavo.evaluate(tmp_path / "out", against=source, data=TEXTS).mean < 0.1


def test_speed(encoder, tmp_path):
    pytest.importorskip("onnxruntime")
    source, layered = encoder
    if layered:
        with pytest.raises(octavo.RequestError, match=r"layers behind its transformer \(2_Dense/"):
            octavo.compress(source, target="speed", speedup=1.01, shape="1x8", data=TEXTS)
        return
    report = octavo.compress(source, target="speed", latency="5s", shape="1x8", data=TEXTS).save(tmp_path / "out")
    assert report["quality"]["value"] is not None
    assert octavo.verify(tmp_path / "out").weights_match
