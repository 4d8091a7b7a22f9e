"""GGUF files as sources: a tiny Llama, written in place the way llama.cpp's converter writes one."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import octavo

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")
pytest.importorskip("accelerate")

WIDTH, HIDDEN, HEADS, LAYERS = 64, 128, 2, 2
CHARACTERS = [chr(code) for code in range(33, 127)] + ["Ġ"]
TOKENS = ["<s>", "</s>", *CHARACTERS, "re"]
TEXTS = [f"{a} {b} number {i}" for i, (a, b) in enumerate([("red", "fox"), ("blue", "hen"), ("old", "cat")] * 5)]


def write(path, *, leave_out=()):
    """A Llama with Q4_1 layers and a Q8_0 embedding, tied; returns the bytes of its tensors."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(["r e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    total = 0

    def add(name, rows, columns=None, kind="Q4_1"):
        nonlocal total
        if name in leave_out:
            return
        if columns is None:
            writer.add_tensor(name, np.ones(rows, np.float32))
            total += 4 * rows
            return
        values = torch.from_numpy(generator.standard_normal((rows, columns)).astype(np.float32) * 0.1)
        kind = gguf.GGMLQuantizationType[kind]
        data = gguf.quantize(values.bfloat16().float().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        total += data.nbytes

    add("token_embd.weight", len(TOKENS), WIDTH, "Q8_0")
    for layer in range(LAYERS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{part}.weight", WIDTH, WIDTH)
        for part, shape in (("ffn_gate", (HIDDEN, WIDTH)), ("ffn_up", (HIDDEN, WIDTH)), ("ffn_down", (WIDTH, HIDDEN))):
            add(f"blk.{layer}.{part}.weight", *shape)
        for part in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{part}.weight", WIDTH)
    add("output_norm.weight", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return total


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf"
    return path, write(path)


@pytest.fixture(scope="module")
def folded(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("folded") / "out"
    done = octavo.compress(source[0], size="100kB", data=TEXTS, preset="fast")
    return out, done.save(out), done


def test_original_bytes_are_those_in_the_file(source, folded):
    report = folded[1]["source"]
    assert report["bytes"] == source[1] == sum(report["stored"].values())
    assert set(report["stored"]) == {"Q4_1", "Q8_0", "F32"}
    assert report["dense_bytes"] > 4 * source[1]
    assert "already quantized (Q4_1" in folded[1]["calibration"]["warnings"][0]


def test_nothing_is_lost_and_the_artifact_needs_no_gguf(source, folded):
    path, (out, report, _) = source[0], folded
    original = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name].view(torch.int32), tensor.view(torch.int32)), name
    tokens = tokenizer("a red fox", return_tensors="pt")
    with torch.inference_mode():
        assert torch.equal(model(**tokens).logits, original(**tokens).logits)
    assert report["quality"]["value"] == 0 and "bit for bit" in report["artifact"]["note"]
    assert not list(out.glob("*.gguf"))
    assert octavo.verify(out).outputs_match is True


def test_a_folder_with_one_file_is_that_file(source):
    from octavo.sources.files import from_path

    assert from_path(source[0].parent).path == source[0]


def test_a_smaller_budget_is_met_with_loss(source, folded, tmp_path):
    lossless = folded[2].built.bytes
    done = octavo.compress(source[0], size=int(0.9 * lossless), data=TEXTS, preset="fast")
    report = done.save(tmp_path / "out", report=False)
    assert 0.98 <= report["artifact"]["used"] <= 1
    assert report["quality"]["value"] > 0


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.1, 0.5, 0.999])
def test_truncated_files_are_refused(source, tmp_path, share):
    file = tmp_path / "cut.gguf"
    content = source[0].read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(octavo.RequestError, match=r"cut\.gguf"):
        octavo.compress(file, ratio=1.1)


def test_a_file_that_lacks_weights_is_refused(tmp_path):
    file = tmp_path / "partial.gguf"
    write(file, leave_out=("blk.1.ffn_up.weight",))
    with pytest.raises(octavo.RequestError, match="lacks 1 weights"):
        octavo.compress(file, ratio=1.1)


def test_several_files_in_a_folder_must_be_told_apart(source, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(source[0].read_bytes())
    with pytest.raises(octavo.RequestError, match=r"a\.gguf or b\.gguf"):
        octavo.compress(tmp_path, ratio=1.1)


def test_a_missing_package_is_named(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(octavo.MissingExtraError, match=r"octavo\[gguf\]"):
        octavo.compress(source[0], ratio=1.1)
