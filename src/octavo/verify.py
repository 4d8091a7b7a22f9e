"""Writing an artifact, and proving from the disk that it is what it claims."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import octavo
from octavo.artifact import MANIFEST, WEIGHTS, Artifact, dtype_name
from octavo.errors import ArtifactError, MissingExtraError, OctavoError, RequestError
from octavo.job import replaced
from octavo.objective import run
from octavo.raw import raw_bytes

if TYPE_CHECKING:
    from octavo.compress import Compressed

REPORT = "report.html"
_PAIRS = 7
#: Files of the source that are copied: everything that loaders and tokenizers read, and nothing that holds weights.
_COPIED = {".json", ".txt", ".model", ".jinja", ".spm", ".vocab"}


def load(path: str | Path, into: nn.Module | None = None) -> Any:
    """Load an artifact.

    Parameters
    ----------
    path
        The artifact folder.
    into
        A module to load the weights into. Without it a ``transformers`` artifact gives its model, and any other the
        dictionary of its tensors.

    Raises
    ------
    ArtifactError
        If the artifact is damaged, or does not fit ``into``.
    """
    path = Path(path)
    if into is None and (path / MANIFEST).exists() and (path / "config.json").exists():
        from octavo.integrations.transformers import load_model

        # The loader of transformers opens the files first, and its errors are not ours.
        Artifact(path)
        return load_model(path)
    state = Artifact(path).state()
    if into is None:
        return state
    try:
        into.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ArtifactError(f"{path}: does not fit {type(into).__name__}: {error}") from error
    return into


def save(done: Compressed, path: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write the artifact of a finished compression; nothing is left behind if anything fails.

    The folder is written aside, read back, measured, and only then renamed into place.

    Raises
    ------
    RequestError
        If the folder is not empty and ``overwrite`` is not set, or cannot be written.
    ArtifactError
        If what was read back is not what was written.
    """
    # The folder itself: a link to it stays a link, and "." has a name.
    path = path.resolve()
    check_writable(path, overwrite=overwrite, source=done.job.source.path)
    started = time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        _write(done, aside)
        artifact = Artifact(aside)
        state = artifact.state()
        _compare(done, artifact, state)
        done.timings["verify"] = time.perf_counter() - started
        data = report_data(done, artifact, state)
        done.timings["measure"] = time.perf_counter() - started - done.timings["verify"]
        data["timings"] = {**done.timings, "total": sum(done.timings.values())}
        _write_report(data, aside)
        _publish(aside, path)
    except OSError as error:
        raise OctavoError(f"{path}: cannot be written: {error.strerror or error}; nothing was left there") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return data


def check_writable(path: Path, *, overwrite: bool, source: str | Path | None = None) -> None:
    """Refuse an output folder that is in use, holds the source, or cannot be written, before work starts."""
    path = path.resolve()
    if source is not None and Path(source).resolve().is_relative_to(path):
        raise RequestError(f"{path}: holds the source, which would be replaced; choose another folder")
    if path.exists() and not path.is_dir():
        raise RequestError(f"{path}: is a file; name a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise RequestError(f"{path}: the folder is not empty; choose another, or give --overwrite to replace it")
    try:
        # Asking the file system is the only test that holds for every user, root included.
        with tempfile.TemporaryDirectory(prefix=".octavo-", dir=next(p for p in path.parents if p.exists())):
            pass
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from error


def _write(done: Compressed, folder: Path) -> None:
    source = done.job.source
    for name, content in done.built.contents.files().items():
        _write_flushed(folder / name, content)
    if source.is_transformers and source.path is not None:
        from octavo.integrations.transformers import artifact_config

        _copy_companions(source.path, folder)
        (folder / "config.json").write_text(json.dumps(artifact_config(source.path), indent=2) + "\n", encoding="utf-8")


def _write_flushed(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation and pooling files; weights, hidden files and large files stay behind."""
    for file in sorted(source.rglob("*")):
        relative = file.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        if not file.is_file() or hidden or file.suffix not in _COPIED or file.name.endswith(".index.json"):
            continue
        if len(relative.parts) > 2 or (file.name in (MANIFEST, "config.json") and len(relative.parts) == 1):
            continue
        target = folder / relative
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def _publish(aside: Path, path: Path) -> None:
    """Rename the finished folder into place; an old one is moved aside first and removed last."""
    os.chmod(aside, 0o755)
    if not path.exists():
        os.replace(aside, path)
        return
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.old.", dir=path.parent, ignore_cleanup_errors=True) as old:
        os.replace(path, Path(old) / "folder")
        try:
            os.replace(aside, path)
        except OSError:
            os.replace(Path(old) / "folder", path)
            raise


def _compare(done: Compressed, artifact: Artifact, state: dict[str, Tensor]) -> None:
    """What was read from the disk must be, bit for bit, what was measured."""
    if artifact.bytes != done.built.bytes:
        raise ArtifactError(f"{artifact.path}: {artifact.bytes} bytes on disk, {done.built.bytes} were planned")
    expected = {**done.job.weights(done.built.packed), **{n: t.to(d) for n, (t, d) in done.built.contents.kept.items()}}
    if set(state) != {*expected, *done.job.source.aliases}:
        raise ArtifactError(f"{artifact.path}: the tensors read back are not those written")
    for name, tensor in expected.items():
        if not torch.equal(state[name], tensor):
            raise ArtifactError(f"{artifact.path}: tensor {name!r} reads back differently")


def digest_of(artifact: Artifact) -> str:
    """SHA-256 over the decoded content of every tensor: codes, steps, factors.

    It is the same on every machine, which a product of two factors, rounded as the machine's library likes, is not.
    """
    digest = hashlib.sha256()
    for name in sorted(artifact.names()):
        parts = artifact.form(name).tensors() if name in artifact.sites else {"": artifact.tensor(name)}
        for part, tensor in sorted(parts.items()):
            digest.update(f"{name} {part} {dtype_name(tensor.dtype)} {tuple(tensor.shape)}\n".encode())
            if tensor.numel():
                digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def probe_outputs(module: nn.Module, seed: int = 0) -> str | None:
    """SHA-256 of a transformers model's first output on fixed tokens; None for what takes no token ids."""
    vocabulary = getattr(getattr(module, "config", None), "vocab_size", None)
    if not vocabulary:
        return None
    tokens = torch.randint(0, vocabulary, (2, 16), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        first = next(value for value in module(input_ids=tokens).values() if isinstance(value, Tensor))
    return hashlib.sha256(first.contiguous().numpy().tobytes()).hexdigest()


def verify(path: str | Path) -> dict[str, Any]:
    """Read an artifact from disk and check everything that can be checked without the source.

    Returns
    -------
    dict
        ``bytes``, ``ratio``, ``tensors``, ``weights_match`` and ``outputs_match`` (None if nothing was recorded).

    Raises
    ------
    ArtifactError
        At the first thing that is wrong.
    """
    artifact = Artifact(path)
    state = artifact.state()
    recorded = _recorded(artifact.path)
    digest = digest_of(artifact)
    result: dict[str, Any] = {
        "path": str(path),
        "bytes": artifact.bytes,
        "ratio": artifact.manifest["source"]["bytes"] / artifact.bytes,
        "tensors": len(state),
        "weights_sha256": digest,
        "weights_match": None if recorded.get("weights") is None else recorded["weights"] == digest,
        "outputs_match": None,
    }
    if recorded.get("outputs") is not None:
        result["outputs_match"] = recorded["outputs"] == probe_outputs(load(path))
    if result["weights_match"] is False:
        raise ArtifactError(f"{path}: the restored weights are not those recorded when it was written")
    return result


def _recorded(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((path / REPORT).with_suffix(".json").read_text(encoding="utf-8"))["digests"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_report(data: dict[str, Any], folder: Path) -> None:
    from octavo import report

    (folder / "README.md").write_text(report.card(data), encoding="utf-8")
    try:
        report.write(data, folder / REPORT)
    except MissingExtraError:
        # The artifact and its figures do not depend on a plotting library.
        (folder / REPORT).with_suffix(".json").write_text(json.dumps(data), encoding="utf-8")


def report_data(done: Compressed, artifact: Artifact, state: dict[str, Tensor]) -> dict[str, Any]:
    """The report's data; quality is measured on the tensors that were read back."""
    job, profile, built = done.job, done.profile, done.built
    quality, p95 = built.quality, built.p95
    digests: dict[str, str | None] = {"weights": digest_of(artifact), "outputs": None}
    if job.source.module is not None:
        names = {job.source.parameters[n]: t for n, t in state.items() if n in job.source.parameters}
        losses = job.measure(state)
        quality, p95 = float(losses.mean()), float(losses.quantile(0.95))
        if job.source.is_transformers:
            with replaced(job.source.module, names):
                digests["outputs"] = probe_outputs(job.source.module)
    sites = [_site_row(done, name) for name in built.packed]
    families: dict[str, dict[str, Any]] = {}
    for row in sites:
        family = families.setdefault(row["family"], {"sites": 0, "bytes": 0, "expected_loss": 0.0})
        family["sites"] += 1
        family["bytes"] += row["bytes"]
        family["expected_loss"] += row["expected_loss"]
    codecs: dict[str, int] = {}
    for packed in built.packed.values():
        for codec, size in packed.codecs.items():
            codecs[codec] = codecs.get(codec, 0) + size
    note = "" if artifact.bytes >= done.budget.least else _why_less(done)
    return {
        "title": profile.title,
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "octavo_version": octavo.__version__,
        "command": done.command or f"octavo.compress(source, {done.budget.asked.replace(' ', '=')}).save(path)",
        "environment": environment(),
        "seed": job.seed,
        "preset": done.preset,
        "source": {
            "path": str(job.source.path or job.source.title),
            "fingerprint": profile.fingerprint,
            "bytes": profile.original_bytes,
            "parameters": profile.weights,
            "dtypes": _dtypes(done),
        },
        "budget": {"asked": done.budget.asked, "bytes": done.budget.bytes},
        "artifact": {
            "bytes": artifact.bytes,
            "ratio": profile.original_bytes / artifact.bytes,
            "used": artifact.bytes / done.budget.bytes,
            "files": {file.name: file.stat().st_size for file in artifact.files()},
            "bits_per_weight": artifact.bytes * 8 / profile.weights,
            "note": note,
        },
        "quality": {
            "metric": job.objective.metric if job.measurable else "expected relative error of the weights",
            "lower_is_better": True,
            "data": f"{sum(map(_length, job.held_data))} held-back examples of {job.text}"
            if job.measurable
            else job.text,
            "value": quality,
            "uniform": done.rival.quality if done.rival else None,
            "p95": p95,
        },
        "latency": _latency(done, artifact, state),
        "calibration": {
            "text": done.calibration.text,
            "sequences": done.calibration.sequences,
            "tokens": done.calibration.tokens,
            "warnings": done.calibration.warnings + job.notes,
        },
        "winner": "uniform" if built is done.rival else "mixed",
        "uniform": _uniform_row(done),
        "curve": curve_data(done),
        "sites": sites,
        "kept": [_kept_row(done, name, reason) for name, reason in job.left.items()],
        "families": families,
        "code_lengths": _code_lengths(sites),
        "coding": codecs,
        "digests": digests,
        "timings": {},
        "peak_memory": peak_memory(),
    }


def _why_less(done: Compressed) -> str:
    return (
        "less than 98% of the budget is used: with these methods and settings more bytes would not lower the expected loss, "
        "or none of them has a continuous setting"
    )


def environment() -> dict[str, Any]:
    """Versions and machine, without anything that names a person or a path."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _length(batch: Any) -> int:
    from octavo.objective import sequences_in

    return sequences_in(batch)


def _dtypes(done: Compressed) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, dtype in done.job.source.dtypes.items():
        elements = int(torch.tensor(done.job.source.shapes[name]).prod())
        counts[dtype_name(dtype)] = counts.get(dtype_name(dtype), 0) + elements
    return counts


def _site_row(done: Compressed, name: str) -> dict[str, Any]:
    from octavo.methods import get_method

    site, point, packed = done.job.site(name), done.built.plan.points[name], done.built.packed[name]
    curve = next(curve for curve in done.profile.curves if curve.site == name)
    return {
        "name": name,
        "kind": site.kind,
        "shape": list(site.shape),
        "parameters": site.parameters,
        "method": point.method,
        "family": get_method(point.method).family,
        "setting": point.setting,
        "bytes": packed.bytes,
        "original_bytes": site.parameters * site.dtype.itemsize,
        "bits_per_weight": packed.bytes * 8 / site.parameters,
        "expected_loss": done.profile.corrected(curve, point.loss),
        "form": packed.meta["form"],
        "tied": list(site.tied),
    }


def _kept_row(done: Compressed, name: str, reason: str) -> dict[str, Any]:
    tensor, dtype = done.built.contents.kept[name]
    narrow = f": stored as {dtype_name(tensor.dtype)}" if tensor.dtype != dtype else ": stored as it is"
    return {
        "name": name,
        "shape": list(tensor.shape),
        "bytes": tensor.numel() * tensor.element_size(),
        "original_bytes": tensor.numel() * dtype.itemsize,
        "reason": reason if reason.startswith("not a floating") else reason + narrow,
    }


def _uniform_row(done: Compressed) -> dict[str, Any]:
    plan = done.rival
    if plan is None:
        return {}
    point = next(iter(plan.plan.points.values()))
    return {"method": plan.plan.label, "setting": point.setting, "bytes": plan.bytes, "quality": plan.quality}


def curve_data(done: Compressed) -> dict[str, Any]:
    """Expected loss over ratios from the profile, and what uniform settings would give."""
    from octavo.allocate import allocate, uniform
    from octavo.budget import Budget
    from octavo.errors import BudgetError

    profile, points, rivals = done.profile, [], []
    for share in (0.5, 0.62, 0.78, 1.0, 1.25, 1.6, 2.0):
        size = int(done.built.bytes * share)
        try:
            plan = allocate(profile, Budget(size, ""))
        except BudgetError:
            continue
        if plan.bytes < 0.97 * size:
            continue  # beyond the profiled range the curve would only repeat its end
        ratio = profile.original_bytes / plan.bytes
        points.append({"ratio": ratio, "bytes": plan.bytes, "expected": plan.expected, "measured": None})
    for plan in uniform(profile, done.budget):
        method, _, setting = plan.label.partition(" ")
        ratio = profile.original_bytes / plan.bytes
        rivals.append(
            {
                "method": method,
                "setting": setting,
                "ratio": ratio,
                "bytes": plan.bytes,
                "expected": plan.expected,
                "measured": None,
            }
        )
    if done.rival is not None:
        for row in rivals:
            if done.rival.plan.label.startswith(row["method"] + " "):
                row["measured"] = done.rival.quality
    chosen = {"ratio": done.ratio, "bytes": done.built.bytes, "quality": done.built.quality}
    return {"points": points, "uniform": rivals, "chosen": chosen}


def _code_lengths(sites: list[dict[str, Any]]) -> dict[str, list[float]]:
    top = max([1.0, *(row["bits_per_weight"] for row in sites)])
    step = 0.25 if top <= 8 else 0.5 if top <= 16 else 1.0
    bins = [step * k for k in range(int(top / step) + 2)]
    weights = [0] * (len(bins) - 1)
    for row in sites:
        weights[min(int(row["bits_per_weight"] / step), len(weights) - 1)] += row["parameters"]
    return {"bins": bins, "weights": weights}


def _latency(done: Compressed, artifact: Artifact, state: dict[str, Tensor]) -> dict[str, Any] | None:
    """Latency of a forward pass before and after, in one run and interleaved, so that the machine's load cancels."""
    job = done.job
    if job.source.module is None or not job.held_data:
        return None
    module, batch = job.source.module, job.held_data[0]
    weights = {job.source.parameters[n]: t for n, t in state.items() if n in job.source.parameters}

    def timed(call: Callable[[], Any]) -> float:
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1000

    original, compressed = [], []
    with torch.inference_mode():
        for _ in range(_PAIRS + 1):
            with replaced(module, {}):
                original.append(timed(lambda: run(module, batch)))
            with replaced(module, weights):
                compressed.append(timed(lambda: run(module, batch)))
    result = {
        "unit": "ms",
        "original": statistics.median(original[1:]),
        "artifact": statistics.median(compressed[1:]),
        "note": f"median of {_PAIRS} interleaved passes of one batch; weights are decoded at load, so both run dense kernels",
    }
    if job.source.is_transformers and job.source.path is not None:
        from octavo.integrations.transformers import load_model

        # The reader of the original must touch its pages as well: a mapped file that nobody read is not loaded.
        pairs = [
            (
                timed(lambda: _touch(type(module).from_pretrained(job.source.path))),
                timed(lambda: _touch(load_model(artifact.path))),
            )
            for _ in range(4)
        ]
        result["load_original"], result["load_artifact"] = (
            statistics.median(column) for column in zip(*pairs[1:], strict=True)
        )
    return result


def _touch(module: nn.Module) -> float:
    return float(sum(parameter.detach().sum() for parameter in module.parameters()))


__all__ = ["REPORT", "WEIGHTS", "check_writable", "load", "save", "verify"]
