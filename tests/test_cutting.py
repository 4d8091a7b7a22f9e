"""A cut as a method of compress: thinner shapes, loaded as they are, and levels tried beside other methods."""

import json
import subprocess
import sys

import pytest
import torch

import octavo
from octavo.cuts.modegpt import MoDeGPT
from octavo.errors import BudgetError, RequestError

transformers = pytest.importorskip("transformers")

DATA = [{"input_ids": torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(n))} for n in range(4)]


def decoder(*, idle=0):
    """A decoder with grouped queries, some of whose neurons may do nothing."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=200, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, :idle] = 0
            layer.mlp.gate_proj.weight[:idle] = 0
    return model


LOADING = """
import json, sys, torch, transformers

def loaded(folder):
    model, bare = transformers.AutoModelForCausalLM.from_pretrained(folder), transformers.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        logit = float(model.eval()(torch.arange(8)[None]).logits[0, -1, 3])
    return list(model.model.layers[1].mlp.down_proj.weight.shape), list(bare.layers[0].mlp.up_proj.weight.shape), logit

alone, before = loaded(sys.argv[1]), "octavo" in sys.modules
import octavo
print(json.dumps([alone, before, loaded(sys.argv[2])]))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cut alone and a level of one, as saved, and as a fresh process loads them: the first without Octavo."""
    folder = tmp_path_factory.mktemp("cuts")
    decoder().save_pretrained(folder / "source")
    alone = octavo.compress(folder / "source", ratio=1.5, data=DATA, methods=["modegpt"], progress=False)
    # A fifth of all neurons does nothing: without them the others get more bits.
    cut = MoDeGPT(types=("mlp",))
    level = octavo.compress(
        decoder(idle=40), ratio=7, data=DATA, methods=[cut, "entropy"], preset="fast", progress=False
    )
    reports = alone.save(folder / "alone"), level.save(folder / "level")
    line = [sys.executable, "-c", LOADING, str(folder / "alone"), str(folder / "level")]
    told = subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    return folder, alone, level, reports, json.loads(told)


def logit_of(model):
    with torch.no_grad():
        return float(model.eval()(torch.arange(8)[None]).logits[0, -1, 3])


def test_a_cut_alone_is_an_ordinary_model_of_the_size_asked_for(made):
    folder, _, _, (report, _), (loaded, imported, _) = made
    original = sum(tensor.numel() * 4 for tensor in decoder().parameters())
    assert report.source.bytes == original and report.source.parameters == original // 4
    assert 1.5 <= report.artifact.ratio <= 1.5 * 1.02
    config = json.loads((folder / "alone" / "config.json").read_text())
    width = config["intermediate_size"]
    assert "quantization_config" not in config and width < 200 and not imported
    assert loaded[:2] == [[32, width], [width, 32]]
    assert loaded[2] == pytest.approx(logit_of(octavo.load(folder / "alone")), abs=1e-5)
    assert octavo.verify(folder / "alone").outputs_match
    with pytest.raises(RequestError, match="nothing is encoded here that could run packed"):
        octavo.load(folder / "alone", packed=True)


def test_the_report_has_the_cut_and_measures_against_the_source(made):
    folder, done, _, (report, _), _ = made
    (level,) = done.cut.levels
    width = json.loads((folder / "alone" / "config.json").read_text())["intermediate_size"]
    assert level.weights == 2 * 3 * 32 * (200 - width)
    assert report.quality.value == pytest.approx(level.quality, rel=1e-4) and level.quality > 0.01
    (section,) = report.sections
    assert section.figures["levels"][0]["weights"] == level.weights and f"{level.weights:,} of" in section.text
    assert "modegpt removed" in (folder / "alone" / "README.md").read_text()


def test_levels_are_tried_beside_methods_and_the_best_at_the_budget_is_kept(made):
    folder, _, done, (_, report), (_, _, loaded) = made
    assert report.artifact.ratio >= 7 and report.artifact.used <= 1
    levels = {level.share: level for level in done.cut.levels}
    assert done.cut.kept == 0.2 and levels[0.2].alone < 1e-6 < levels[0.2].quality < levels[0].quality
    assert report.quality.value == pytest.approx(levels[0.2].quality, rel=1e-3)
    assert loaded[:2] == [[32, 160], [160, 32]]
    assert loaded[2] == pytest.approx(logit_of(octavo.load(folder / "level")), abs=1e-4)
    assert octavo.verify(folder / "level").outputs_match


def test_deep_levels_that_lose_too_much_are_not_solved():
    done = octavo.compress(decoder(), ratio=4, data=DATA, methods=["modegpt", "entropy"], preset="fast", progress=False)
    assert done.cut.kept == 0 and done.cut.levels[-1].quality is None and len(done.cut.levels) < 4


def test_an_interrupted_run_of_levels_goes_on(tmp_path):
    def run(resume):
        return octavo.compress(
            decoder(idle=40), ratio=7, data=DATA, methods=["modegpt", "entropy"], preset="fast", progress=False,
            workspace=tmp_path / "work", resume=resume,
        )  # fmt: skip

    first = run(False)
    first.lock.release()
    again = run(True)
    assert again.cut == first.cut and again.built.bytes == first.built.bytes
    again.forget_workspace()
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"methods": ["modegpt", MoDeGPT()]}, "are both cuts; name one of them"),
        ({"methods": ["modegpt:types=heads"]}, "types has 'heads'"),
        ({"methods": ["modegpt:depth=3"]}, "'depth' is no knob of modegpt"),
        ({"methods": ["modegpt:types=value-output"]}, "leaves zeros in place of what it removes"),
        ({"methods": ["modegpt"], "keep": {"*": "float16"}}, "stores every tensor as it is; leave keep out"),
        ({"methods": ["modegpt", "entropy"], "preset": "data-free"}, "needs a model that runs and data for it"),
        ({"methods": ["modegpt"], "target": "memory"}, "is a cut, which is made for disk only"),
    ],
)
def test_what_cannot_be_cut_is_refused(asked, says):
    given = {"data": DATA} if asked.get("preset") != "data-free" else {}
    with pytest.raises(RequestError, match=says):
        octavo.compress(decoder(), ratio=1.3, progress=False, **given, **asked)


def test_other_architectures_profiles_and_ratios_out_of_reach_are_refused(tmp_path):
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=64)
    with pytest.raises(RequestError, match="cannot cut the blocks of a model of type 'gpt2'"):
        octavo.compress(transformers.GPT2LMHeadModel(config), ratio=1.3, data=DATA, methods=["modegpt"])
    with pytest.raises(RequestError, match="modegpt is a cut, and a profile is of one shape"):
        octavo.profile(decoder(), tmp_path / "measured", data=DATA, methods=["modegpt", "entropy"])
    with pytest.raises(BudgetError, match="ask for a ratio of at most 2"):
        octavo.compress(decoder(), ratio=4, data=DATA, methods=["modegpt"])
