"""Exporting a model to a runtime that is faster than PyTorch, verified against what it was exported from."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo import inputs
from octavo.artifact import MANIFEST, Artifact
from octavo.calibrate import calibrate
from octavo.errors import ArtifactError, OctavoError, RequestError
from octavo.files import from_path
from octavo.forms import Dense, Form
from octavo.integrations.onnx import Session, require
from octavo.objective import Objective
from octavo.runtimes.activations import rounding_losses, watch
from octavo.runtimes.graph import LOOKUP, SITE, check_exportable, positions, trace, vocabulary
from octavo.runtimes.kernels import FLOAT, kernel_of, lower
from octavo.runtimes.latency import Table, compare, machine
from octavo.sites import Layout, Source
from octavo.workspace import write_file

RUNTIMES = ("onnx",)
#: The graph with float kernels may differ from the module by this share of its largest output: operations are summed
#: in another order.
TOLERANCE = 1e-3
#: Sequences and tokens at which latency is measured, if no others are asked for.
SHAPE = (1, 32)


@dataclass
class Opened:
    """A source or an artifact, with the form of every site."""

    source: Source
    forms: dict[str, Form]
    artifact: Artifact | None = None


def open_model(path: str | Path) -> Opened:
    """An artifact or a model folder, ready to be traced."""
    path = Path(path)
    if not (path / MANIFEST).exists():
        source = inputs.open_source(from_path(path))
        check_exportable(source)
        inputs.model_of(source, blockwise=False)
        return Opened(source, dense_forms(source))
    from octavo.integrations.transformers import bind
    from octavo.verify import load

    artifact = Artifact(path)
    module = load(path)
    if not isinstance(module, nn.Module):
        raise RequestError(
            f"{path}: holds bare tensors, which have no graph to export; load them into their module with "
            "octavo.load(path, into=module) and call torch.onnx.export"
        )
    shapes = {name: tuple(entry["shape"]) for name, entry in artifact.sites.items()}
    source = Source(
        title=path.name, path=path, shapes=shapes, dtypes=dict.fromkeys(shapes, torch.float32), aliases={},
        read=artifact.tensor, module=module, is_transformers=True,
    )  # fmt: skip
    bind(source, module)
    check_exportable(source)
    forms = {name: _form(artifact, name) for name, shape in shapes.items() if len(shape) == 2}
    return Opened(source, forms, artifact)


def _form(artifact: Artifact, name: str) -> Form:
    """The form of a weight; that of a scaled matrix would be another weight."""
    layout = artifact.layout(name)
    return artifact.form(name) if not layout.exponent else Dense(_unscaled(layout).to_matrix(artifact.tensor(name)))


def _unscaled(layout: Layout) -> Layout:
    return replace(layout, exponent=0)


def dense_forms(source: Source) -> dict[str, Form]:
    """Every matrix of a source as it is."""
    return {site.name: Dense(_unscaled(site.layout).to_matrix(source.read(site.name))) for site in source.sites()[0]}


def export(
    path: str | Path,
    out: str | Path,
    *,
    to: str = "onnx",
    data: Any = None,
    objective: str | Objective | None = None,
    loss: float | None = None,
    shape: str | Sequence[int] = SHAPE,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write an artifact, or an uncompressed model, as a file that onnxruntime runs.

    Every site runs on the integer kernel that its form has (see :mod:`octavo.runtimes.kernels`), and in float32 where
    it has none or where float32 is measured to be faster at ``shape`` on this machine.

    Parameters
    ----------
    path
        An artifact, or a ``transformers`` folder.
    out
        The file to write.
    to
        ``onnx``.
    data
        Texts to measure on: a file or a list. The built-in English text by default.
    objective
        As for :func:`octavo.compress`.
    loss
        Integer kernels round their inputs. The most that this may add to the divergence, by expectation from three
        quarters of ``data``: sites run in float32, those first that lose most for the time they save, until it holds.
        No limit by default.
    shape
        Sequences and tokens for which kernels are chosen and latency is measured; the file takes any.

    Returns
    -------
    dict
        ``kernels`` and ``expected_loss`` by site, ``bytes``, ``difference`` of the float graph and its ``tolerance``,
        ``divergence`` from ``path`` on data held back, and ``latency`` next to PyTorch's.

    Raises
    ------
    RequestError
        If the model cannot be exported.
    ArtifactError
        If the file does not give the outputs that it should.
    MissingExtraError
        If the extra ``onnx`` is not installed.
    """
    require()
    out, size = Path(out).resolve(), parse_shape(shape)
    if to not in RUNTIMES:
        raise RequestError(f"--to {to!r} is not known; choose from {', '.join(RUNTIMES)}")
    if out.is_dir() or (out.exists() and not overwrite):
        raise RequestError(f"{out}: is already there; name another file, or give --overwrite to replace it")
    opened = open_model(path)
    source = opened.source
    probe(source, size)
    batches, text = inputs.load_data(source, data, limit=None)
    wanted = inputs.choose_objective(source, objective)
    batches = inputs.prepared(source, wanted, batches)
    calibration_data, held = inputs.split(batches, rows=inputs.divisible(source, wanted, batches))
    model, kinds = trace(source)
    forms = {name: opened.forms[name] for name in kinds}
    difference = check_graph(source, model, forms)
    kernels, table = _fastest(forms, kinds, size)
    expected: dict[str, float] = {}
    if loss is not None:
        # What is known of a tied head is what it does as a table: its rounding cannot be foreseen.
        kernels = {name: kernel if kinds[name] == SITE else FLOAT for name, kernel in kernels.items()}
    rounded = [name for name, kernel in kernels.items() if kernel != FLOAT]
    if rounded and loss is not None:
        sites = [site for site in source.sites()[0] if site.name in rounded]
        evidence = calibrate(source, sites, calibration_data, wanted, text=text).evidence
        expected = rounding_losses(forms, kernels, evidence, watch(source, rounded, calibration_data))
        _spare(forms, kernels, expected, table, loss)
    table.save()
    result = write_model(lower(model, forms, kernels).SerializeToString(), out, source)
    session = Session(out)
    losses = wanted.measure(session, held, wanted.reference(source.module, held)) if source.module else torch.zeros(1)
    return {
        "path": str(out),
        "source": str(path),
        "to": to,
        **result,
        "kernels": session.kernels,
        "expected_loss": {name: value for name, value in expected.items() if session.kernels[name] != FLOAT},
        "difference": difference,
        "tolerance": TOLERANCE,
        "divergence": {
            "metric": wanted.metric, "mean": float(losses.mean()), "p95": float(losses.quantile(0.95)),
            "data": f"{len(losses)} held-back examples of {text}",
        },
        "latency": latency(source, session, size),
        "machine": machine(torch.get_num_threads()),
    }  # fmt: skip


def parse_shape(shape: str | Sequence[int]) -> tuple[int, int]:
    """Sequences and tokens of ``1x32``, or of two numbers.

    Raises
    ------
    RequestError
        If it is neither.
    """
    parts = shape.lower().split("x") if isinstance(shape, str) else list(shape)
    try:
        batch, tokens = map(int, parts)
    except ValueError as error:
        raise RequestError(f"shape {shape!r}: write sequences and tokens, such as 1x32") from error
    if min(batch, tokens) < 1:
        raise RequestError(f"shape {shape!r}: sequences and tokens are at least 1")
    return batch, tokens


def _fastest(
    forms: Mapping[str, Form], kinds: Mapping[str, str], shape: tuple[int, int]
) -> tuple[dict[str, str], Table]:
    """The faster of float32 and the form's integer kernel for every matrix, and the table that says so."""
    table = Table(shape[0] * shape[1])
    kernels = {}
    for name, kind in kinds.items():
        own = FLOAT if kind == LOOKUP else kernel_of(forms[name])
        faster = own != FLOAT and table.seconds(forms[name], own) < table.seconds(forms[name], FLOAT)
        kernels[name] = own if faster else FLOAT
    return kernels, table


def _spare(
    forms: Mapping[str, Form], kernels: dict[str, str], expected: Mapping[str, float], table: Table, loss: float
) -> None:
    """Put sites back to float32, those first that lose most a second saved, until what is expected is ``loss``."""

    def worth(name: str) -> float:
        saved = table.seconds(forms[name], FLOAT) - table.seconds(forms[name], kernels[name])
        return expected[name] / saved

    left = sum(expected.values())
    for name in sorted(expected, key=worth, reverse=True):
        if left <= loss:
            return
        kernels[name] = FLOAT
        left -= expected[name]


def check_graph(source: Source, model: Any, forms: Mapping[str, Form]) -> float:
    """Run the graph with float kernels beside the module on probe tokens; returns the largest relative difference.

    Raises
    ------
    ArtifactError
        If it is above :data:`TOLERANCE`.
    """
    session = Session(lower(model, forms, {}).SerializeToString())
    assert source.module is not None
    generator = torch.Generator().manual_seed(0)
    length = min(24, positions(source))
    tokens = torch.randint(0, vocabulary(source), (3, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, length * 2 // 3 :] = 0
    with torch.inference_mode():
        wanted = source.module(input_ids=tokens, attention_mask=mask)[session.names[0]].float()
    found = session(input_ids=tokens, attention_mask=mask)[session.names[0]]
    live = mask.bool()
    difference = float((found - wanted)[live].abs().max() / wanted[live].abs().max().clamp_min(1e-30))
    if not difference <= TOLERANCE:
        raise ArtifactError(
            f"{source.title}: the exported graph differs from the model by {difference:.2g} of its largest output "
            f"({TOLERANCE:g} is allowed); nothing was written. Please report this with the model's config.json"
        )
    return difference


def write_model(content: bytes, out: Path, source: Source) -> dict[str, Any]:
    """Write a model, whole or not at all, once it was seen to load and to run from the disk."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            aside = Path(folder) / out.name
            write_file(aside, content)
            outputs = Session(aside)(**probe(source, (1, min(16, positions(source)))))
            if not all(bool(torch.isfinite(value).all()) for value in outputs.values()):
                raise ArtifactError(f"{out}: the exported model gives NaN or Inf; nothing was written")
            os.replace(aside, out)
    except OSError as error:
        raise OctavoError(f"{out}: cannot be written: {error.strerror or error}") from error
    return {"bytes": out.stat().st_size}


def probe(source: Source, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Random tokens of a shape, none of them padding.

    Raises
    ------
    RequestError
        If the model takes fewer tokens.
    """
    if shape[1] > positions(source):
        raise RequestError(
            f"{source.title}: has {positions(source)} positions, {shape[0]}x{shape[1]} asks for {shape[1]} tokens each"
        )
    tokens = torch.randint(0, vocabulary(source), shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def latency(source: Source, session: Session, shape: tuple[int, int]) -> dict[str, Any]:
    """Median seconds of the exported file and of the module in PyTorch, taking turns, with the same threads."""
    batch = probe(source, shape)
    assert source.module is not None
    module, feed = source.module, session.feed(batch)
    taken = compare(
        {"torch float32": lambda: module(**batch), "onnxruntime": lambda: session.session.run(None, feed)},
        "torch float32",
    )
    speedup = taken["onnxruntime"]["speedup"]
    return {
        "shape": list(shape),
        "threads": torch.get_num_threads(),
        "torch_seconds": taken["torch float32"]["seconds"],
        "seconds": taken["onnxruntime"]["seconds"],
        "speedup": speedup,
        "note": "" if speedup >= 1 else "the exported model is slower than the dense one in PyTorch",
    }
