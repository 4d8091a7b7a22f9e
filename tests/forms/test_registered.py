"""Forms of other packages are restored where these are installed, and an artifact decides nothing."""

import subprocess
import sys

import pytest
import torch

from octavo.artifact import pack
from octavo.errors import ArtifactError
from octavo.forms import FORMS, Dense, restore

STRANGER = """
from dataclasses import dataclass

from octavo.forms import Dense, form


@form("{name}")
@dataclass(frozen=True)
class Stranger(Dense):
    def dense(self):
        return 2 * super().dense()
"""
LOAD = """
import sys, torch
from octavo.forms import restore
made = restore({"weight": torch.ones(2, 3)}, {"form": "stranger"}, (2, 3))
print(float(made.dense().sum()))
"""


def run(folder, code):
    line = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def test_an_installed_package_brings_forms(tmp_path):
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[octavo.forms]\nstranger = stranger_forms\n")
    (tmp_path / "stranger_forms.py").write_text(STRANGER.format(name="stranger"))
    found = run(tmp_path, LOAD)
    assert found.stdout.strip() == "12.0", found.stderr
    # The same module without the package that names it is not imported, though an artifact asks for it.
    (info / "entry_points.txt").unlink()
    refused = run(tmp_path, LOAD)
    assert refused.returncode and "unknown form 'stranger'" in refused.stderr


@pytest.mark.parametrize("name", ["os", "stranger_forms", "octavo.cli", "../x", "", "dense.x", 3, None, ["dense"]])
def test_names_in_manifests_import_nothing(name, monkeypatch):
    assert "os" not in FORMS
    before = set(sys.modules)
    with pytest.raises(ArtifactError, match="unknown form"):
        restore({"weight": torch.ones(2, 3)}, {"form": name}, (2, 3))
    assert set(sys.modules) == before


def test_the_stored_names_are_what_they_were():
    assert pack(Dense(torch.ones(2, 2))).meta["form"] == "dense"
    assert {"cut", "grid", "lowrank", "sum", "tensor-train"} <= set(FORMS.names())
