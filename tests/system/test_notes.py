"""Notes by kind: one line for all sites that they are of, on the command line and as warnings from Python."""

import warnings

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

import octavo
from octavo.cli import app
from octavo.system.notes import OctavoWarning, by_kind

SITES = [f"layer.{index}.weight" for index in range(12)]
FEW = "fewer calibration positions than input columns ({seen} for {columns}); more data would help"


def test_notes_that_differ_in_site_and_figures_are_of_one_kind():
    texts = [f"{site}: {FEW.format(seen=16, columns=64 * 2**n)}" for n, site in enumerate(SITES)]
    (note,) = by_kind(texts, SITES)
    assert note.sites == SITES
    assert str(note) == (
        "12 sites: fewer calibration positions than input columns; more data would help, e.g. layer.0.weight"
    )


def test_a_note_of_one_site_keeps_its_figures():
    text = f"{SITES[3]}: {FEW.format(seen=16, columns=64)}"
    assert [str(note) for note in by_kind([text], SITES)] == [text]


def test_kinds_keep_their_order_and_notes_of_the_whole_stay_whole():
    texts = [
        "folder: stored in 8 bits: rounded again",
        f"{SITES[0]}: no output depended on this weight during calibration",
        f"{SITES[1]}: {FEW.format(seen=3, columns=9)}",
        f"{SITES[2]}: no output depended on this weight during calibration",
        "nothing.here: no output depended on this weight during calibration",
    ]
    assert [str(note) for note in by_kind(texts, SITES)] == [
        texts[0],
        "2 sites: no output depended on this weight during calibration, e.g. layer.0.weight",
        texts[2],
        texts[4],
    ]
    assert by_kind([], SITES) == []


@pytest.fixture(scope="module")
def deep():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)), nn.Linear(64, 16)).eval()


@pytest.fixture(scope="module")
def told(deep):
    """A compression with little data, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = octavo.compress(
            deep,
            ratio=4,
            data=[torch.randn(8, 64) for _ in range(3)],
            objective="squared",
            methods=["rtn"],
            preset="fast",
        )
    return done, [warning for warning in caught if issubclass(warning.category, OctavoWarning)]


def test_python_warns_once_a_kind(told):
    done, caught = told
    texts = [str(warning.message) for warning in caught]
    assert texts == [str(note) for note in done.notes] and len(texts) == len(set(texts)) >= 1
    assert any(text.startswith("4 sites: fewer calibration positions") for text in texts)
    # They point at the caller.
    assert {warning.filename for warning in caught} == {__file__}
    assert issubclass(octavo.OctavoWarning, UserWarning)


def test_the_report_keeps_every_note_as_text(told, tmp_path):
    done, _ = told
    kept = done.save(tmp_path / "out", report=False)["calibration"]["warnings"]
    assert len(kept) >= 4 and all(isinstance(text, str) for text in kept)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("Warning:") == len(done.notes) and "4 sites" in card


def test_a_run_without_anything_to_say_does_not_warn(deep):
    with warnings.catch_warnings():
        warnings.simplefilter("error", OctavoWarning)
        octavo.compress(deep, ratio=4, preset="data-free")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of a small language model, and a text of few words for it."""
    torch.manual_seed(0)
    folder, words = (
        tmp_path_factory.mktemp("model"),
        ["the", "a", "cat", "dog", "bird", "sees", "hears", "likes", "red", "blue"],
    )
    tokenizer = Tokenizer(WordLevel({"<eos>": 0, **{w: n + 1 for n, w in enumerate(words)}}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<eos>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "source")
    config = GPT2Config(vocab_size=100, n_positions=32, n_embd=192, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder / "source")
    (folder / "few.txt").write_text("\n".join(f"the {a} likes a {b}" for a in words for b in words[:4]))
    return folder


@pytest.mark.parametrize("target", ["disk", "memory"])
def test_the_command_line_counts_the_sites_of_every_kind(model, target, tmp_path):
    words = ["compress", model / "source", "--ratio", "4", "--preset", "fast", "--for", target]
    words += ["--data", model / "few.txt", "--out", tmp_path / "out"]
    with warnings.catch_warnings():
        # What is printed is not told twice.
        warnings.simplefilter("error", OctavoWarning)
        run = CliRunner().invoke(app, [str(word) for word in words])
    assert run.exit_code == 0, run.output + str(run.exception)
    notes = [line for line in " ".join(run.stdout.split()).split("note: ") if "fewer calibration positions" in line]
    assert len(notes) == 1 and notes[0].startswith("8 sites:") and "e.g. transformer.h.0.attn.c_attn.weight" in notes[0]
