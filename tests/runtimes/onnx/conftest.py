"""Tiny language models of several kinds, written as ``save_pretrained`` leaves them."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("onnxruntime", reason="needs the extra onnx")

WORDS = ["the", "of", "and", "in", "is", "it", "he", "was", "one", "two", "red", "old", "big", "sun", "sea", "ship"]
KINDS = ("bert", "llama", "gpt2", "gemma")


def write_model(kind: str, folder: Path) -> Path:
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    torch.manual_seed(0)
    # One layer: tracing takes seconds a layer, and a second one is traced like the first.
    size = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    decoder = {**size, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
    if kind == "bert":
        config = transformers.BertConfig(**size, intermediate_size=96, max_position_embeddings=64)
        model = transformers.BertModel(config)
    elif kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**decoder, tie_word_embeddings=True))
    elif kind == "gemma":
        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**decoder))
    else:
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=100, n_positions=64, n_embd=64, n_layer=1, n_head=4)
        )
    # Norms of other than one and zero, which an export could lose.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.eval().save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: k for k, word in enumerate(["[PAD]", "[UNK]", *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: write_model(kind, folder / kind) for kind in KINDS}


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    generator = torch.Generator().manual_seed(0)
    return [" ".join(WORDS[k] for k in torch.randint(0, 16, (24,), generator=generator)) for _ in range(48)]


@pytest.fixture(scope="session", autouse=True)
def _table(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Latencies measured by tests are no use to anybody else."""
    patch = pytest.MonkeyPatch()
    patch.setenv("OCTAVO_CACHE", str(tmp_path_factory.mktemp("cache")))
