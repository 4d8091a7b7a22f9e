"""Causal language models of all kinds, in memory and block by block; and what cannot be served is said clearly."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from typer.testing import CliRunner

import octavo
from octavo.calibration.inputs import choose_objective, model_of
from octavo.calibration.objective import KL
from octavo.cli import app
from octavo.errors import RequestError
from octavo.sources.files import from_path

WORDS = [f"word{index}" for index in range(59)]
TEXTS = [" ".join(WORDS[(7 * line + 3 * place) % 59] for place in range(5 + line % 9)) for line in range(60)]
SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
KINDS = {
    "grouped queries": (transformers.LlamaForCausalLM, {**SIZES, "num_key_value_heads": 2}),
    "fused projections": (transformers.Phi3ForCausalLM, {**SIZES, "num_key_value_heads": 2}),
    "fused and transposed": (
        transformers.GPT2LMHeadModel,
        {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0},
    ),
    "sliding windows, tied": (
        transformers.Gemma3ForCausalLM,
        {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4},
    ),
}
#: Too little for any model as a whole.
LITTLE = "1GB"


def write(kind: str, folder: Path) -> Path:
    cls, sizes = KINDS[kind]
    torch.manual_seed(0)
    cls(cls.config_class(**sizes)).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(["<s>", *WORDS])}, unk_token="<s>"))
    tokenizer.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write("grouped queries", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("memory", [None, LITTLE], ids=["whole", "blocks"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_meets_its_budget(kind, memory, tmp_path):
    source = write(kind, tmp_path / "model")
    done = octavo.compress(source, ratio=3, data=TEXTS, methods=["entropy"], preset="fast", memory=memory)
    assert done.opened.source.is_skeleton == (memory is not None)
    data = done.save(tmp_path / "out", report=False)
    assert 0.98 * done.budget.bytes <= data["artifact"]["bytes"] <= done.budget.bytes
    assert data["quality"]["metric"] == "KL divergence" and 0 < data["quality"]["value"] < 1
    linear = [row for row in data["sites"] if row["kind"] == "linear"]
    # Nothing was left without evidence: every projection, fused or not, was seen.
    assert linear and not data["calibration"]["warnings"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert bool(torch.isfinite(model(torch.arange(8)[None]).logits).all())


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [("evidence", 4), ("profile", 3), ("encode", 4)])
def test_block_by_block_a_killed_run_writes_the_same_bytes(at, llama, tmp_path):
    def run(resume, stop=None):
        def progress(step, done, total):
            if (step, done) == stop:
                raise Killed

        return octavo.compress(
            llama, ratio=3, data=TEXTS, methods=["entropy"], preset="fast", memory=LITTLE, workspace=tmp_path / "work",
            resume=resume, progress=progress,
        )  # fmt: skip

    with pytest.raises(Killed):
        run(False, at)
    run(True).save(tmp_path / "resumed")
    run(False).save(tmp_path / "straight")
    for name in ("model.safetensors", "octavo.json"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


@pytest.mark.parametrize("blockwise", [False, True], ids=["whole", "blocks"])
def test_kl_depends_neither_on_batch_size_nor_on_padding(blockwise, llama):
    source = from_path(llama)
    wanted = choose_objective(source, None)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 60, (length,), generator=generator) for length in (5, 9, 12, 7, 12, 3)]
    name = "model.layers.0.mlp.up_proj.weight"
    changed = {name: source.read(name) + 0.02 * torch.randn(source.shapes[name], generator=generator)}

    def measured(size, extra):
        batches = []
        for at in range(0, len(rows), size):
            some = rows[at : at + size]
            width = max(map(len, some)) + extra
            tokens = torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=7) for row in some])
            mask = torch.stack([(torch.arange(width) < len(row)).long() for row in some])
            batches.append({"input_ids": tokens, "attention_mask": mask})
        return model_of(from_path(llama), blockwise=blockwise).measure(batches, wanted, changed)

    alone = measured(1, 0)
    assert alone.shape == (6,) and bool((alone > 0).all())
    for size, extra in ((2, 0), (6, 0), (3, 11)):
        torch.testing.assert_close(measured(size, extra), alone, rtol=1e-2, atol=1e-7)


def test_batches_are_cut_to_what_their_logits_take(llama):
    source = from_path(llama)
    batch = {"input_ids": torch.zeros(40, 1 << 16, dtype=torch.long), "name": "all of them"}
    pieces = KL().pieces(source.module, [batch])
    sizes = [len(piece["input_ids"]) for piece in pieces]
    assert sum(sizes) == 40 and len(sizes) > 1
    assert all(4 * size * (1 << 16) * 60 <= 1 << 28 for size in sizes)
    assert all(piece["name"] == "all of them" for piece in pieces)


def test_the_source_is_kept_as_hidden_states_where_its_outputs_are_large(llama, monkeypatch):
    batches = [{"input_ids": torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(k))} for k in (0, 1)]
    source = from_path(llama)
    wanted = choose_objective(source, None)
    names = ("model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight")
    generator = torch.Generator().manual_seed(0)
    changed = {n: source.read(n) + 0.02 * torch.randn(source.shapes[n], generator=generator) for n in names}
    kept = model_of(from_path(llama), blockwise=False).measure(batches, wanted, changed)
    monkeypatch.setattr("octavo.calibration.inmemory._REFERENCE_BYTES", 0)
    model = model_of(source, blockwise=False)
    again = model.measure(batches, wanted, changed)
    torch.testing.assert_close(again, kept, rtol=1e-5, atol=1e-9)
    assert model.measure(batches, wanted, {}).tolist() == [0.0] * 4


def test_perplexity_is_the_same_block_by_block(llama, tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    whole = octavo.evaluate(llama, data=tmp_path / "texts.txt", metric="perplexity")
    monkeypatch.setattr("octavo.sources.memory._SHARE", 0)
    blocks = octavo.evaluate(llama, data=tmp_path / "texts.txt", metric="perplexity")
    assert math.isclose(whole.perplexity, blocks.perplexity, rel_tol=1e-5)


def test_a_tokenizer_of_another_model_is_refused(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    tokenizer = Tokenizer(WordLevel({word: index + 40 for index, word in enumerate(["<s>", *WORDS])}, unk_token="<s>"))
    tokenizer.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<s>").save_pretrained(folder)
    with pytest.raises(
        RequestError, match="token 99, but LlamaForCausalLM knows tokens 0 to 59, so the tokenizer belongs"
    ):
        octavo.compress(folder, ratio=3, data=TEXTS, preset="fast")


def test_more_context_than_the_model_has_is_refused(llama):
    batches = [{"input_ids": torch.zeros(16, 65, dtype=torch.long)}]
    with pytest.raises(RequestError, match="65 tokens, and LlamaForCausalLM takes 64 at most"):
        octavo.compress(llama, ratio=3, data=batches, preset="fast")


def test_an_unknown_architecture_is_compressed_as_bare_tensors_and_that_is_said(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "odd", "architectures": ["OddModel"]}))
    result = CliRunner().invoke(
        app, ["compress", str(folder), "--ratio", "3", "--preset", "fast", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.stderr
    assert "the architecture 'odd' is not known to transformers" in " ".join(result.stdout.split())
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert any("'odd' is not known" in note for note in data["calibration"]["warnings"])
    assert set(octavo.load(tmp_path / "out")) == set(from_path(llama).shapes)
    with pytest.raises(RequestError, match="so calibration data cannot be used"):
        octavo.compress(folder, ratio=3, data=TEXTS)


def test_an_unknown_architecture_that_was_compressed_without_data_gives_its_tensors(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "odd", "architectures": ["OddModel"]}))
    octavo.compress(folder, ratio=3, preset="data-free").save(tmp_path / "out")
    assert set(octavo.load(tmp_path / "out")) == set(from_path(llama).shapes)


def test_a_model_that_lacks_weights_is_refused_by_name(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(llama, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError, match=r"model.layers.1.mlp.up_proj.weight' is not in the source's weights"):
        octavo.compress(folder, ratio=3, data=TEXTS, preset="fast", memory=LITTLE)
