"""What ``octavo.load`` gives back, and what ``octavo.verify`` notices without the source."""

import json
import shutil

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import octavo
from octavo.cli import app


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16)).eval()


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """An artifact with its report; tests change copies of it."""
    out = tmp_path_factory.mktemp("verifying") / "out"
    octavo.compress(net(), ratio=3, preset="data-free", methods=["rtn", "keep"]).save(out)
    return out


@pytest.fixture
def copy(folded, tmp_path):
    return shutil.copytree(folded, tmp_path / "copy")


def verified(folder):
    """What the command says, which is what the function returns."""
    result = CliRunner().invoke(app, ["verify", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_what_was_written_is_verified(folded):
    found = verified(folded)
    assert found["weights_match"] is True
    assert found["bytes"] == sum((folded / name).stat().st_size for name in ("model.safetensors", "octavo.json"))
    assert found["ratio"] >= 3 and found["tensors"] == 4
    # A module has no loader that is known here, and it was not made for memory.
    assert found["outputs_match"] is found["loader"] is found["packed"] is None


def test_the_digest_is_of_the_weights_alone(folded, copy):
    (copy / "README.md").unlink()
    assert verified(copy)["weights_sha256"] == verified(folded)["weights_sha256"]


def test_without_a_report_nothing_is_compared(copy):
    for name in ("report.html", "report.json"):
        (copy / name).unlink()
    found = verified(copy)
    assert found["weights_match"] is found["quality"] is None and found["ratio"] >= 3


def test_weights_other_than_those_recorded_are_an_error(copy):
    report = json.loads((copy / "report.json").read_text())
    report["digests"]["weights"] = "0" * 64
    (copy / "report.json").write_text(json.dumps(report))
    with pytest.raises(octavo.ArtifactError, match="the restored weights differ from those recorded"):
        octavo.verify(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "octavo.json"])
def test_damage_is_an_error(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    for read in (octavo.verify, octavo.load):
        with pytest.raises(octavo.ArtifactError):
            read(copy)


def test_a_folder_that_is_no_artifact_is_named(tmp_path):
    with pytest.raises(octavo.ArtifactError, match="empty: not an artifact"):
        (tmp_path / "empty").mkdir()
        octavo.verify(tmp_path / "empty")


def test_weights_are_loaded_into_a_module_or_as_they_are(folded):
    state, module = octavo.load(folded), octavo.load(folded, into=net())
    assert set(state) == set(module.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    x = torch.randn(32, 64)
    with torch.no_grad():
        error = (module(x) - net()(x)).norm() / net()(x).norm()
    assert 0 < error < 0.2


def test_a_module_that_does_not_fit_is_unchanged(folded):
    other = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 17))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(octavo.ArtifactError, match=r"2\.weight"):
        octavo.load(folded, into=other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_factors_need_a_module_and_are_not_packed(folded):
    with pytest.raises(octavo.RequestError, match="choose one of packed= and factors="):
        octavo.load(folded, into=net(), packed=True, factors=True)
    with pytest.raises(octavo.RequestError, match="give a module with into="):
        octavo.load(folded, factors=True)
