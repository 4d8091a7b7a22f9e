"""What quality means by default, by what the class of a model returns."""

import json

import pytest
import torch
import transformers as T
from torch import nn

from octavo.calibration.objective import KL, Cosine, Squared
from octavo.calibration.purposes import default_objective, returned_fields
from octavo.errors import RequestError
from octavo.sources.files import from_path
from octavo.sources.source import from_module

TEXT = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 40,
}  # fmt: skip
SEEN = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16}
VIT = T.ViTConfig(**SEEN, patch_size=8)
CLIP = T.CLIPConfig(text_config=TEXT, vision_config={**SEEN, "patch_size": 8}, projection_dim=16)
BERT, MPNET = T.BertConfig(**TEXT), T.MPNetConfig(**TEXT)


def t5():
    # A model of the encoder alone changes the configuration that it is given.
    return T.T5Config(vocab_size=60, d_model=32, d_ff=32, num_layers=1, num_heads=2)


@pytest.mark.parametrize(
    ("kind", "config", "expected"),
    [
        (T.BertForMaskedLM, BERT, KL),
        (T.BertForPreTraining, BERT, KL),
        (T.BertForNextSentencePrediction, BERT, KL),
        (T.BertForQuestionAnswering, BERT, KL),
        (T.BertForMultipleChoice, BERT, KL),
        (T.BertForTokenClassification, BERT, KL),
        (T.BertForSequenceClassification, T.BertConfig(**TEXT, num_labels=3), KL),
        (T.BertForSequenceClassification, T.BertConfig(**TEXT, num_labels=1), Squared),
        (T.BertForSequenceClassification, T.BertConfig(**TEXT, problem_type="multi_label_classification"), Squared),
        (T.BertModel, BERT, Cosine),
        (T.GPT2LMHeadModel, T.GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2), KL),
        (T.T5ForConditionalGeneration, t5(), KL),
        (T.T5EncoderModel, t5(), Cosine),
        (T.ElectraForPreTraining, T.ElectraConfig(**TEXT), Squared),
        (T.ViTForImageClassification, VIT, KL),
        (T.ViTModel, VIT, Cosine),
        (T.YolosForObjectDetection, T.YolosConfig(**{**SEEN, "image_size": [16, 16]}, patch_size=8), Squared),
        (T.ViTForMaskedImageModeling, VIT, Squared),
        (T.CLIPModel, CLIP, Cosine),
        (T.CLIPTextModelWithProjection, CLIP.text_config, Cosine),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_objectives_by_what_a_class_returns(kind, config, expected):
    assert type(default_objective(from_module(kind(config)), None)) is expected


def test_returned_names_are_those_of_the_annotation():
    class Own(nn.Module):
        def forward(self, x) -> "tuple | T.modeling_outputs.MaskedLMOutput":
            return x

    assert returned_fields(T.BertForQuestionAnswering) >= {"start_logits", "end_logits"}
    assert returned_fields(Own) == set() and returned_fields(nn.Linear) == set()


def written(model, folder, modules=None, **config):
    model.save_pretrained(folder)
    if config:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    if modules is not None:
        kinds = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (kind, path) in enumerate(modules)]
        (folder / "modules.json").write_text(json.dumps(kinds))
    return folder


TRANSFORMER = ("sentence_transformers.models.Transformer", "")


def test_a_body_that_names_a_head_is_measured_as_a_body(tmp_path):
    folder = written(T.MPNetModel(MPNET), tmp_path, architectures=["MPNetForMaskedLM"])
    source = from_path(folder)
    assert type(source.module) is T.MPNetModel and type(default_objective(source, folder)) is Cosine


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "max+mean"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len_tokens"),
        ({"pooling_mode": "max"}, "max"),
        ({"pooling_mode": ["mean", "cls"]}, "mean+cls"),
        ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, "cls"),
        ({}, "mean"),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", ["1_Pooling", "2_Pool"])
def test_pooling_is_that_of_the_folder(config, expected, place, tmp_path):
    listed = [("sentence_transformers.models.Pooling", place)] if place != "1_Pooling" else []
    folder = written(T.BertModel(BERT), tmp_path, [TRANSFORMER, *listed])
    (folder / place).mkdir()
    (folder / place / "config.json").write_text(json.dumps({"embedding_dimension": 32, **config}))
    assert default_objective(from_path(folder), folder).pooling == expected


@pytest.mark.parametrize("mode", ["middle", 7, ["cls", 7]])
def test_an_unknown_pooling_names_its_file(mode, tmp_path):
    folder = written(T.BertModel(BERT), tmp_path, [TRANSFORMER])
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
    with pytest.raises(RequestError, match=r"1_Pooling/config\.json"):
        default_objective(from_path(folder), folder)


def test_what_is_measured_is_what_sentence_transformers_gives(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    written(T.BertModel(BERT), tmp_path / "bert")
    words = {f"w{index}": index for index in range(60)}
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w1").save_pretrained(
        tmp_path / "bert"
    )
    body = Transformer(str(tmp_path / "bert"))
    whole = st.SentenceTransformer(
        modules=[body, Pooling(32, pooling_mode=("lasttoken", "mean"), include_prompt=False)],
        prompts={"ask": "w7 w8 "}, default_prompt_name="ask", device="cpu",
    )  # fmt: skip
    whole.save(str(tmp_path / "st"))
    from octavo.calibration.inputs import choose_objective, load_data, model_of

    source = from_path(tmp_path / "st")
    texts = sorted((" ".join(f"w{(3 * i + j) % 60}" for j in range(4 + i % 5)) for i in range(12)), key=len)
    batches, _ = load_data(source, texts, limit=None)
    wanted = choose_objective(source, None)
    assert (wanted.pooling, wanted.prompt) == ("lasttoken+mean", 2)
    ours = torch.cat(list(model_of(source, blockwise=False).outputs(batches, wanted)))
    theirs = nn.functional.normalize(torch.from_numpy(whole.encode(texts)), dim=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
