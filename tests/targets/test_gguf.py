"""GGUF files of every architecture, read by ``transformers`` and, where it is installed, by llama.cpp."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import octavo
from octavo.runtimes.gguf.llama import has_llama_cpp

T = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
WITHOUT = "pip install llama-cpp-python compares with llama.cpp itself"
SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
STRETCHED = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
KINDS = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama untied": lambda: T.LlamaForCausalLM(T.LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "llama stretched": lambda: T.LlamaForCausalLM(T.LlamaConfig(**SIZES, rope_parameters=STRETCHED)),
    "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)),
    "gemma3": lambda: T.Gemma3ForCausalLM(
        T.Gemma3TextConfig(**{**SIZES, "num_attention_heads": 1, "num_key_value_heads": 1}, sliding_window=16)
    ),
    "gpt2": lambda: T.GPT2LMHeadModel(
        T.GPT2Config(vocab_size=320, n_positions=64, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0)
    ),
}


def tokens(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 320, (4, 24), generator=generator)} for _ in range(count)]


def saved(kind: str, folder: Path) -> Any:
    """A small model of a kind whose outputs depend on everything, saved."""
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.data += 0.2 * torch.randn_like(parameter)
        elif "embed" not in name:
            parameter.data *= 6
    model.save_pretrained(folder)
    return model


def compressed(source: Any, **budget: Any) -> Any:
    return octavo.compress(source, target="gguf", data=tokens(), preset="fast", **(budget or {"bits": 9}))


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(**tokens(1)[0]).logits.log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_other_programs_read_what_was_measured(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path / "source")
    report = compressed(str(tmp_path / "source")).save(tmp_path / "out")
    assert (tmp_path / "out/model.gguf").stat().st_size == report.artifact.bytes
    with pytest.raises(octavo.ArtifactError, match=r"another runtime.*octavo verify"):
        octavo.load(tmp_path / "out")
    # The folder has no config.json: no call of from_pretrained(path) opens it.
    assert (report.quality.loader, report.quality.became) == ("", "model.gguf")
    assert octavo.verify(tmp_path / "out").quality == report.quality
    assert report.command == 'octavo.compress(source, bits=9, target="gguf").save(path)'
    (section,) = (section for section in report.sections if section.name == "gguf")
    if not has_llama_cpp():
        assert "octavo[llama]" in section.notes[0]
    elif section.figures:
        # llama.cpp rounds inputs of matrices to 8 bits.
        assert section.figures["apart"] < 2e-3 and section.figures["divergence"] < 0.02
    if kind in ("llama stretched", "qwen3", "gemma3", "gpt2"):
        return  # transformers reads neither the table of frequencies, nor the size of heads, nor GPT-2's sizes
    read = T.AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32).eval()
    wanted, found = logits(model), logits(read)
    divergence = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert divergence < 3 * report.quality.value + 1e-4


def test_the_best_uniform_plan_is_there_beside_one_of_equal_bytes(tmp_path: Path) -> None:
    """Several types take 4.5 bits, so a mix of them takes the same bytes at every site and is still another plan."""
    model = saved("llama", tmp_path / "source")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name:  # even levels suit weights that are spread evenly
                parameter.uniform_(-0.2, 0.2)
    model.save_pretrained(tmp_path / "source")
    done = octavo.compress(str(tmp_path / "source"), target="gguf", data=tokens(), size=49350)
    types = {
        min(curve.points, key=lambda point: (point.bytes > 0.6 * math.prod(curve.shape), point.loss)).setting["type"]
        for curve in done.profile.curves
    }
    assert {"q4_0", "iq4_nl"} <= types
    assert done.rival is not None and done.rival.plan.is_uniform
    assert done.built.quality <= done.rival.quality


def test_a_source_in_gguf_keeps_its_metadata_and_tokenizer(tmp_path: Path) -> None:
    saved("llama", tmp_path / "source")
    tokenizer(tmp_path / "source")
    compressed(str(tmp_path / "source"), bits=12).save(tmp_path / "first")
    compressed(str(tmp_path / "first/model.gguf"), ratio=1.3).save(tmp_path / "second")
    first, second = (gguf.GGUFReader(tmp_path / name / "model.gguf").fields for name in ("first", "second"))
    assert set(first) == set(second)
    for name in first:
        if name.startswith(("llama.", "tokenizer.")):
            assert first[name].contents() == second[name].contents(), name


def test_blocks_of_a_gguf_source_are_taken_over(tmp_path: Path) -> None:
    saved("llama", tmp_path / "source")
    tokenizer(tmp_path / "source")
    compressed(str(tmp_path / "source"), bits=5.5).save(tmp_path / "first")
    file = tmp_path / "first/model.gguf"
    report = compressed(str(file), size=file.stat().st_size + 128).save(tmp_path / "second")
    assert report.quality.value == 0
    first, second = (
        {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in gguf.GGUFReader(path).tensors}
        for path in (file, tmp_path / "second/model.gguf")
    )
    assert first == second


def tokenizer(folder: Path, size: int = 300) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=["<end>"])
    made.train_from_iterator([(Path(octavo.__file__).parent / "pipeline.py").read_text()], trainer)
    found = T.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", bos_token="<end>")
    found.save_pretrained(folder)
    return found


def test_llama_cpp_splits_text_as_the_tokenizer_does(tmp_path: Path) -> None:
    package = pytest.importorskip("llama_cpp", reason=WITHOUT, exc_type=Exception)
    saved("llama", tmp_path / "source")
    own = tokenizer(tmp_path / "source")
    compressed(str(tmp_path / "source")).save(tmp_path / "out")
    model = package.Llama(str(tmp_path / "out/model.gguf"), vocab_only=True, verbose=False)
    for text in (
        "The sea, 1851: it's calm.",
        "def f(x):\n    return x + 10**3",
        "naïve façade — 東京 🙂",
        "  two  spaces",
    ):
        assert model.tokenize(text.encode(), add_bos=False) == own(text, add_special_tokens=False)["input_ids"]


def test_a_width_that_no_block_divides_keeps_16_bits_and_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    T.LlamaForCausalLM(T.LlamaConfig(**{**SIZES, "hidden_size": 80})).save_pretrained(tmp_path / "source")
    done = compressed(str(tmp_path / "source"), bits=15.5)
    assert any("keep 16 bits" in str(note) and "multiple of 32" in str(note) for note in done.notes)
    settings = {name: point.setting for name, point in done.built.plan.points.items()}
    assert settings["model.layers.0.self_attn.q_proj.weight"] == {"dtype": "float16"}
    assert "type" in settings["model.layers.0.mlp.down_proj.weight"]


def bert(folder: Path) -> str:
    config = T.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    T.BertModel(config).save_pretrained(folder)
    return str(folder)


def odd_rope(folder: Path) -> str:
    saved("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": yarn}))
    return str(folder)


def large_vocabulary(folder: Path) -> str:
    saved("llama", folder)
    tokenizer(folder, 400)
    return str(folder)


def other_tokenizer(folder: Path) -> str:
    saved("llama", folder)
    tokenizer(folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return str(folder)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: nn.Sequential(nn.Linear(64, 64)), "needs a model folder of transformers or a GGUF file"),
        (bert, "type 'bert' cannot be written for llama.cpp yet; --for gguf knows llama"),
        (odd_rope, "'yarn' cannot be written"),
        (large_vocabulary, "400 tokens, and the embedding 320 rows"),
        (other_tokenizer, "splits text in a way that llama.cpp is not known to have"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused_with_a_mend(make: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(octavo.RequestError, match=told):
        compressed(make(tmp_path / "source"))


def test_a_size_below_the_smallest_types_names_the_limit(tmp_path: Path) -> None:
    saved("llama", tmp_path / "source")
    with pytest.raises(octavo.BudgetError, match="at most") as raised:
        compressed(str(tmp_path / "source"), ratio=40)
    assert compressed(str(tmp_path / "source"), ratio=raised.value.limit - 0.01).ratio > 4


def test_a_pinned_type_is_kept(tmp_path: Path) -> None:
    saved("llama", tmp_path / "source")
    done = compressed(str(tmp_path / "source"), bits=8, keep={"*embed*": "ggml:type=q8_0", "*.0.*q_proj*": "float16"})
    settings = {name: point.setting for name, point in done.built.plan.points.items()}
    assert settings["model.embed_tokens.weight"] == {"type": "q8_0"}
    assert settings["model.layers.0.self_attn.q_proj.weight"] == {"dtype": "float16"}


def test_a_damaged_file_is_told_by_verify(tmp_path: Path) -> None:
    saved("llama", tmp_path / "source")
    compressed(str(tmp_path / "source")).save(tmp_path / "out", report=False)
    file, record = tmp_path / "out/model.gguf", tmp_path / "out/octavo-files.json"
    assert octavo.verify(tmp_path / "out").bytes == file.stat().st_size
    whole, told = file.read_bytes(), record.read_text()
    outside = told.replace("model.gguf", "../source/model.safetensors")
    for content, words in (
        (whole[:-1] + b"\7", told),
        (whole[:-32], told),
        (whole, outside),
        (whole, "{"),
        (whole, "[]"),
    ):
        file.write_bytes(content)
        record.write_text(words)
        with pytest.raises(octavo.ArtifactError, match="copy the folder again"):
            octavo.verify(tmp_path / "out")
    # A folder that Octavo wrote is replaced on request.
    file.write_bytes(whole)
    record.write_text(told)
    with pytest.raises(octavo.RequestError, match="not empty"):
        compressed(str(tmp_path / "source")).save(tmp_path / "out")
    compressed(str(tmp_path / "source")).save(tmp_path / "out", overwrite=True)
