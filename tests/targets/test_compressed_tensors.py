"""A folder of compressed-tensors: plain transformers loads it, its files take what was stated, its weights are ours."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import octavo
from octavo.allocation.encoded import as_weights
from octavo.artifact import Packed, Sized
from octavo.calibration.evidence import Evidence
from octavo.errors import BudgetError, MissingExtraError, RequestError
from octavo.methods import get_method
from octavo.runtimes.pack_quantized import PackQuantized
from octavo.targets import get_target

pytest.importorskip("compressed_tensors")

WORDS = 512
BATCHES = [
    {"input_ids": torch.randint(0, WORDS, (8, 16), generator=torch.Generator().manual_seed(seed))} for seed in range(4)
]
LLAMA = {
    "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "untied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=False)).bfloat16(),
    "bert": lambda: BertModel(
        BertConfig(
            vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64,
        )
    ).half(),
}  # fmt: skip

#: A process that knows nothing of Octavo: it loads folders, which hold packed weights, and saves their outputs.
READER = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
inputs = load_file(sys.argv[1])["inputs"]
for folder in sys.argv[2:]:
    cls = AutoModel if "bert" in folder else AutoModelForCausalLM
    model, info = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert any("weight_packed" in name for name in model.state_dict())
    with torch.inference_mode():
        save_file({"outputs": model.eval()(inputs)[0]}, folder + ".outputs")
assert "octavo" not in sys.modules
"""


def source(folder, name):
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """By the kind of a tiny model: a folder with it and its result, the compression, and the report."""
    found = {}
    for name in MODELS:
        folder = tmp_path_factory.mktemp(name)
        source(folder / "source", name)
        done = octavo.compress(
            folder / "source", bits=10, target="compressed-tensors", data=BATCHES, preset="fast", progress=False
        )
        found[name] = (name, folder, done, done.save(folder / name).to_json())
    return found


@pytest.fixture(params=MODELS)
def written(request, every):
    return every[request.param]


def test_plain_transformers_computes_with_the_weights_that_were_measured(every, tmp_path):
    inputs = BATCHES[0]["input_ids"]
    save_file({"inputs": inputs}, tmp_path / "inputs")
    folders = [folder / name for name, folder, _, _ in every.values()]
    command = [sys.executable, "-c", READER, tmp_path / "inputs", *folders]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert ran.returncode == 0, ran.stderr
    for name, folder, done, report in every.values():
        model = type(done.opened.source.module).from_pretrained(folder / "source", dtype=torch.float32).eval()
        state = model.state_dict()
        for tensor, value in as_weights(done.opened, done.built.packed).items():
            state[done.opened.source.parameters[tensor]].copy_(value)
        with torch.inference_mode():
            wanted = model(inputs)[0]
        far = float((load_file(folder / f"{name}.outputs")["outputs"] - wanted).norm() / wanted.norm())
        # Models in 16 bits round what is decoded to them.
        assert far < (1e-3 if name == "llama" else 5e-3), name
        assert report["loaded"]["quality"] == pytest.approx(report["quality"]["value"], rel=1e-3, abs=1e-7)


def test_both_files_take_the_bytes_that_were_planned(written):
    kind, folder, done, report = written
    sizes = {name: (folder / kind / name).stat().st_size for name in ("model.safetensors", "config.json")}
    assert report["artifact"]["files"] == sizes and sum(sizes.values()) == done.built.counted <= done.budget.bytes
    assert done.built.counted >= done.budget.least or report["artifact"]["note"]
    assert not (folder / kind / "octavo.json").exists() and not list((folder / kind).glob(".*proof*"))


def test_its_folder_is_a_source_of_an_artifact(written, tmp_path):
    name, folder, _, _ = written
    octavo.compress(folder / name, bits=8, preset="data-free", progress=False).save(tmp_path / "out")
    assert not (tmp_path / "out" / "octavo-files.json").exists()
    octavo.verify(tmp_path / "out")


def test_parts_that_runtimes_join_have_one_setting_and_everything_else_is_named(written):
    name, folder, done, _ = written
    points = {site: (point.method, point.setting) for site, point in done.built.plan.points.items()}
    for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value")):
        for site in [site for site in points if f".{parts[0]}." in site]:
            assert all(points[site] == points[site.replace(parts[0], part)] for part in parts)
    config = json.loads((folder / name / "config.json").read_text())
    said = config["quantization_config"]
    assert said["quant_method"] == "compressed-tensors" and said["format"] == "pack-quantized"
    targets = [module for group in said["config_groups"].values() for module in group["targets"]]
    model = type(done.opened.source.module)(type(done.opened.source.module.config).from_dict(config))
    linear = {module for module, part in model.named_modules() if isinstance(part, nn.Linear)}
    assert len(targets) == len(set(targets)) and set(targets) <= linear <= {*targets, *said["ignore"]}
    assert {site for site, (method, _) in points.items() if method == "wna16"} == {f"{one}.weight" for one in targets}


def test_embeddings_and_tied_heads_keep_16_bits_and_that_is_said(written):
    name, folder, done, _ = written
    table = "embeddings.word_embeddings" if name == "bert" else "model.embed_tokens"
    with safe_open(folder / name / "model.safetensors", "pt") as file:
        assert file.get_tensor(f"{table}.weight").dtype.itemsize == 2
        assert ("lm_head.weight" in file.keys()) <= (name == "untied")  # noqa: SIM118
    assert any("kept in 16 bits" in note.text for note in done.notes)


def test_widths_that_no_group_divides_keep_16_bits_and_that_is_said(tmp_path):
    LlamaForCausalLM(LlamaConfig(**{**LLAMA, "intermediate_size": 120})).save_pretrained(tmp_path / "odd")
    done = octavo.compress(tmp_path / "odd", bits=14, target="compressed-tensors", preset="data-free", progress=False)
    points = done.built.plan.points
    assert points["model.layers.0.mlp.down_proj.weight"].method == "keep"
    assert any("no multiple of 32" in note.text for note in done.notes)
    report = done.save(tmp_path / "out").to_json()
    assert report["loaded"]["weights"]["float16"] >= 2 * 64 * 120


def test_gains_go_into_the_scales(tmp_path):
    torch.manual_seed(0)
    factors = 1 + torch.linspace(-0.1, 0.1, 32).view(16, 2)
    grid = get_method("wna16").encode(torch.randn(16, 64), {"bits": 4, "group": 32}, Evidence(torch.ones(16), None))
    target = get_target("compressed-tensors")
    assert target.gains(grid) == 2
    scaled = target.scaled(grid, factors)
    assert type(scaled) is type(grid) and scaled.scale.dtype == grid.scale.dtype
    assert torch.allclose(scaled.dense(), grid.dense() * factors.repeat_interleave(32, 1), rtol=2**-8)
    LlamaForCausalLM(LlamaConfig(**LLAMA, initializer_range=0.2)).half().save_pretrained(tmp_path / "source")
    done = octavo.compress(
        tmp_path / "source", bits=10, target="compressed-tensors", data=BATCHES, methods=["wna16"], progress=False
    )
    # Reconstruction ran: what it fitted is in scales and norms, or was no better.
    assert {packed.meta["form"] for packed in done.built.packed.values()} == {"grid", "dense"}
    report = done.save(tmp_path / "out").to_json()
    assert report["loaded"]["quality"] == pytest.approx(report["quality"]["value"], rel=1e-2, abs=1e-6)


def test_what_it_cannot_serve_is_refused_with_the_mend(tmp_path, monkeypatch):
    folder = source(tmp_path / "source", "llama")

    def compress(given, **how):
        how = {"ratio": 3, "data": BATCHES, "preset": "fast", **how}
        return octavo.compress(given, target="compressed-tensors", progress=False, **how)

    with pytest.raises(
        RequestError, match=r"Sequential: --for compressed-tensors needs a model folder.*save_pretrained"
    ):
        compress(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), data=torch.randn(16, 64))
    with pytest.raises(RequestError, match=r"model\.safetensors: --for compressed-tensors needs a model folder"):
        compress(folder / "model.safetensors", data=None)
    with pytest.raises(RequestError, match=r"--keep 'model\.embed_tokens\.weight'.*16 bits alone; choose bfloat16"):
        compress(folder, keep={"*embed*": "wna16:bits=4,group=32"})
    with pytest.raises(RequestError, match=r"--keep 'model.*gptq has no form in the formats of compressed-tensors"):
        compress(folder, keep={"*q_proj*": "gptq:bits=4,group=32"})
    with pytest.raises(RequestError, match=r"method 'rtn' has no form in the formats of compressed-tensors"):
        compress(folder, methods=["rtn"])
    with pytest.raises(BudgetError, match=r"needs at least .* bytes of model\.safetensors and config\.json"):
        compress(folder, ratio=60)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'octavo\[compressed-tensors\]'"):
        compress(folder)


@pytest.mark.parametrize("columns", [32, 96, 576, 4096])
@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_tell_how_a_weight_is_stored(columns, bits):
    for groups in {1, *(columns // group for group in (32, 64, 128) if columns % group == 0)}:
        stored = PackQuantized(bits, groups, torch.bfloat16)
        parts = {"codes": [0, 9], "scale": [9, 7, "bfloat16", 1, groups]}
        packed = Packed(Sized(16), parts, {"form": "grid"}, {}, stored.bytes((48, columns)))
        assert PackQuantized.of_packed(packed, (48, columns)) == stored
