"""Choices without a meaning are refused by name, from Python as on the command line."""

import pytest
import torch
from torch import nn

import octavo
from octavo.allocation.patterns import parse_spec
from octavo.allocation.plans import read_plan
from octavo.calibration.evidence import Evidence
from octavo.methods import get_method, methods

DATA = [torch.randn(16, 32, generator=torch.Generator().manual_seed(k)) for k in range(2)]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"target": "disk", "shape": (1, 32)}, "shape has no meaning"),
        ({"target": "memory", "latency": "5ms"}, "latency has no meaning"),
        ({"target": "speed", "memory": "6GB"}, "ratio and memory have no meaning"),
        ({"target": "speed", "ratio": None, "executor": "nonsense"}, "executor has no meaning"),
        ({"target": ["disk"]}, "is not known"),
        ({"data": None, "objective": "kl"}, "nothing is run here"),
        ({"data": None, "forward_args": lambda batch: batch}, "no batches are given"),
        ({"data": None, "curvature": "ekfac"}, "needs a model that runs"),
        ({"memory": "6GB"}, "leave memory out"),
        ({"methods": "rtn"}, r"methods is 'rtn'; give a list"),
        ({"ignore": "0.*"}, r"ignore is '0\.\*'; give a list"),
        ({"keep": ["0.*"]}, "give a mapping"),
        ({"keep": {"0.*": 16}}, "write both as strings"),
        ({"keep": {"0.*": "float16", "*": "float32"}}, "has no effect"),
        ({"seed": 1.5}, "is no integer"),
        ({"executor": 3}, "executor 3 is not known"),
        ({"objective": 3}, "objective 3 is not known"),
        ({"workspace": "a\0b"}, "is not a path"),
        ({"workspace": "w" * 240}, "longer than"),
        ({"ratio": 10**400}, "not a positive finite number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_call_is_refused(choices: dict, says: str) -> None:
    with pytest.raises(octavo.RequestError, match=says):
        octavo.compress(net(), **{"ratio": 3, "data": DATA, **choices})


def test_a_wider_glob_may_come_first() -> None:
    done = octavo.compress(net(), ratio=1.5, methods=["keep"], keep={"*": "float16", "0.*": "bfloat16"})
    assert {name: point.setting["dtype"] for name, point in done.built.plan.points.items()} == {
        "0.weight": "bfloat16", "2.weight": "float16",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(methods()))
def test_methods_take_what_they_offer_and_nothing_else(name: str) -> None:
    method = get_method(name)
    weight, evidence = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), Evidence(torch.ones(64), None)
    for setting in (*method.settings(weight, evidence), *method.kernel_settings(weight, evidence)):
        method.refuse_unknown(setting)
    with pytest.raises(octavo.RequestError, match="'unheard' is not a setting of this method; choose from"):
        parse_spec(f"{name}:unheard=1")


def test_settings_of_a_plan_are_checked_too(tmp_path) -> None:
    octavo.profile(net(), tmp_path / "p", methods=["rtn"])
    octavo.plan(tmp_path / "p", ratio=3).save(tmp_path / "plan.yaml")
    text = (tmp_path / "plan.yaml").read_text()
    (tmp_path / "plan.yaml").write_text(text.replace("setting:\n", "setting:\n      unheard: 1\n", 1))
    with pytest.raises(octavo.RequestError, match=r"plan\.yaml: site .* 'unheard' is not a setting"):
        read_plan(tmp_path / "plan.yaml", ["0.weight", "2.weight"])
