"""Octavo and other tools side by side: same models, same text, bytes counted by one rule. `make bench` runs it.

Writes docs/results/bench.json, a list of rows. A row that is there with the same version and setting is not made
again; `--force` makes it anew. `--models smollm2 --tools hqq,torchao --settings 4-bit` selects. Every tool runs in a process and an
environment of its own, which is made the first time.

Bytes are all that it takes to restore the weights: codes at their nominal width, scales and offsets as the tool has
them, everything else at 16 bits a weight. Octavo's are its files as `stat` counts them. Most tools leave embeddings
alone; so that this decides nothing, each gets rows with the embedding rounded to nearest in groups of 64.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import CACHE, RESULTS, save_results, stat_bytes
from judge import Judge, round_to_nearest, work_folder
from judges import judge as judge_of
from models import TITLES, model_folder
from safetensors.torch import load_file, save_file

from octavo.system.atomic import write_file

#: In the order of their speed, so that figures come early.
TOOLS = ("own", "torchao", "quanto", "hqq", "nncf", "llmcompressor", "gptqmodel", "auto_round", "llama_cpp")
#: What Octavo is asked for, as ratios to float32: just under the sizes at which other tools have their best points.
RATIOS = {
    "minilm": (4, 5.2, 7.25, 9.2, 11.05, 13.25),
    "smollm2": (5.6, 7.45, 9.25, 12.95),
    "gemma": (3.85, 7.45, 9.8, 11.1, 14.2),
    "decoder": (4, 7.3, 9.3, 12.9),
    "whisper": (4, 7.3, 9.3, 12.9),
    "lite0": (4, 5, 7.05, 10),
}
#: Bits of the embedding in the rows that give a tool one, from its own bits down to about half of them; more were
#: never on the front.
EMBEDDINGS = (8, 4, 3, 2)
#: Time that one setting of one tool may take.
_HOURS = 12
FILE = RESULTS / "bench.json"
COLUMNS = ("model", "tool", "version", "setting", "bytes", "bits_per_weight", "metric", "quality", "second_metric", "second", "seconds", "latency", "peak_memory", "generates", "error")  # fmt: skip


def read_rows() -> list[dict[str, Any]]:
    """Rows so far."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else []


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """What makes a row itself."""
    return row["model"], row["tool"], row["version"], row["setting"]


@contextmanager
def locked() -> Iterator[None]:
    """Keep other runs of this script from writing at the same time."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "bench.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_row(**values: Any) -> None:
    """Add a row, or exchange the one of the same tool and setting."""
    row = {column: values.get(column) for column in COLUMNS}
    with locked():
        others = [old for old in read_rows() if (old["model"], old["tool"], old["setting"]) != (row["model"], row["tool"], row["setting"])]  # fmt: skip
        rank = lambda row: (list(TITLES).index(row["model"]), row["tool"], row["bytes"] or 0, row["setting"])  # noqa: E731
        rows = sorted([*others, row], key=rank)
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_file(FILE, ("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n").encode())
    size, quality = row["bytes"] or 0, row["quality"]
    print(f"{row['model']:8} {row['tool']:14} {row['setting']:44} {size / 1e6:8.2f} MB  {row['error'] if quality is None else quality}", flush=True)  # fmt: skip


def environment(tool: str, packages: list[str]) -> Path:
    """The interpreter of a tool: its own environment over the torch of this one."""
    if not packages:
        return Path(sys.executable)
    folder = CACHE / "peers" / tool
    python = folder / "bin" / "python"
    stamp = folder / "packages.txt"
    wanted = "\n".join([f"torch=={version('torch').partition('+')[0]}", *packages])
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"making the environment of {tool} in {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        site = next((folder / "lib").glob("python*")) / "site-packages"
        # What is not installed there, torch first of all, is found here; what is installed there goes first.
        (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-input"]
        subprocess.run([*pip, *wanted.split("\n")], check=True)
        stamp.write_text(wanted)
    return python


def version_of(peer: Any) -> str:
    """The version that a tool is pinned to, or that this environment has."""
    return peer.PACKAGES[0].partition("==")[2] if peer.PACKAGES else version(peer.PACKAGE)


def run_tool(judge: Judge, tool: str, force: bool, wanted: str) -> None:
    """All settings of one tool on one model that have ``wanted`` in their names."""
    peer = importlib.import_module(f"peers.{tool}")
    done = {key(row) for row in read_rows()}
    for setting, arguments in peer.settings(judge.name).items():
        tag = {"model": judge.name, "tool": tool, "version": version_of(peer), "setting": setting}
        if wanted not in setting or (key(tag) in done and not force):
            continue
        folder = work_folder(judge.name, tool, setting)
        try:
            python = environment(tool, peer.PACKAGES)
        except subprocess.CalledProcessError as error:
            write_row(**tag, error=f"its packages cannot be installed: {error}")
            continue
        judge_tool(judge, tag, run_child(judge, tool, python, arguments, folder, force), folder)
        shutil.rmtree(folder)


def run_child(
    judge: Judge, tool: str, python: Path, arguments: dict[str, Any], folder: Path, force: bool
) -> dict[str, Any]:
    """Run one setting in a process of its own; a result of the same task that was not judged yet is used."""
    result, written = folder / "result.json", folder / "task.json"
    task = {
        "model": judge.name, "folder": str(judge.folder), "data": str(folder / "calibration.safetensors"),
        "arguments": arguments,
    }  # fmt: skip
    if force or not result.exists() or json.loads(written.read_text(encoding="utf-8")) != task:
        folder.mkdir(parents=True, exist_ok=True)
        result.unlink(missing_ok=True)
        save_file(judge.inputs(), folder / "calibration.safetensors")
        written.write_text(json.dumps(task), encoding="utf-8")
        command = [python, "-m", "peers.child", tool, written]
        with open(folder / "log.txt", "w") as log:
            # Some tools leave logs where they are started.
            paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
            run = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": paths}, "stdout": log, "stderr": log, "timeout": _HOURS * 3600}  # fmt: skip
            try:
                code = subprocess.run(command, check=False, **run).returncode
            except subprocess.TimeoutExpired:
                return {"error": f"not done after {_HOURS} hours"}
        if not result.exists():
            tail = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
            return {"error": f"the process ended with {code}: {' '.join(tail)[:300]}"}
    return dict(json.loads(result.read_text(encoding="utf-8")))


def judge_tool(judge: Judge, tag: dict[str, str], result: dict[str, Any], folder: Path) -> None:
    """Rows of a tool's weights: as they are, and with the embedding rounded as well."""
    common = {
        **tag,
        "metric": judge.metric,
        "second_metric": judge.second_metric,
        **{name: result.get(name) for name in ("seconds", "peak_memory", "latency")},
    }
    if result.get("error"):
        # What is published names no folder of this machine.
        said = result["error"].replace(str(folder), tag["setting"]).replace(str(judge.folder), judge.name)
        write_row(**{**common, "seconds": None}, error=said)
        return
    weights, bits = load_file(folder / "weights.safetensors"), result["bits"]

    def row(setting: str, **changed: Any) -> dict[str, Any]:
        size = judge.size(bits)
        return {**common, "error": result.get("note"), "setting": setting, **changed, "bytes": size, "bits_per_weight": size * 8 / judge.weights, **judge.quality(weights)}  # fmt: skip

    whole = row(tag["setting"])
    # A tool that rounds embeddings itself needs no help, and one that broke the model is past it.
    if judge.embedding and judge.embedding not in weights and whole["quality"] < judge.hopeless:
        own = sum(bits.values()) / sum(tensor.numel() for tensor in weights.values())
        for width in (width for width in EMBEDDINGS if own / 2 - 0.5 <= width <= own + 0.75):
            rounded, cost = round_to_nearest(judge.original[judge.embedding], width)
            weights[judge.embedding], bits[judge.embedding] = rounded, cost
            # The tool's own runtime does not know of the rounded embedding.
            write_row(**row(f"{tag['setting']} + RTN emb{width} g64", latency=None, error=None))
    # Last, since it says that the setting is done.
    write_row(**whole)


def run_octavo(judge: Judge, force: bool) -> None:
    """Octavo at every ratio from one saved profile."""
    import octavo

    tag = {"model": judge.name, "tool": "octavo", "version": octavo.__version__}
    measured = {"metric": judge.metric, "second_metric": judge.second_metric}
    done = {key(row) for row in read_rows()}
    asked = [ratio for ratio in RATIOS[judge.name] if force or (*tag.values(), f"ratio {ratio:g}") not in done]
    if not asked:
        return
    work = CACHE / "bench" / judge.name / "octavo"
    started = time.perf_counter()
    octavo.profile(judge.source, work / "profile", data=judge.data, resume=not force, **judge.options)
    profiled = time.perf_counter() - started
    for ratio in asked:
        setting, started = f"ratio {ratio:g}", time.perf_counter()
        try:
            compressed = octavo.compress(
                judge.source, ratio=ratio, data=judge.data, workspace=work / "profile", resume=True, **judge.options
            )
            compressed.save(work / "artifact", overwrite=True)
            seconds = profiled + time.perf_counter() - started
            model = judge.reload(work / "artifact")
        except octavo.OctavoError as error:
            write_row(**tag, setting=setting, error=f"{type(error).__name__}: {error}")
            continue
        size = stat_bytes(work / "artifact")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        write_row(**tag, **measured, setting=setting, bytes=size, bits_per_weight=size * 8 / judge.weights, seconds=seconds, peak_memory=peak, generates=judge.generates(model), **judge.measure(model))  # fmt: skip


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(TITLES), help="names, separated by commas")
    parser.add_argument("--tools", default=",".join((*TOOLS, "octavo")), help="names, separated by commas")
    parser.add_argument("--settings", default="", help="only settings of other tools that have this in their names")
    parser.add_argument("--force", action="store_true", help="make rows anew that are there")
    options = parser.parse_args()
    for names, known in ((options.models.split(","), TITLES), (options.tools.split(","), (*TOOLS, "octavo"))):
        if unknown := set(names) - set(known):
            parser.error(f"{sorted(unknown)[0]!r} is not one of {', '.join(known)}")
    save_results("bench-run", {"threads": torch.get_num_threads()})
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    for model in options.models.split(","):
        model_folder(model)
        judge = judge_of(model)
        for tool in options.tools.split(","):
            if tool == "octavo":
                run_octavo(judge, options.force)
            else:
                run_tool(judge, tool, options.force, options.settings)


if __name__ == "__main__":
    main()
