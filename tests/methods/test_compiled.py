"""What numba compiles rounds as the plain code does."""

import sys

import pytest
import torch

from octavo.artifact import pack
from octavo.evidence import Evidence
from octavo.methods import compiled, get_method


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
