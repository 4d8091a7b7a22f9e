"""One request: its fields are the options of the commands, the saved requests and the identity of kept work."""

from dataclasses import dataclass, fields
from inspect import signature
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

import octavo
from octavo.allocation.patterns import parse_spec
from octavo.allocation.plans import read_plan
from octavo.calibration.evidence import Evidence
from octavo.cli.options import asking
from octavo.methods import get_method, methods
from octavo.request import Choices, Request, Role, names, option, options

DATA = [torch.randn(16, 32, generator=torch.Generator().manual_seed(k)) for k in range(2)]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"target": "disk", "shape": (1, 32)}, "disk: these options cannot be combined with it: --shape"),
        ({"target": "memory", "latency": "5ms"}, "memory: these options cannot be combined with it: --latency"),
        (
            {"target": "speed", "memory": "6GB"},
            "speed: these options cannot be combined with it: --ratio, --memory; .* --speedup, --latency",
        ),
        ({"target": "speed", "ratio": None, "executor": "nonsense"}, "cannot be combined with it: --executor"),
        ({"target": ["disk"]}, "give a name"),
        ({"data": None, "objective": "kl"}, "nothing is run here"),
        ({"data": None, "forward_args": lambda batch: batch}, "no batches are given"),
        ({"data": None, "curvature": "ekfac"}, "needs a model that runs"),
        ({"memory": "6GB"}, "leave memory out"),
        ({"methods": "rtn"}, r"methods is 'rtn'; give a list"),
        ({"ignore": "0.*"}, r"ignore is '0\.\*'; give a list"),
        ({"keep": ["0.*"]}, "give a mapping"),
        ({"keep": {"0.*": 16}}, "write both as strings"),
        ({"keep": {"0.*": "float16", "*": "float32"}}, "has no effect"),
        ({"seed": 1.5}, "give an integer"),
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


def test_a_request_is_what_keyword_arguments_make() -> None:
    one = octavo.compress(Request(net(), ratio=3, data=DATA, methods=["rtn"], seed=3, preset="fast"))
    other = octavo.compress(net(), ratio=3, data=DATA, methods=["rtn"], seed=3, preset="fast")
    assert one.built.plan.points == other.built.plan.points and one.opened.request.seed == 3


def test_a_request_is_whole() -> None:
    with pytest.raises(octavo.RequestError, match="put these into the request"):
        octavo.compress(Request(net(), ratio=3), data=DATA)
    with pytest.raises(TypeError, match="'ration'; did you mean 'ratio'"):
        octavo.compress(net(), ration=3)
    with pytest.raises(TypeError, match="'ration'; did you mean 'ratio'"):
        Request(net()).asked(ration=3)
    with pytest.raises(AttributeError):
        Request(net()).ratio = 3  # type: ignore[misc]


def test_every_field_is_documented_and_typed_once() -> None:
    hints, own = get_type_hints(Choices), get_type_hints(Request)
    told = octavo.compress.__doc__ or ""
    for item in fields(Request)[1:]:
        assert hints[item.name] == own[item.name]
        assert item.name in told.partition("Returns")[0], f"compress says nothing of {item.name}"
    assert set(hints) == set(names(Request)) - {"source"}
    for verb in (octavo.compress, octavo.profile, octavo.frontier):
        assert set(names(Request)) - {"source"} <= set(signature(verb).parameters), f"help() of {verb} hides options"


@dataclass(frozen=True)
class Coloured(Request):
    """A request with one field more."""

    colour: str = option("grey", "Colour of the page.", Role.MEASURED)


def test_a_new_field_is_an_option_saved_and_part_of_the_identity() -> None:
    seen: list[Coloured] = []
    app = typer.Typer()

    @app.command()
    @asking(Coloured)
    def colour(request: Coloured) -> None:
        seen.append(request)

    runner = CliRunner()
    assert "Colour of the page." in runner.invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    result = runner.invoke(app, ["model", "--colour", "red", "--ratio", "8", "--ignore", "a*", "--keep", "b*=float16"])
    assert result.exit_code == 0, result.output
    (request,) = seen
    assert request == Coloured("model", ratio=8, colour="red", ignore=("a*",), keep={"b*": "float16"})
    assert request.saved()["colour"] == "red" and request.identity()["colour"] == "red"
    assert Coloured("other").restored(request.saved()).asked(ratio=8) == request.asked(source="other")


def test_every_option_stands_on_the_command_line() -> None:
    from octavo.cli.folding import compress

    offered = {name for name, (_, how) in options(Request).items() if how.help}
    assert offered <= set(signature(compress).parameters)
    assert set(names(Request)) - offered == {"forward_args", "workspace"}


def test_what_a_profile_was_made_with_is_restored(tmp_path: Path) -> None:
    octavo.profile(net(), tmp_path / "p", data=DATA, methods=["rtn"], seed=4, ignore=["0.*"])
    saved = octavo.pipeline.saved_choices(tmp_path / "p")
    assert (saved["seed"], saved["methods"], saved["ignore"], saved["target"]) == (4, ["rtn"], ["0.*"], "disk")
    with pytest.raises(octavo.RequestError, match="does not know"):
        Request(None).restored({**saved, "colour": "red"})
    with pytest.raises(octavo.RequestError, match="leave ratio out"):
        octavo.profile(net(), tmp_path / "q", data=DATA, ratio=8)


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
