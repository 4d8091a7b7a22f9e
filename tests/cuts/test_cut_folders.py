"""Cut models on disk: ordinary folders where a config says their shapes, shapes from the manifest elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import octavo
from octavo.cuts import best
from octavo.cuts.structured import Structured
from octavo.errors import BudgetError, RequestError

sys.path.insert(0, str(Path(__file__).parent))
from small_transformers import batch_of, outputs_of, small

transformers = pytest.importorskip("transformers")

LOADING = """
import json, sys, torch, transformers

sys.path.insert(0, sys.argv[1])
from small_transformers import batch_of

def loaded(kind, folder):
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return float(model(**batch_of(kind))[0].double().square().mean())

plain = [loaded(kind, folder) for kind, folder in json.loads(sys.argv[2])]
assert "octavo" not in sys.modules
import octavo
print(json.dumps([plain, [loaded(kind, folder) for kind, folder in json.loads(sys.argv[3])]]))
"""

#: By the type of model: kinds of units, ratio, and whether transformers loads the result without Octavo.
CASES = {
    "bert": (("head", "neuron"), 1.3, False),
    "bert-thin": (("head", "neuron", "column"), 2.2, True),
    "gpt2": (("head",), 1.1, False),
    "llama": (("head", "neuron", "column", "layer"), 3.0, True),
    "qwen3": (("head", "neuron"), 1.4, True),
    "gemma3_text": (("head", "layer"), 1.3, True),
    "vit": (("head", "neuron"), 1.4, True),
    "dinov2": (("neuron",), 1.2, False),
    "whisper": (("head", "neuron"), 1.3, False),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every case compressed by a cut alone and saved, and the mean square of the outputs that fresh processes get."""
    root, results = tmp_path_factory.mktemp("cut"), {}
    for name, (kinds, ratio, _) in CASES.items():
        kind = name.partition("-")[0]
        cut = Structured(kinds, "fisher")
        model = small(kind)
        base = model.base_model if hasattr(model, "base_model") else model
        if kind == "whisper":
            base = model
        done = octavo.compress(base, ratio=ratio, data=batch_of(kind, 40), methods=[cut], progress=False)
        results[name] = done.save(root / name), done
    plain = [(name.partition("-")[0], str(root / name)) for name, case in CASES.items() if case[2]]
    ours = [(name.partition("-")[0], str(root / name)) for name, case in CASES.items() if not case[2]]
    line = [sys.executable, "-c", LOADING, str(Path(__file__).parent), json.dumps(plain), json.dumps(ours)]
    told = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    outputs = dict(zip([name for name, case in CASES.items() if case[2]], told[0], strict=True))
    outputs |= dict(zip([name for name, case in CASES.items() if not case[2]], told[1], strict=True))
    return root, results, outputs


@pytest.mark.parametrize("name", CASES)
def test_a_cut_alone_loads_as_its_config_or_its_manifest_says(made, name):
    root, results, outputs = made
    kind, (report, _) = name.partition("-")[0], results[name]
    assert CASES[name][1] <= report.artifact.ratio
    config = json.loads((root / name / "config.json").read_text())
    assert ("quantization_config" in config) != CASES[name][2]
    again = octavo.load(root / name)
    batch = batch_of(kind)
    if kind == "whisper":
        again = again.model
    assert outputs[name] == pytest.approx(float(outputs_of(again, batch).double().square().mean()), rel=1e-5)
    assert octavo.verify(root / name).outputs_match is not False


def test_layers_of_unequal_width_load_by_the_shapes_of_their_tensors(tmp_path):
    model, cut = small("llama"), Structured(("head", "neuron", "layer"), "magnitude")
    units, evidence = cut.units(model), cut.observe(model, [batch_of("llama")])
    scores = cut.scores(model, units, evidence)
    shares = {part.name: (0.5 if ".1:" in part.name else 0.2) for part in units}
    shares["model.layers:layer"] = 0.34
    thinner = cut.apply(model, best(scores, shares), evidence)
    assert len({layer.mlp.down_proj.in_features for layer in thinner.model.layers}) == 2
    octavo.save(thinner, tmp_path / "saved", progress=False)
    octavo.compress(thinner, ratio=1.9, data=batch_of("llama", 40), methods=["entropy"], progress=False).save(
        tmp_path / "coded"
    )
    batch = batch_of("llama")
    for folder, tolerance in (("saved", 1e-5), ("coded", 3e-1)):
        again = octavo.load(tmp_path / folder)
        assert torch.allclose(outputs_of(again, batch), outputs_of(thinner, batch), atol=tolerance)
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.allclose(outputs_of(auto, batch), outputs_of(thinner, batch), atol=1e-5)


def test_levels_are_tried_beside_methods(tmp_path):
    cut = Structured(("head", "neuron"), "taylor")
    done = octavo.compress(
        small("bert"), ratio=6, data=batch_of("bert", 40), methods=[cut, "entropy"], preset="fast", progress=False
    )
    assert [level.share for level in done.cut.levels][:2] == [0.0, 0.1]
    report = done.save(tmp_path / "level")
    assert report.artifact.ratio >= 6 and "head and neuron" in report.sections[0].text


def test_ratios_out_of_reach_name_the_largest():
    with pytest.raises(BudgetError, match="ask for a ratio of at most"):
        octavo.compress(small("bert"), ratio=9, data=batch_of("bert", 40), methods=[Structured(("head",))])


def test_token_rows_are_refused_where_a_tokenizer_would_have_to_change():
    with pytest.raises(RequestError, match="tokenizer"):
        octavo.compress(small("bert"), ratio=1.2, data=batch_of("bert", 40), methods=[Structured(("token",))])
