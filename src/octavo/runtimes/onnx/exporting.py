"""Exporting a model to a runtime that is faster than PyTorch, verified against the original."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octavo.calibration import inputs
from octavo.calibration.calibrating import calibrate
from octavo.calibration.objective import Objective
from octavo.errors import ArtifactError, RequestError
from octavo.forms import Dense, Form
from octavo.runtimes.onnx.activations import rounding_losses, watch
from octavo.runtimes.onnx.given import Inputs, Tokens, inputs_of, vocabulary
from octavo.runtimes.onnx.graph import SITE, TIED, trace
from octavo.runtimes.onnx.kernels import FLOAT, kernel_of, lower
from octavo.runtimes.onnx.latency import Machine, Table, compare, machine
from octavo.runtimes.onnx.opened import open_model
from octavo.runtimes.onnx.sessions import Session, require
from octavo.runtimes.onnx.small import lower_small
from octavo.sources.batches import Batch
from octavo.sources.source import Source
from octavo.system.atomic import tidy, writing
from octavo.system.locks import Lock
from octavo.system.paths import checked_output
from octavo.system.raw import narrowed
from octavo.system.replacing import check_file

RUNTIMES = ("onnx",)
SIZE, SPEED = "size", "speed"
PREFERENCES = (SIZE, SPEED)
#: The graph with float kernels may differ from the module by this share of its largest output, since sums have another
#: order.
TOLERANCE = 1e-3
#: Default sequences and tokens for measuring latency.
SHAPE = (1, 32)
#: Largest number of tokens in a shape, over all sequences.
MOST = 2**20


@dataclass(frozen=True)
class Moved:
    """How far the file's outputs are from the model's on held-out ``data``: mean and 95th percentile of ``metric``."""

    metric: str
    mean: float
    p95: float
    data: str


@dataclass(frozen=True)
class Timing:
    """Median seconds of the exported file, and of the module in PyTorch in float32, with the same threads.

    Parameters
    ----------
    shape
        Of the input that was timed: examples first.
    threads
        Threads of both.
    torch_seconds, seconds
        Of PyTorch, and of the file.
    speedup
        Median over the turns of the time of PyTorch by that of the file.
    note
        Says so if the file is slower.
    """

    shape: tuple[int, ...]
    threads: int
    torch_seconds: float
    seconds: float
    speedup: float
    note: str = ""


@dataclass(frozen=True)
class Exported:
    """A file that was written, and what was measured of it.

    Parameters
    ----------
    path, source, to, prefer
        What was written, of what, for which runtime, and for which preference.
    bytes
        Of the file.
    packed_bytes
        Of all tensors, with integers at 4, 8, 16 or 32 bits.
    artifact_bytes
        Of the artifact that was exported; None for another source.
    kernels
        Kernel by site.
    expected_loss
        Divergence that rounding inputs is expected to add, by site that rounds them.
    difference, tolerance
        Largest relative difference of the graph with float kernels from the module, and what is allowed.
    divergence
        From the source on held-out data; None without data.
    latency
        Next to PyTorch's.
    machine
        The machine that it was measured on.
    """

    path: str
    source: str
    to: str
    prefer: str
    bytes: int
    packed_bytes: int
    artifact_bytes: int | None
    kernels: Mapping[str, str]
    expected_loss: Mapping[str, float]
    difference: float
    tolerance: float
    divergence: Moved | None
    latency: Timing
    machine: Machine


def export(
    path: str | Path,
    out: str | Path,
    *,
    to: str = "onnx",
    data: Any = None,
    objective: str | Objective | None = None,
    loss: float | None = None,
    shape: str | Sequence[int] = SHAPE,
    prefer: str = SIZE,
    overwrite: bool = False,
) -> Exported:
    """Write an artifact, or an uncompressed model, as a file that onnxruntime runs.

    With ``prefer="size"`` every matrix and table is stored with the fewest bits that are exact for its form.
    onnxruntime decodes them when it opens the file, and then runs them in float32 (see
    :mod:`octavo.runtimes.onnx.weights`).

    With ``prefer="speed"`` every site runs on the integer kernel of its form (see :mod:`octavo.runtimes.onnx.kernels`).
    It runs in float32 if there is none or if float32 is measured to be faster at ``shape`` on this machine. Sites that
    run in float32 are stored in float32.

    Parameters
    ----------
    path
        An artifact, or a ``transformers`` folder.
    out
        The file to write.
    to
        ``onnx``.
    data
        Texts to measure on: a file or a list; the built-in English text by default. For a model that takes no text,
        batches: mappings of tensors by name, examples first.
    objective
        As for :func:`octavo.pipeline`.
    loss
        Integer kernels round their inputs. This limits the expected increase of the divergence from that rounding,
        estimated on three quarters of ``data``: sites with the highest loss per time saved run in float32 until it is
        met. No limit by default. With ``prefer="size"`` nothing is rounded.
    shape
        Sequences and tokens for choosing kernels and measuring latency; the file accepts any.
    prefer
        ``size`` or ``speed``.

    Returns
    -------
    Exported
        What was written, and what was measured of it.

    Raises
    ------
    RequestError
        If the model cannot be exported, or ``out`` is part of ``path``, or exists and is not a regular file or
        ``overwrite`` is not set.
    ArtifactError
        If the file does not give the expected outputs.
    MissingExtraError
        If the extra ``onnx`` is not installed.

    Examples
    --------
    >>> import octavo
    >>> done = octavo.export("folded", "model.onnx", data="held-out.txt")
    >>> done.difference <= done.tolerance
    True
    """
    require()
    out = check_file(checked_output(out), overwrite=overwrite, source=path)
    with Lock(out):
        tidy(out)
        return _exported(path, out, to, data, objective, loss, shape, prefer)


def _exported(
    path: str | Path,
    out: Path,
    to: str,
    data: Any,
    objective: str | Objective | None,
    loss: float | None,
    shape: str | Sequence[int],
    prefer: str,
) -> Exported:
    size = parse_shape(shape)
    if to not in RUNTIMES:
        raise RequestError(f"--to {to!r} is not known; choose from {', '.join(RUNTIMES)}")
    if prefer not in PREFERENCES:
        raise RequestError(f"--prefer {prefer!r} is not known; choose from {', '.join(PREFERENCES)}")
    if loss is not None:
        _check_loss(loss, prefer)
    opened = open_model(path)
    source = opened.source
    batches, text = _data(source, data)
    if objective is not None and not batches:
        raise RequestError(
            f"{path}: --objective compares outputs on data, but there is none; give --data, or leave --objective out"
        )
    given = inputs_of(source, batches)
    given.batch(size)
    wanted = inputs.choose_objective(source, objective)
    batches = inputs.prepared(source, wanted, batches)
    calibration_data, held = inputs.split(batches, rows=inputs.divisible(source, wanted, batches))
    model, kinds = trace(source, given)
    forms = {name: opened.forms[name] for name in kinds}
    expected: dict[str, float] = {}
    if prefer == SIZE:
        small = lower_small(model, forms, opened.dtypes)
        difference = compare_graph(source, small, given)
        content = small.SerializeToString()
    else:
        difference = check_graph(source, model, forms, given, opened.dtypes)
        kernels, table = _fastest(forms, kinds, size)
        if loss is not None:
            # The evidence of a tied head describes its use as a table, so its rounding cannot be predicted.
            kernels = {name: kernel if kinds[name] == SITE else FLOAT for name, kernel in kernels.items()}
        rounded = [name for name, kernel in kernels.items() if kernel != FLOAT]
        if rounded and loss is not None:
            if not calibration_data:
                raise RequestError(
                    "--loss: the effect of rounding is estimated from data; give --data, or leave --loss out"
                )
            sites = [site for site in source.sites()[0] if site.name in rounded]
            evidence = calibrate(source, sites, calibration_data, wanted, text=text).evidence
            expected = rounding_losses(forms, kernels, evidence, watch(source, rounded, calibration_data))
            _spare(forms, kernels, expected, table, loss)
        table.save()
        content = lower(model, forms, kernels).SerializeToString()
    written = write_model(content, out, given)
    session = Session(out)
    return Exported(
        path=str(out),
        source=str(path),
        to=to,
        prefer=prefer,
        bytes=written,
        packed_bytes=opened.packed_bytes,
        artifact_bytes=None if opened.artifact is None else opened.artifact.bytes,
        kernels=session.kernels,
        expected_loss={name: value for name, value in expected.items() if session.kernels[name] != FLOAT},
        difference=difference,
        tolerance=TOLERANCE,
        divergence=_divergence(source, session, wanted, held, text),
        latency=latency(source, session, size, given),
        machine=machine(torch.get_num_threads()),
    )


def _check_loss(loss: float, prefer: str) -> None:
    if isinstance(loss, bool) or not isinstance(loss, int | float) or not 0 <= loss < math.inf:
        raise RequestError(f"--loss {loss!r} is not a finite number of at least 0; write one, such as 0.01")
    if prefer == SIZE:
        raise RequestError(
            "--loss limits the rounding of inputs, but --prefer size rounds nothing; add --prefer speed, or leave "
            "--loss out"
        )


def _data(source: Source, data: Any) -> tuple[list[Batch], str]:
    """Batches to measure on, and their description; none for a model without text input if none are given."""
    if data is None and not vocabulary(source):
        return [], "none"
    return inputs.load_data(source, data, limit=None)


def _divergence(source: Source, session: Session, wanted: Objective, held: Sequence[Batch], text: str) -> Moved | None:
    """The distance of the file's outputs from the model's on held-out data; None without data."""
    if not held or source.module is None:
        return None
    losses = wanted.measure(session, held, wanted.reference(source.module, held))
    p95 = float(losses.quantile(0.95))
    return Moved(wanted.metric, float(losses.mean()), p95, f"{len(losses)} held-out examples of {text}")


def parse_shape(shape: str | Sequence[int]) -> tuple[int, int]:
    """Sequences and tokens of ``1x32``, or of two numbers.

    Raises
    ------
    RequestError
        If it is neither, or out of range.
    """
    try:
        parts = shape.lower().split("x") if isinstance(shape, str) else list(shape)
        batch, tokens = map(int, parts)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"shape {shape!r} is not valid; write sequences and tokens, such as 1x32") from error
    if min(batch, tokens) < 1 or batch * tokens > MOST:
        raise RequestError(
            f"shape {shape!r} is out of range; give at least 1 sequence and token, and at most {MOST:,} tokens in all"
        )
    return batch, tokens


def _fastest(
    forms: Mapping[str, Form], kinds: Mapping[str, str], shape: tuple[int, int]
) -> tuple[dict[str, str], Table]:
    """The faster of float32 and the form's integer kernel for every matrix, and the latency table used."""
    table = Table(shape[0] * shape[1])
    kernels = {}
    for name, kind in kinds.items():
        own = kernel_of(forms[name]) if kind in (SITE, TIED) else FLOAT
        faster = own != FLOAT and table.seconds(forms[name], own) < table.seconds(forms[name], FLOAT)
        kernels[name] = own if faster else FLOAT
    return kernels, table


def _spare(
    forms: Mapping[str, Form], kernels: dict[str, str], expected: Mapping[str, float], table: Table, loss: float
) -> None:
    """Move sites to float32, highest loss per second saved first, until the expected loss is at most ``loss``."""

    def worth(name: str) -> float:
        saved = table.seconds(forms[name], FLOAT) - table.seconds(forms[name], kernels[name])
        return expected[name] / saved

    left = sum(expected.values())
    for name in sorted(expected, key=worth, reverse=True):
        if left <= loss:
            return
        kernels[name] = FLOAT
        left -= expected[name]


def check_graph(
    source: Source,
    model: Any,
    forms: Mapping[str, Form],
    given: Inputs | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> float:
    """Compare a traced graph with float kernels to the module; returns the largest relative difference.

    ``dtypes`` are those to which decoded weights of the module were rounded, if not float32.

    Raises
    ------
    ArtifactError
        If it is above :data:`TOLERANCE`.
    """
    held = {name: _rounded(form, (dtypes or {}).get(name, torch.float32)) for name, form in forms.items()}
    return compare_graph(source, lower(model, held, {}), given or Tokens(source))


def _rounded(form: Form, dtype: torch.dtype) -> Form:
    return form if dtype == torch.float32 else Dense(narrowed(form.dense(), dtype).float())


def compare_graph(source: Source, model: Any, given: Inputs) -> float:
    """Compare a whole graph to the module on random inputs; returns the largest relative difference.

    Raises
    ------
    ArtifactError
        If it is above :data:`TOLERANCE`.
    """
    session = Session(model.SerializeToString())
    assert source.module is not None
    batch = given.example()
    with torch.inference_mode():
        wanted = given.live(batch, source.module(**batch)[session.names[0]].float())
    found = given.live(batch, session(**batch)[session.names[0]])
    difference = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
    if not difference <= TOLERANCE:
        raise ArtifactError(
            f"{source.title}: the exported graph differs from the model by {difference:.2g} of its largest output "
            f"({TOLERANCE:g} is allowed); nothing was written. Please report this with the model's config.json"
        )
    return difference


def write_model(content: bytes, out: Path, given: Inputs) -> int:
    """Write a model atomically, once it was loaded and run from the disk; returns its bytes."""
    with writing(out) as aside:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        outputs = Session(aside)(**given.example())
        if not all(bool(torch.isfinite(value).all()) for value in outputs.values()):
            raise ArtifactError(
                f"{out}: the exported model gives NaN or Inf; nothing was written. Please report this with the model"
            )
    return out.stat().st_size


def latency(source: Source, session: Session, shape: tuple[int, int], given: Inputs) -> Timing:
    """Median seconds of the exported file and of the module in PyTorch, run alternately with the same threads."""
    batch = given.batch(shape)
    assert source.module is not None
    module, feed = source.module, session.feed(batch)
    taken = compare(
        {"torch float32": lambda: module(**batch), "onnxruntime": lambda: session.session.run(None, feed)},
        "torch float32",
    )
    speedup = taken["onnxruntime"]["speedup"]
    return Timing(
        shape=tuple(given.shape(shape)),
        threads=torch.get_num_threads(),
        torch_seconds=taken["torch float32"]["seconds"],
        seconds=taken["onnxruntime"]["seconds"],
        speedup=speedup,
        note="" if speedup >= 1 else "the exported model is slower than the dense one in PyTorch",
    )
