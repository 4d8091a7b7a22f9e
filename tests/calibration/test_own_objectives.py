"""Objectives of the user's own, whose batches only they understand, are saved and verified like any other."""

import pytest
import torch
from torch import nn

import octavo
from octavo.calibration.objective import Loss, Objective


class Net(nn.Module):
    """A convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 32, 3), nn.Linear(32 * 36, 64)

    def forward(self, x):
        return self.head(self.conv(x).relu().flatten(1))


class Apart(Objective):
    """Takes its input out of a batch that the module does not take, and says nothing of its metric."""

    def outputs(self, module, batch):
        return module(batch["image"]).float()

    def divergence(self, reference, outputs):
        return (reference - outputs).square().mean(1)

    def probe(self, outputs, generator):
        return (outputs * torch.randn(outputs.shape, generator=generator)).sum()


def entropy(logits, labels):
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def images(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(16, 3, 8, 8, generator=generator), torch.randint(0, 64, (16,), generator=generator)


#: By name an objective, and what a batch of images and labels is for it.
CASES = {
    "a tuple": (Loss(lambda module, batch: entropy(module(batch[0]), batch[1])), lambda x, y: (x, y)),
    "labels first": (Loss(lambda module, batch: entropy(module(batch[1]), batch[0])), lambda x, y: (y, x)),
    "names": (
        Loss(lambda module, batch: entropy(module(batch["image"]), batch["label"])),
        lambda x, y: {"image": x, "label": y},
    ),
    "nested": (Loss(lambda module, batch: entropy(module(batch["in"]["x"]), batch["y"])), lambda x, y: {"in": {"x": x}, "y": y}),
    "no bfloat16": (
        Loss(lambda module, batch: (module(batch["image"].float()) - 1).square().mean(1)),
        lambda x, y: {"image": x, "label": y},
    ),
    "an objective": (Apart(), lambda x, y: {"image": x, "label": y}),
}  # fmt: skip


@pytest.mark.parametrize("target", ["disk", "memory"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_saved_verified_and_loaded(case, target, tmp_path):
    objective, batch = CASES[case]
    torch.manual_seed(0)
    module = Net().eval()
    data = [batch(*images(number)) for number in range(4)]
    done = octavo.compress(module, ratio=3, data=data, objective=objective, target=target, preset="fast")
    report = done.save(tmp_path / "out")
    assert report["quality"]["value"] == pytest.approx(done.built.quality, abs=1e-6)
    assert report["quality"]["metric"] == objective.metric and report["latency"]["original"] > 0
    result = octavo.verify(tmp_path / "out")
    assert result.weights_match and (target == "disk" or 0 < result.packed.held <= result.packed.stated)
    octavo.load(tmp_path / "out", into=Net())
