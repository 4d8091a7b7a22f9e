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
    "roberta": (("head", "neuron", "column"), 1.8, True),
    "gpt2": (("head",), 1.1, False),
    "llama": (("head", "neuron", "column", "layer"), 2.5, True),
    "vit": (("head", "neuron"), 1.4, True),
    "whisper": (("head", "neuron"), 1.3, False),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every case compressed by a cut alone and saved, and the mean square of the outputs that fresh processes get."""
    root, results = tmp_path_factory.mktemp("cut"), {}
    for kind, (kinds, ratio, _) in CASES.items():
        data, cut = batch_of(kind, 16), Structured(kinds, "fisher")
        done = octavo.compress(small(kind), ratio=ratio, data=data, methods=[cut], progress=False)
        results[kind] = done.save(root / kind)
    plain = [(kind, str(root / kind)) for kind, case in CASES.items() if case[2]]
    ours = [(kind, str(root / kind)) for kind, case in CASES.items() if not case[2]]
    line = [sys.executable, "-c", LOADING, str(Path(__file__).parent), json.dumps(plain), json.dumps(ours)]
    told = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    outputs = dict(zip([kind for kind, _ in plain + ours], [*told[0], *told[1]], strict=True))
    return root, results, outputs


@pytest.mark.parametrize("kind", CASES)
def test_a_cut_alone_loads_as_its_config_or_its_manifest_says(made, kind):
    root, results, outputs = made
    assert CASES[kind][1] <= results[kind].artifact.ratio
    config = json.loads((root / kind / "config.json").read_text())
    assert ("quantization_config" in config) != CASES[kind][2]
    again = octavo.load(root / kind).base_model
    assert outputs[kind] == pytest.approx(float(outputs_of(again, batch_of(kind)).double().square().mean()), rel=1e-5)
    assert octavo.verify(root / kind).outputs_match is not False


def test_columns_that_the_model_returns_are_refused():
    with pytest.raises(RequestError, match="columns are what the model returns"):
        octavo.compress(small("bert"), ratio=1.5, data=batch_of("bert", 16), methods=[Structured(("column",))])


def test_layers_of_unequal_width_load_by_the_shapes_of_their_tensors(tmp_path):
    model, cut = small("llama"), Structured(("head", "neuron", "layer"), "magnitude")
    units, evidence = cut.units(model), cut.observe(model, [batch_of("llama")])
    scores = cut.scores(model, units, evidence)
    shares = {part.name: (0.5 if ".1:" in part.name else 0.2) for part in units}
    shares["model.layers:layer"] = 0.34
    thinner = cut.apply(model, best(scores, shares), evidence)
    assert len({layer.mlp.down_proj.in_features for layer in thinner.model.layers}) == 2
    octavo.save(thinner, tmp_path / "saved", progress=False)
    octavo.compress(thinner, ratio=1.9, data=batch_of("llama", 16), methods=["entropy"], progress=False).save(
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
        small("bert"), ratio=6, data=batch_of("bert", 16), methods=[cut, "entropy"], preset="fast", progress=False
    )
    assert [level.share for level in done.cut.levels][:2] == [0.0, 0.1]
    report = done.save(tmp_path / "level")
    assert report.artifact.ratio >= 6 and list(done.cut.levels[1].gone) == ["head", "neuron"]
    assert done.built.quality == min(level.quality for level in done.cut.levels if level.quality is not None)


def test_ratios_out_of_reach_name_the_largest():
    with pytest.raises(BudgetError, match="ask for a ratio of at most"):
        octavo.compress(small("bert"), ratio=9, data=batch_of("bert", 16), methods=[Structured(("head",))])


def test_token_rows_are_refused_where_a_tokenizer_would_have_to_change():
    with pytest.raises(RequestError, match="tokenizer"):
        octavo.compress(small("bert"), ratio=1.2, data=batch_of("bert", 16), methods=[Structured(("token",))])
