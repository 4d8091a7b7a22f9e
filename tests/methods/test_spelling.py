"""Methods with knobs: one word each, which plans and command lines hold, and which is read back."""

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import octavo
from octavo.calibration.evidence import Evidence
from octavo.cli import app
from octavo.errors import RequestError
from octavo.methods import Method, get_method, methods, select_methods
from octavo.methods.factorize.alds import ALDS
from octavo.methods.factorize.fisher_svd import FisherSVD
from octavo.methods.quantize.cosine import CosineSteps
from octavo.methods.quantize.entropy import Entropy
from octavo.methods.quantize.gptq import GPTQ
from octavo.request import Request, listed
from octavo.targets import get_target

SPELLED = {
    "entropy": Entropy(),
    "entropy:rate=0.2": Entropy(rate=0.2),
    "entropy:rate=0.2,levels=4/2.5/-1": Entropy(rate=0.2, levels=(4, 2.5, -1)),
    "gptq:order=false": GPTQ(order=False),
    "alds:groups=1/3": ALDS(groups=(1, 3)),
    "fisher-svd:sweeps=0": FisherSVD(sweeps=0),
    "dct:block=1/1/8": CosineSteps(block=(1, 1, 8)),
}


@pytest.mark.parametrize("word", SPELLED)
def test_words_are_read_back(word):
    assert str(SPELLED[word]) == word and get_method(word) == SPELLED[word]


def test_every_method_with_its_usual_knobs_is_its_name():
    assert all(str(cls()) == name and get_method(name) == cls() for name, cls in methods().items())


def test_lines_are_divided_between_methods():
    assert listed("entropy:rate=0.2,levels=4/3, alds,gptq:order=false,symmetric=true,prune") == [
        "entropy:rate=0.2,levels=4/3", "alds", "gptq:order=false,symmetric=true", "prune",
    ]  # fmt: skip
    assert listed(None) is None and listed(" , ") == []


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("entropi:rate=1", "did you mean 'entropy'"),
        ("entropy:speed=3", "'speed' is no knob of entropy; its knobs are: rate, levels"),
        ("entropy:rate", "'rate' is no knob"),
        ("entropy:", "'' is no knob"),
        ("entropy:rate=much", "rate cannot be 'much'; its default is 0.1"),
        ("entropy:rate=nan", "rate cannot be 'nan'"),
        ("entropy:rate=1,rate=2", "says rate twice"),
        ("gptq:order=perhaps", "order cannot be 'perhaps'"),
        ("fisher-svd:sweeps=1.5", "sweeps cannot be '1.5'"),
        ("svd:rank=3", "its knobs are: none"),
    ],
)
def test_words_that_say_nothing_are_refused(word, says):
    with pytest.raises(RequestError, match=says):
        get_method(word)


def test_methods_are_chosen_by_word_by_family_and_as_they_are():
    chosen = select_methods([Entropy(rate=0.2), "entropy", "gptq:order=false", "prune"], "default")
    assert chosen[:3] == [Entropy(rate=0.2), Entropy(), GPTQ(order=False)]
    assert {method.family for method in chosen[3:]} == {"prune"}

    class Stranger(Method):
        name = "stranger"

        def settings(self, weight, evidence):
            return []

        def encode(self, weight, setting, evidence):
            raise NotImplementedError

    with pytest.raises(RequestError, match=r"Stranger is not a registered method; put @method"):
        select_methods([Stranger()], "default")
    for word in ("entropy:rate=0.2", Entropy(), "prune"):
        with pytest.raises(RequestError, match="has no setting that runs from memory"):
            get_target("memory").methods(Request(None, methods=[word]))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48))


def test_knobs_count_from_the_profile_to_the_file(tmp_path):
    model, data = net(), [torch.randn(64, 48) for _ in range(3)]
    knobs = Entropy(rate=0.4, levels=(6, 5, 4, 3, 2, 1))
    done = octavo.compress(model, ratio=8, data=data, methods=[knobs, "alds"], progress=False)
    used = {point.method for point in done.built.plan.points.values()}
    assert used <= {str(knobs), "alds"} and str(knobs) in used
    done.save(tmp_path / "out", progress=False)
    # The content is what the method makes with these knobs, not what it makes with its usual ones.
    artifact = octavo.Artifact(tmp_path / "out")
    site, point = next((name, p) for name, p in done.built.plan.points.items() if p.method == str(knobs))
    weight = model.get_parameter(site).detach()
    plain = Evidence(torch.ones(len(weight)), None)
    theirs = get_method(point.method).encode(weight, point.setting, plain)
    assert type(artifact.form(site)) is type(theirs)
    again = octavo.compress(model, ratio=8, data=data, methods=[str(knobs), "alds"], progress=False)
    assert again.built.plan.points == done.built.plan.points


def test_kept_work_tells_knobs_apart(tmp_path):
    model, data = net(), [torch.randn(64, 48) for _ in range(3)]
    octavo.profile(model, tmp_path / "work", data=data, methods=[Entropy(rate=0.4)], progress=False)
    with pytest.raises(RequestError, match="methods"):
        octavo.profile(model, tmp_path / "work", data=data, methods=[Entropy(rate=0.1)], resume=True, progress=False)
    found = octavo.profile(
        model, tmp_path / "work", data=data, methods=["entropy:rate=0.4"], resume=True, progress=False
    )
    assert {point.method for curve in found.curves for point in curve.points} == {"entropy:rate=0.4"}


def test_the_command_line_takes_knobs(tmp_path):
    from safetensors.torch import save_file

    save_file({"a.weight": torch.randn(64, 64)}, tmp_path / "model.safetensors")
    line = ["compress", str(tmp_path / "model.safetensors"), "--ratio", "6", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*line, "--methods", "entropy:rate=0.3,levels=6/5/4/3,keep", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])
    assert octavo.verify(tmp_path / "out")
    refused = CliRunner().invoke(app, [*line[:-1], str(tmp_path / "other"), "--methods", "entropy:speed=3"])
    assert refused.exit_code == 2 and "no knob of entropy" in refused.output.replace("\n", " ")
