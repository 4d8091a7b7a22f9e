"""Files of models that were pruned and not quantized: they are small, and hold the weights bit for bit."""

import pytest
import torch
from torch import nn

import octavo
from octavo.errors import BudgetError

#: The most of the dense bytes of the same precision.
MOST = {"magnitude:sparsity=0.5": 0.56, "magnitude:pattern=2:4": 0.60}


def net(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(600, 64), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("choice", MOST)
def test_half_of_the_weights_take_little_more_than_half_of_the_bytes(choice, dtype, tmp_path):
    model = net(dtype)
    report = octavo.compress(model, ratio=1.6, keep={"*": choice}, preset="data-free").save(tmp_path / "pruned")
    assert 1 / report.artifact.ratio < MOST[choice]
    read = octavo.load(tmp_path / "pruned", into=net(dtype))
    for name in ("0.weight", "1.weight", "3.weight"):
        before, after = model.get_parameter(name), read.get_parameter(name)
        kept = after != 0
        assert after.dtype == dtype and torch.equal(after[kept], before[kept])
        assert int(kept.sum()) == before.numel() // 2
        smallest, largest = before[kept].abs().min(), before[~kept].abs().max()
        assert "2:4" in choice or smallest >= largest
    assert {row.family for row in report.sites} == {"prune"}


def test_a_budget_that_pruning_alone_cannot_reach_is_refused():
    with pytest.raises(BudgetError) as caught:
        octavo.compress(net(torch.float32), ratio=4, keep={"*": "magnitude:sparsity=0.5"}, preset="data-free")
    assert 1 / 0.56 < caught.value.limit < 3
