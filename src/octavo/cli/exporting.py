"""Commands that export models to other runtimes: export."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from octavo.cli import options
from octavo.cli.frame import command, console, show_json
from octavo.runtimes.onnx import exporting

MODEL = Annotated[str, typer.Argument(help="An artifact, or the folder of a transformers model.")]


@command
def export(
    model: MODEL,
    out: Annotated[Path, typer.Argument(parser=options.path, help="File to write, such as model.onnx.")],
    to: Annotated[str, typer.Option(help="onnx: a file for onnxruntime and its int8 kernels.")] = "onnx",
    data: options.DATA = None,
    objective: options.OBJECTIVE = None,
    loss: Annotated[
        float | None,
        typer.Option(help="Largest increase of the divergence from rounding the inputs of integer kernels."),
    ] = None,
    shape: Annotated[str, typer.Option(help="Sequences x tokens at which speed counts.")] = "1x32",
    prefer: Annotated[
        str, typer.Option(help="size: every weight in the fewest bits that are exact; speed: the fastest kernels.")
    ] = "size",
    overwrite: options.OVERWRITE = False,
    json_output: options.JSON = False,
) -> None:
    """Export MODEL to a file for a fast runtime, and compare that file with MODEL.

    Example: octavo export folded --to onnx model.onnx
    """
    result = exporting.export(
        model, out, to=to, data=data, objective=objective, loss=loss, shape=shape, prefer=prefer, overwrite=overwrite
    )
    if json_output:
        show_json(result)
        return
    counts = Counter(result.kernels.values())
    kernels = ", ".join(f"{count} on {kernel}" for kernel, count in sorted(counts.items()))
    speed, far = result.latency, result.divergence
    beside = f" (the artifact: {result.artifact_bytes:,})" if result.artifact_bytes else ""
    console.print(f"{out}: {result.bytes:,} bytes{beside}; sites by kernel: {kernels}")
    moved = f"{far.metric} {far.mean:.3g} from MODEL on {far.data}" if far else "not measured without data"
    console.print(
        f"with float kernels its outputs are within {result.difference:.2g} of MODEL's ({result.tolerance:g} is "
        f"allowed); as written, {moved}",
    )
    examples, *tokens = speed.shape
    size = f"{examples} x {tokens[0]} tokens" if tokens else f"{examples} examples"
    console.print(
        f"{speed.seconds * 1e3:.3g} ms at {size}, {speed.threads} threads: "
        f"{speed.speedup:.2f} times as fast as MODEL in PyTorch (float32, dense)",
    )
    if speed.note:
        console.print(f"note: {speed.note}")
