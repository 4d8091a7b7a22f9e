"""Sources larger than memory: one site is in memory at a time, and a killed run goes on with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import octavo

Command = Callable[..., Any]
SIDE = 1536


def write_shards(folder: Path, count: int) -> Path:
    """Matrices that are large enough to be sampled, one a shard, with their index."""
    folder.mkdir()
    where = {}
    for number in range(count):
        weight = 0.02 * torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(number))
        name, file = f"layer.{number:02d}.weight", f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: weight.bfloat16()}, folder / file)
        where[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


# What reads much imports numba, which takes 100 MB once, whatever the depth.
_PEAK = """
import contextlib, sys
with contextlib.suppress(ImportError):
    import numba
from octavo.cli import app
try:
    app(sys.argv[1:], standalone_mode=False)
finally:
    status = open("/proc/self/status").read()
    print("peak", int(status.split("VmHWM:")[1].split()[0]) * 1024, file=sys.stderr)
    print("transformers" in sys.modules, file=sys.stderr)
"""


def peak_of(lab: Any, *words: object) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *map(str, words)], env=lab.environment(), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split("peak ")[1].split()[0]), done.stderr


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_peak_memory_does_not_grow_with_depth(lab: Any, tmp_path: Path) -> None:
    words = ("--preset", "data-free", "--ratio", "4", "--methods", "entropy,keep")
    peaks = {}
    # The first layers fill the allocator's pools.
    for count in (5, 21):
        source = write_shards(tmp_path / f"source-{count}", count)
        peaks[count], _ = peak_of(lab, "compress", source, *words, "--out", tmp_path / f"out-{count}")
        assert octavo.verify(tmp_path / f"out-{count}").weights_match
    grown = 16 * SIDE * SIDE * 2
    # Of 75 MB more of source, and 19 MB more of artifact, none stays; allocators and mapped pages waver by up to 20.
    assert peaks[21] - peaks[5] < grown / 2, peaks


def test_without_data_the_artifact_is_loaded_and_no_quality_is_stated(lab: Any, bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    peak_of(lab, "compress", bert, "--preset", "data-free", "--ratio", "3", "--out", out)
    quality = json.loads((out / "report.json").read_text())["quality"]
    assert quality["value"] is None and "no data" in quality["why"] and "BertModel" in quality["loader"]
    assert (out / "tokenizer.json").exists()
    assert type(octavo.load(out)).__name__ == "BertModel"


def test_a_run_killed_at_any_site_goes_on_with_the_same_bytes(lab: Any, command: Command, tmp_path: Path) -> None:
    source = write_shards(tmp_path / "source", 5)
    words = ("compress", source, "--preset", "data-free", "--ratio", "4", "--methods", "entropy,keep")
    assert command(*words, "--out", tmp_path / "whole").code == 0
    counted = ("model.safetensors", "octavo.json")
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in counted}
    out, work = tmp_path / "out", tmp_path / ".out.octavo-work"
    for pattern, sites in (("curves/*.json", 2), ("points/*.bin", 1), ("points/*.bin", 3)):
        process = subprocess.Popen(
            lab.arguments(*words, "--out", out, "--resume"), env=lab.environment(), stdout=subprocess.DEVNULL
        )
        while process.poll() is None and len(list(work.glob(pattern))) < sites:
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert command(*words, "--out", out, "--resume").code == 0
    assert {name: (out / name).read_bytes() for name in counted} == whole


def test_a_full_disk_is_refused_before_work(refused: Any, bare: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    refused(bare, "--preset", "data-free", "--ratio", "4", says="the disk has 1000 bytes free, but the run needs about")


def test_a_tensor_that_its_shard_lacks_is_named(refused: Any, tmp_path: Path) -> None:
    source = write_shards(tmp_path / "source", 2)
    index = source / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["layer.07.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(data))
    refused(source, "--ratio", "4", says="model-00002-of-00002.safetensors: this shard lacks tensor")
    data["weight_map"] = {"layer.00.weight": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps(data))
    refused(source, "--ratio", "4", says="'layer.00.weight', which the index places in it")


def test_work_of_a_call_without_workspace_lasts_until_it_is_saved(bare: Path, tmp_path: Path) -> None:
    done = octavo.compress(bare, ratio=4, preset="data-free")
    work = done.run.workspace.path
    assert work.is_dir()
    done.save(tmp_path / "out", report=False)
    done.save(tmp_path / "again", report=False)
    del done
    assert not work.exists()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()
