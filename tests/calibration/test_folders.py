"""Folders of images and sounds as data: through the model's own processor, for every kind of model that takes them."""

import json

import numpy as np
import pytest
import torch
import transformers as T
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

import octavo
from octavo.calibration.inputs import load_data
from octavo.cli import app
from octavo.errors import RequestError
from octavo.sources.files import from_path

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {**SIZES, "vocab_size": 100, "max_position_embeddings": 40}
MARKS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SEEN = {**SIZES, "image_size": 16, "patch_size": 8}
HEARD = {
    **SIZES, "vocab_size": 32, "conv_dim": (32,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
COUNT = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of images and of sounds."""
    place, draw = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    for number in range(COUNT):
        pixels = draw.integers(0, 256, (20 + number % 3, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number:02d}.png")
        write_wav(place / f"{number:02d}.wav", draw.normal(size=400) / 8)
    return place


def write_wav(file, samples):
    import wave

    with wave.open(str(file), "wb") as opened:
        opened.setnchannels(1), opened.setsampwidth(2), opened.setframerate(8000)
        opened.writeframes((samples * 2**15).clip(-(2**15), 2**15 - 1).astype("<i2").tobytes())


def tokenizer(**more):
    words = {f"w{index}": index for index in range(100) if index != 5} | {"<image>": 5}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return T.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w3", pad_token="w0", **more)


def eyes():
    return T.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def vit():
    return T.ViTForImageClassification(T.ViTConfig(**SEEN)), [T.ViTImageProcessor(size={"height": 16, "width": 16})]


def wav2vec2():
    return T.Wav2Vec2ForCTC(T.Wav2Vec2Config(**HEARD)), [T.Wav2Vec2FeatureExtractor()]


def whisper():
    config = T.WhisperConfig(
        vocab_size=100, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=20, max_target_positions=12, **MARKS,
        decoder_start_token_id=1,
    )  # fmt: skip
    extractor = T.WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=400)
    return T.WhisperForConditionalGeneration(config), [extractor, tokenizer()]


def clip():
    config = T.CLIPConfig(text_config={**TEXT, **MARKS}, vision_config=SEEN, projection_dim=16)
    return T.CLIPModel(config), [T.CLIPProcessor(eyes(), tokenizer())]


def llava(**more):
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**SEEN), text_config=T.LlamaConfig(**TEXT, **MARKS), image_token_index=5,
        vision_feature_layer=-1,
    )  # fmt: skip
    words = tokenizer(extra_special_tokens={"image_token": "<image>"})
    processor = T.LlavaProcessor(eyes(), words, 8, "default", num_additional_image_tokens=1, **more)
    return T.LlavaForConditionalGeneration(config), [processor]


def written(made, place):
    torch.manual_seed(0)
    model, processors = made()
    model.save_pretrained(place)
    for processor in processors:
        processor.save_pretrained(place)
    return place


@pytest.mark.parametrize(
    ("made", "says", "shapes"),
    [
        (vit, "12 images", {"pixel_values": (8, 3, 16, 16)}),
        (wav2vec2, "12 sounds", {"input_values": (8, 800)}),
        (whisper, "12 sounds with what the model itself writes", {"input_features": (8, 8, 40)}),
        (clip, "12 images with built-in English text", {"input_ids": (8, 40), "pixel_values": (8, 3, 16, 16)}),
        (llava, "12 images with built-in English text", {"pixel_values": (1, 3, 16, 16)}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_files_go_through_the_processor(made, says, shapes, folder, tmp_path):
    source = from_path(written(made, tmp_path / "model"))
    batches, label = load_data(source, folder, limit=None)
    assert label == f"{folder.name}, {says}"
    found = {key: tuple(value.shape) for key, value in batches[0].items()}
    assert found.items() >= shapes.items()
    assert sum(len(next(iter(batch.values()))) for batch in batches) == COUNT
    if "decoder_input_ids" in found:
        assert all(bool((batch["decoder_input_ids"][:, 0] == 1).all()) for batch in batches)
    if made is llava:
        assert all(bool(((batch["input_ids"] == 5).sum(1) == 4).all()) for batch in batches)


def test_texts_beside_the_files_are_what_a_decoder_writes(folder, tmp_path):
    place = tmp_path / "heard"
    place.mkdir()
    for number in range(COUNT):
        (place / f"{number}.wav").write_bytes((folder / f"{number:02d}.wav").read_bytes())
        (place / f"{number}.txt").write_text("w7 w8 w9")
    batches, label = load_data(from_path(written(whisper, tmp_path / "model")), str(place), limit=10)
    assert label == "heard, 10 sounds with their texts"
    assert all(row.tolist() == [1, 7, 8] for batch in batches for row in batch["decoder_input_ids"])


def test_a_chat_template_is_followed(folder, tmp_path):
    template = (
        "{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }} {% endfor %}{% endfor %}"
    )
    source = from_path(written(lambda: llava(chat_template=template), tmp_path / "model"))
    batches, _ = load_data(source, folder, limit=10)
    # A role, the four places of the image, and the four words of a question come first.
    assert all(batch["input_ids"][0, 1:5].tolist() == [5] * 4 for batch in batches)


def printed(*words):
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_compress_and_evaluate_from_the_command_line(folder, tmp_path):
    model, out = written(vit, tmp_path / "model"), tmp_path / "out"
    how = ("--ratio", 3, "--preset", "fast", "--methods", "rtn")
    report = printed("compress", model, "--data", folder, "--out", out, *how)
    assert report["quality"]["data"] == f"3 held-out examples of {folder.name}, 12 images"
    found = printed("evaluate", out, "--against", model, "--data", folder)
    assert found["mean"] > 0 and found["data"] == f"{folder.name}, 12 images"


def test_folders_that_do_not_serve_are_named(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    seeing = written(vit, tmp_path / "vit")
    with pytest.raises(RequestError, match=r"empty: holds no images \(.png, .*which ViTForImageClassification takes"):
        octavo.compress(seeing, ratio=3, data=empty)
    with pytest.raises(RequestError, match="forward_args selects the inputs of a batch, but no batches are given"):
        octavo.compress(seeing, ratio=3, data=folder, forward_args=lambda batch: batch)
    with pytest.raises(RequestError, match="BertModel takes neither images nor sounds; give a file of texts"):
        load_data(
            from_path(written(lambda: (T.BertModel(T.BertConfig(**TEXT)), []), tmp_path / "bert")), folder, limit=8
        )
    (seeing / "preprocessor_config.json").unlink()
    with pytest.raises(RequestError, match=r"its processor cannot be loaded.*copy preprocessor_config.json"):
        octavo.compress(seeing, ratio=3, data=folder)
    save_file({"weight": torch.randn(64, 64)}, tmp_path / "bare.safetensors")
    with pytest.raises(RequestError, match="has no model to run"):
        octavo.compress(tmp_path / "bare.safetensors", ratio=3, data=folder)
