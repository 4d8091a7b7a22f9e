"""Loaders of other libraries understand artifacts after ``import octavo``, whichever is imported first."""

import subprocess
import sys

import pytest
import torch

import octavo

sentences = pytest.importorskip("sentence_transformers")
WORDS = ["[PAD]", "[UNK]", "the", "ship", "king", "sun", "old", "big", "red", "sea"]

#: Two threads import the library at once, after somebody asked whether it is there.
OCTAVO_FIRST = """
import importlib.util, sys, threading
import octavo
assert "torch" not in sys.modules and "transformers" not in sys.modules
assert importlib.util.find_spec("transformers.quantizers.auto") and importlib.util.find_spec("transformers.configuration_utils")
def load():
    from transformers import AutoModel
    models.append(AutoModel.from_pretrained(folder))
"""
OCTAVO_LAST = """
import sys, threading
import sentence_transformers, transformers
import transformers.quantizers.auto
import octavo
def load():
    models.append(transformers.AutoModel.from_pretrained(folder))
"""
LOAD = """
folder, models = sys.argv[1], []
threads = [threading.Thread(target=load) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
import torch
from sentence_transformers import SentenceTransformer
encoder = SentenceTransformer(folder, device="cpu")
state = octavo.Artifact(folder).state()
assert len(models) == 2
for model in (*models, encoder[0].model):
    found = model.state_dict()
    assert state and all(torch.equal(found[name], state[name]) for name in state if name in found)
import json, pathlib
config = pathlib.Path(folder, "config.json")
config.write_text(json.dumps({**json.loads(config.read_text()), "transformers_weights": "other.safetensors"}))
try:
    from transformers import AutoConfig
    AutoConfig.from_pretrained(folder)
except octavo.ArtifactError as error:
    assert "transformers_weights" in str(error)
else:
    raise SystemExit("the configuration was not checked")
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("hooks")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes)).save_pretrained(folder / "bert")
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(
        folder / "bert"
    )
    sentences.SentenceTransformer(modules=[Transformer(str(folder / "bert")), Pooling(32)]).save(
        str(folder / "encoder")
    )
    octavo.compress(folder / "encoder", ratio=2, preset="data-free", progress=False).save(folder / "out")
    return folder / "out"


@pytest.mark.parametrize("order", [OCTAVO_FIRST, OCTAVO_LAST], ids=["octavo first", "octavo last"])
def test_artifacts_load_and_are_checked(order, artifact):
    config = artifact / "config.json"
    text = config.read_text()
    try:
        done = subprocess.run([sys.executable, "-c", order + LOAD, str(artifact)], capture_output=True, text=True)
    finally:
        config.write_text(text)
    assert done.returncode == 0, done.stderr
