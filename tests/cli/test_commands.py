"""The commands, each with ``--json``, on one small folder of bare tensors and one small language model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

import octavo
from octavo.allocation.profiles import Profile
from octavo.cli import app
from octavo.methods import methods
from octavo.verification.foreign import record

TEXT = "the a cat dog bird sees hears likes red blue old small house tree river and then again never"
WORDS = TEXT.split()


def run(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


def read(*words, code=0):
    """The one JSON value that a command prints on standard output, and nothing else."""
    return json.loads(run(*words, "--json", code=code).stdout)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bare") / "bare.safetensors"
    save_file(
        {"one.weight": torch.randn(256, 256), "two.weight": torch.randn(256, 200), "bias": torch.randn(256)}, path
    )
    return path


@pytest.fixture(scope="module")
def measured(bare, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured") / "profile"
    return folder, read("profile", bare, "--out", folder, "--methods", "entropy,keep,rtn")


@pytest.fixture(scope="module")
def folded(bare, tmp_path_factory):
    out = tmp_path_factory.mktemp("folded") / "out"
    return out, read("compress", bare, "--ratio", 8, "--out", out, "--preset", "fast")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["<eos>", *WORDS])}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<eos>").save_pretrained(
        folder / "source"
    )
    config = GPT2Config(vocab_size=600, n_positions=64, n_embd=96, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder / "source")
    generator = np.random.default_rng(0)
    lines = [" ".join(generator.choice(WORDS, generator.integers(4, 14))) for _ in range(40)]
    (folder / "texts.txt").write_text("\n".join(lines))
    out = folder / "out"
    read(
        "compress",
        folder / "source",
        "--ratio",
        6,
        "--out",
        out,
        "--data",
        folder / "texts.txt",
        "--preset",
        "fast",
        "--methods",
        "entropy",
    )
    return folder / "source", folder / "texts.txt", out


def size_of(folder):
    return sum((folder / name).stat().st_size for name in ("model.safetensors", "octavo.json"))


def test_compress(bare, folded):
    out, result = folded
    original = sum(t.numel() * t.element_size() for t in load_file(bare).values())
    assert 0.98 * original / 8 <= size_of(out) <= original / 8
    assert result["artifact"]["bytes"] == size_of(out)
    assert result["budget"]["bytes"] == original // 8
    assert set(octavo.load(out)) == {"one.weight", "two.weight", "bias"}
    assert not list(out.parent.glob(".out*")), "unfinished work was left behind"


def test_profile(measured):
    folder, result = measured
    assert result["sites"] == 2 and result["points"] >= 20 and result["largest_ratio"] > 16
    assert result["profile"] == str(folder)
    saved = Profile.load(folder / "profile.json")
    assert (
        {"entropy", "keep", "rtn"} >= {point.method for curve in saved.curves for point in curve.points} >= {"entropy"}
    )


def test_plan_and_compress_from_the_profile(bare, measured, tmp_path):
    folder, _ = measured
    for ratio in (6, 12):
        planned = read("plan", folder, "--ratio", ratio, "--out", tmp_path / f"{ratio}.yaml")
        assert planned["bytes"] <= planned["budget"] and planned["expected"] > 0
        assert set(yaml.safe_load((tmp_path / f"{ratio}.yaml").read_text())["sites"]) == {"one.weight", "two.weight"}
        out = tmp_path / f"out{ratio}"
        result = read("compress", bare, "--profile", folder, "--ratio", ratio, "--out", out)
        assert 0.98 * planned["budget"] <= size_of(out) <= planned["budget"]
        assert result["quality"]["value"] is None and "bare tensors" in result["quality"]["why"]
    assert (folder / "profile.json").exists(), "the profile is the user's"
    default = read("plan", folder, "--size", "60kB")
    assert default["plan"] == str(folder / "plan.yaml") and default["budget"] == 60_000


def test_compress_from_an_edited_plan(bare, measured, tmp_path):
    folder, _ = measured
    planned = read("plan", folder, "--ratio", 6, "--out", tmp_path / "plan.yaml")
    data = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    data["sites"]["one.weight"] = {"method": "rtn", "setting": {"bits": 2, "group": 64}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(data))
    out = tmp_path / "out"
    read("compress", bare, "--profile", folder, "--plan", tmp_path / "plan.yaml", "--out", out)
    shown = read("inspect", out)
    assert shown["sites"]["one.weight"]["form"] == "grid"
    rows = octavo.load(out)["one.weight"].unflatten(1, (4, 64))
    assert max(len(group.unique()) for row in rows for group in row) <= 4
    assert size_of(out) <= planned["budget"]
    again = tmp_path / "again"
    read("compress", bare, "--plan", tmp_path / "plan.yaml", "--out", again)
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_frontier(bare, tmp_path):
    rows = read(
        "frontier",
        bare,
        "--ratios",
        "4,8,16",
        "--out",
        tmp_path / "f",
        "--preset",
        "fast",
        "--methods",
        "entropy,rtn",
        "--families",
    )
    assert [row["asked"] for row in rows] == [4, 8, 16]
    for row in rows:
        assert row["ratio"] >= row["asked"] and 0.98 <= row["used"] <= 1
        assert row["uniform"] is None or row["quality"] <= row["uniform"]
        assert "quantize" in row["families"]
    qualities = [row["quality"] for row in rows]
    assert qualities == sorted(qualities)


def test_inspect(folded):
    out, result = folded
    shown = read("inspect", out)
    assert shown["bytes"] == size_of(out) and shown["ratio"] == pytest.approx(result["artifact"]["ratio"])
    header = json.loads((out / "model.safetensors").read_bytes()[8:].split(b"}}", 1)[0].decode() + "}}")
    for name, site in shown["sites"].items():
        start, stop = header[name]["data_offsets"]
        assert site["bytes"] == stop - start
    assert shown["kept"] == 1 and shown["sites"]["two.weight"]["shape"] == [256, 200]


def test_verify(folded, model):
    result = read("verify", folded[0])
    assert result["weights_match"] is True and result["outputs_match"] is None and result["tensors"] == 3
    assert read("verify", model[2])["outputs_match"] is True


def test_verify_finds_damage(folded, tmp_path):
    for file in ("model.safetensors", "octavo.json"):
        (tmp_path / file).write_bytes((folded[0] / file).read_bytes())
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    result = read("verify", tmp_path, code=1)
    assert result["error"] == "ArtifactError" and "checksum" in result["message"]


def test_evaluate(model):
    source, texts, out = model
    same = read("evaluate", source, "--against", source, "--data", texts)
    other = read("evaluate", out, "--against", source, "--data", texts)
    assert same["mean"] == 0 and 0 < other["mean"] < 0.5 and other["examples"] == 20  # windows
    assert other["p95"] >= other["mean"] and other["metric"] == "KL divergence"


def test_methods():
    rows = read("methods")
    assert [row["name"] for row in rows] == sorted(methods())
    for row in rows:
        assert row["family"] and row["source"] and row["what"] and row["preset"] in ("fast", "default", "best", "named")


@pytest.mark.parametrize("kind", ["methods", "forms", "cuts", "regimens", "targets", "flows", "studies"])
def test_lists_have_one_line_each_that_fits_a_terminal(kind, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rows = read("methods", "--kind", kind)
    lines = CliRunner().invoke(app, ["methods", "--kind", kind]).stdout.splitlines()
    assert rows and [line.split()[0] for line in lines] == [row["name"] for row in rows]
    assert max(map(len, lines)) <= 80 and all(row["what"] for row in rows)
    refused = CliRunner().invoke(app, ["methods", "--kind", f"{kind}s"])
    assert refused.exit_code == 2 and "choose from methods, forms, cuts" in refused.output.replace("\n", " ")


def test_the_list_of_recipes_fits_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = CliRunner().invoke(app, ["reproduce", "--list"]).stdout.splitlines()
    names = [row["name"] for row in read("methods", "--kind", "studies")]
    assert [line.split()[0] for line in lines[: len(names)]] == names and max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    "words, code, error",
    [
        (("compress", "{bare}", "--out", "{tmp}/o"), 2, "RequestError"),
        (("compress", "{tmp}/nowhere", "--ratio", "8", "--out", "{tmp}/o"), 2, "RequestError"),
        (("compress", "{bare}", "--ratio", "100000", "--out", "{tmp}/o"), 3, "BudgetError"),
        (("compress", "{bare}", "--ratio", "8", "--keep", "x", "--out", "{tmp}/o"), 2, "RequestError"),
        (("plan", "{tmp}", "--ratio", "8"), 2, "RequestError"),
        (("inspect", "{tmp}"), 1, "ArtifactError"),
        (("verify", "{tmp}"), 1, "ArtifactError"),
        (("frontier", "{bare}", "--ratios", "x", "--out", "{tmp}/f"), 2, "RequestError"),
        (("evaluate", "{tmp}/nowhere"), 2, "RequestError"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else str(value),
)
def test_exit_codes(bare, tmp_path, words, code, error):
    filled = [word.format(bare=bare, tmp=tmp_path) for word in words]
    result = read(*filled, code=code)
    assert result["error"] == error and len(result["message"]) > 20
    assert not (tmp_path / "o").exists()
    if code == 3:
        assert result["limit"] > 1


def test_tables_are_printed_for_people(folded, measured, bare, tmp_path):
    assert "one.weight" in run("inspect", folded[0]).stdout
    assert "bit for bit" in run("verify", folded[0]).stdout
    assert "entropy" in run("methods").stdout
    assert "Expected loss" in run("plan", measured[0], "--ratio", 8, "--out", tmp_path / "p.yaml").stdout
    assert (
        "Artifact:"
        in run(
            "compress", bare, "--ratio", 8, "--out", tmp_path / "o", "--preset", "fast", "--methods", "entropy"
        ).stdout
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
@pytest.mark.parametrize("words", [["methods"], ["methods", "--json"], ["inspect", "/nothing", "--json"]], ids=" ".join)
def test_an_output_that_is_full_is_one_clear_error(words):
    code = "from octavo.cli import main; main()"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code, *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode != 0
    assert done.stderr.count("error:") >= 1 and "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_a_folder_of_another_runtime_has_a_report_and_no_manifest(folded, tmp_path):
    for name in ("report.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folded[0] / name).read_bytes())
    record(tmp_path, "other", {"model.safetensors": (tmp_path / "model.safetensors").stat().st_size}, 1 << 20, 3)
    run("report", tmp_path)
    assert "one.weight" in (tmp_path / "report.html").read_text()
    assert read("verify", tmp_path)["weights_match"]
    said = read("inspect", tmp_path, code=1)["message"]
    assert "octavo verify checks them, and the folder's report.html lists every weight" in said
    for command in ("report", "verify", "inspect"):
        assert "another runtime" in " ".join(run(command, "--help").stdout.replace("│", "").split())


def test_a_model_is_cut_by_a_command(model, tmp_path):
    source, data, _ = model
    given = ("cut", source, "--ratio", 1.2, "--units", "neuron", "--score", "magnitude", "--data", data)
    made = read(*given, "--out", tmp_path / "thin")
    assert made["artifact"]["ratio"] >= 1.2
    card = (tmp_path / "thin" / "README.md").read_text()
    assert "that are left are stored as they are. Budget: ratio 1.2, at most" in card
    assert json.loads((tmp_path / "thin" / "config.json").read_text())["n_inner"] < 384
    said = read("cut", source, "--ratio", 1.2, "--score", "taylr", "--out", tmp_path / "no", code=2)
    assert "did you mean 'taylor'" in said["message"]
    assert {"taylor", "activation"} <= {row["name"] for row in read("methods", "--kind", "scores")}
