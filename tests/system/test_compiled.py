"""What numba compiles rounds as the plain code does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octavo.artifact import pack
from octavo.calibration.evidence import Evidence
from octavo.methods import get_method
from octavo.system import compiled


@pytest.mark.parametrize("name", ["entropy", "trellis", "gptq"])
def test_compiled_and_plain_code_agree(name, monkeypatch):
    pytest.importorskip("numba")
    generator = torch.Generator().manual_seed(0)
    # Neither the rows nor the columns fill their last block.
    weight = torch.randn(99, 150, generator=generator) * torch.rand(99, 1, generator=generator)
    inputs = torch.randn(300, 150, generator=generator) @ torch.randn(150, 150, generator=generator)
    evidence = Evidence(torch.rand(99, generator=generator) + 0.1, inputs.t() @ inputs / 300 + torch.eye(150))
    method = get_method(name)
    forms = {}
    for kind in ("compiled", "plain"):
        if kind == "plain":
            monkeypatch.setitem(sys.modules, "numba", None)
            compiled.compiled.cache_clear()
        forms[kind] = [method.encode(weight, setting, evidence) for setting in method.settings(weight, evidence)[-9::2]]
    compiled.compiled.cache_clear()
    for quick, plain in zip(forms["compiled"], forms["plain"], strict=True):
        # Sums in another order round a weight here and there to the other side.
        assert float((quick.dense() != plain.dense()).float().mean()) < 0.02
        losses = [evidence.loss(form.dense() - weight) for form in (quick, plain)]
        assert losses[0] == pytest.approx(losses[1], rel=0.02)
        assert pack(quick).bytes == pytest.approx(pack(plain).bytes, rel=0.02)


_ENCODES = """
import torch
from octavo.calibration.evidence import Evidence
from octavo.methods import get_method

weight, inputs = torch.randn(40, 70), torch.randn(100, 70)
for moments in (Evidence(torch.ones(40), inputs.t() @ inputs / 100 + torch.eye(70)), Evidence(torch.ones(40), torch.eye(70))):
    for name in ("entropy", "trellis", "gptq"):
        method = get_method(name)
        method.encode(weight, method.settings(weight, moments)[-1], moments)
"""


def test_the_cache_of_compiled_code_does_not_grow(tmp_path):
    """An entry for every process once broke numba's cache at the 128th, and with it every run."""
    pytest.importorskip("numba")
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def kept():
        subprocess.run([sys.executable, "-c", _ENCODES], env=environment, check=True)
        return {file.name: file.stat().st_size for file in Path(tmp_path).rglob("*.nb?")}

    first, second = kept(), kept()
    assert first
    assert second == first
