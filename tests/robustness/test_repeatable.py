"""Modules that change their inputs or themselves, or draw random numbers, give what their artifact gives."""

import pytest
import torch
from torch import nn

import octavo
from octavo.calibration.objective import Loss


def net():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class Halving(nn.Module):
    """Writes into what it is given."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x.mul_(0.5))


class Noisy(Halving):
    """Forgets that dropout is for training."""

    def forward(self, x):
        return self.net(nn.functional.dropout(x, 0.3))


class Counting(Halving):
    """Keeps a counter and an average, one written to and one replaced."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(10))

    def forward(self, x):
        self.calls += 1
        found = self.net(x)
        self.mean = 0.9 * self.mean + found.mean(0).detach()
        return found + 0.1 * self.calls + self.mean


class Bounded(nn.Module):
    """A table whose rows are cut to a norm, in place, when they are looked up."""

    def __init__(self):
        super().__init__()
        self.table, self.net = nn.Embedding(200, 64, max_norm=1.0), net()

    def forward(self, x):
        return self.net(self.table(x).mean(1))


class Overlapping(nn.Module):
    """Two parameters of which one is a part of the other's storage."""

    def __init__(self):
        super().__init__()
        self.whole = nn.Parameter(torch.randn(128, 64) / 8)
        self.part = nn.Parameter(self.whole.data[:64])

    def forward(self, x):
        return (x @ self.part) @ self.whole.T


def floats():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 64, generator=generator) for _ in range(3)]


def tokens():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 200, (32, 5), generator=generator) for _ in range(3)]


CASES = {
    "writes into a tensor": (Halving, floats),
    "writes into a mapping": (Halving, lambda: [{"x": x} for x in floats()]),
    "an activation in place comes first": (lambda: nn.Sequential(nn.ReLU(inplace=True), net()), floats),
    "draws random numbers": (Noisy, floats),
    "keeps counters": (Counting, floats),
    "bounds its table": (Bounded, tokens),
    "overlapping parameters": (Overlapping, floats),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_stated_is_what_the_loaded_module_gives(name, tmp_path):
    make, data = CASES[name]
    torch.manual_seed(0)
    module, batches, untouched = make(), data(), data()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    done = octavo.compress(module, ratio=3, data=batches, preset="fast", objective="squared")
    report = done.save(tmp_path / "out", report=False)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert str(batches) == str(untouched)
    torch.manual_seed(9)
    loaded, objective, held = (
        octavo.load(tmp_path / "out", into=make()).eval(),
        done.opened.objective,
        done.opened.held_data,
    )
    found = float(objective.measure(loaded, held, objective.reference(module.eval(), held)).mean())
    assert 0 < found < 0.2 and report["quality"]["value"] == pytest.approx(found, rel=1e-3)


def test_a_loss_of_the_users_own_may_write_to_its_batch():
    def loss(module, batch):
        x, y = batch
        return nn.functional.cross_entropy(module(x), y, reduction="none")

    batches = [(x, torch.arange(32) % 10) for x in floats()]
    octavo.compress(Halving(), ratio=3, data=batches, preset="fast", objective=Loss(loss))
    assert all(torch.equal(x, old) for (x, _), old in zip(batches, floats(), strict=True))


def test_a_forward_without_gradients_is_the_cause_that_is_told():
    class Frozen(Halving):
        @torch.no_grad()
        def forward(self, x):
            return self.net(x)

    notes = [str(note) for note in octavo.compress(Frozen(), ratio=3, data=floats(), preset="fast").notes]
    assert len(notes) == 1 and "no gradient passes through Frozen" in notes[0]
