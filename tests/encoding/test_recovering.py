"""Recovery by distillation: the source teaches what is stored, in the same bytes."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import octavo
from octavo.encoding import recovering
from octavo.errors import RequestError


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 48))


def examples(count=1600):
    made = torch.Generator().manual_seed(1)
    # Inputs of low dimension, so that there is something to learn from them.
    flat = torch.randn(count, 6, generator=made) @ torch.randn(6, 48, generator=made)
    return (flat + torch.randn(count, 48, generator=made) / 3).split(64)


def recovered(net, **more):
    asked = {
        "ratio": 12,
        "data": list(examples()),
        "recover": "distill",
        "minutes": 0.04,
        "objective": "squared",
        "progress": False,
        **more,
    }
    return octavo.compress(net, **asked)


def test_what_is_taught_is_better_in_the_same_bytes_and_says_so(net, tmp_path):
    done = recovered(net, minutes=0.15)
    report = done.save(tmp_path / "small", progress=False)
    assert done.built.bytes <= done.budget.bytes
    assert done.recovery.after < 0.9 * done.recovery.before
    section = next(part for part in report.sections if part.name == "recovery")
    assert section.figures["steps"] == done.recovery.steps > 0
    assert done.built.quality == done.recovery.after
    loaded = octavo.load(tmp_path / "small", into=copy.deepcopy(net))
    batch = examples()[0]
    assert torch.isfinite(loaded(batch)).all()


def test_the_source_is_not_changed(net):
    before = copy.deepcopy(net.state_dict())
    recovered(net)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_killed_run_goes_on(net, tmp_path, monkeypatch):
    looks = []

    def killed(step, done, total):
        if step == "recover" and (tmp_path / "work" / "recovery.json").exists():
            looks.append(done)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recovered(net, workspace=tmp_path / "work", progress=killed)
    seen = []
    done = recovered(
        net, workspace=tmp_path / "work", resume=True, progress=lambda step, done, total: seen.append((step, done))
    )
    assert looks
    assert done.recovery.after <= done.recovery.before


def test_a_loss_that_is_not_finite_ends_it_with_the_last_good_state(net, monkeypatch):
    gradients = recovering.Student.gradients

    def broken(self, batch):
        return float("nan") if len(calls := seen) > 8 else (calls.append(1), gradients(self, batch))[1]

    seen = []
    monkeypatch.setattr(recovering.Student, "gradients", broken)
    done = recovered(net)
    assert "not finite" in done.recovery.ended
    assert done.built.quality <= done.recovery.before


@pytest.mark.parametrize("looks", [0, 1])
def test_what_does_not_fit_is_no_result(net, monkeypatch, looks):
    """Forms that take too many bytes at every dead zone are never kept; the plan or an earlier state is."""
    packed, zones = recovering.Student.packed, []

    def too_large(self, deadzone=0.0):
        zones.append(deadzone)
        found = packed(self, deadzone)
        # The first is the size of the plan itself.
        if zones.count(0.0) <= 1 + looks:
            return found
        return {name: replace(item, content=item.blob + bytes(4000)) for name, item in found.items()}

    monkeypatch.setattr(recovering.Student, "packed", too_large)
    done = recovered(net)
    assert max(zones) > 0.8 and done.recovery.steps > 0 and done.recovery.ended == "the time was up"
    assert done.built.counted <= done.budget.bytes
    assert done.recovery.after <= done.recovery.before
    if not looks:
        assert done.built.quality == done.recovery.before
        assert any("the plan stays as it was" in note for note in done.opened.notes)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"data": list(examples(128))}, "unlabeled data"),
        ({"data": None}, "data"),
        ({"minutes": 0}, "minutes"),
        ({"recover": "magic"}, "distill"),
        ({"target": "memory"}, "--recover"),
        ({"methods": ["trellis"], "ratio": 8}, "trained"),
    ],
)
def test_requests_that_cannot_be_served(net, more, words):
    with pytest.raises(RequestError, match=words):
        recovered(net, **more)


def test_a_plan_is_carried_out_as_it_is_written(net, tmp_path):
    octavo.profile(net, tmp_path / "curves", data=list(examples()), progress=False)
    octavo.plan(tmp_path / "curves", ratio=8).save(tmp_path / "plan.yaml")
    with pytest.raises(RequestError, match="recover"):
        recovered(net, ratio=None, plan=tmp_path / "plan.yaml")
