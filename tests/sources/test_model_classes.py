"""The class of ``transformers`` that opens a folder."""

import json

import pytest
import transformers as T

from octavo.sources.model_classes import class_for

TEXT = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 40,
}  # fmt: skip
SEEN = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16}
VIT = T.ViTConfig(**SEEN, patch_size=8)
CLIP = T.CLIPConfig(text_config=TEXT, vision_config={**SEEN, "patch_size": 8}, projection_dim=16)
BERT, ROBERTA, MPNET = T.BertConfig(**TEXT), T.RobertaConfig(**TEXT), T.MPNetConfig(**TEXT)


def t5():
    # A model of the encoder alone changes the configuration that it is given.
    return T.T5Config(vocab_size=60, d_model=32, d_ff=32, num_layers=1, num_heads=2)


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


@pytest.mark.parametrize(
    ("model", "modules", "config", "expected"),
    [
        (T.MPNetForMaskedLM(MPNET), None, {}, T.MPNetForMaskedLM),
        (T.MPNetForMaskedLM(MPNET), [TRANSFORMER], {}, T.MPNetModel),
        (T.MPNetModel(MPNET), None, {"architectures": ["MPNetForMaskedLM"]}, T.MPNetModel),
        (T.BertModel(BERT), None, {"architectures": ["BertForPreTraining"]}, T.BertModel),
        (T.RobertaModel(ROBERTA), None, {"architectures": ["RobertaForSequenceClassification"]}, T.RobertaModel),
        (T.BertModel(BERT), None, {"architectures": None}, T.BertModel),
        (T.BertModel(BERT), None, {"architectures": ["BertForTelepathy"]}, T.BertModel),
        (T.GPT2LMHeadModel(T.GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2)), None, {}, T.GPT2LMHeadModel),
        (T.BertForMaskedLM(BERT), [("sentence_transformers.sparse_encoder.models.MLMTransformer", "")], {}, T.BertForMaskedLM),
        (T.T5EncoderModel(t5()), [TRANSFORMER], {}, T.T5EncoderModel),
        (T.T5ForConditionalGeneration(t5()), [TRANSFORMER], {}, T.T5EncoderModel),
        (T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**TEXT)), None, {}, T.GPTNeoXForCausalLM),
        (T.ViTForImageClassification(VIT), None, {}, T.ViTForImageClassification),
        (T.CLIPModel(CLIP), None, {}, T.CLIPModel),
    ],
)  # fmt: skip
def test_folders_are_opened_by_the_class_that_suits_their_files(model, modules, config, expected, tmp_path):
    assert class_for(written(model, tmp_path, modules, **config)) is expected
