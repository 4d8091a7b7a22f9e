"""Commands that make something: compress, profile, plan, frontier."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import octavo
from octavo import report
from octavo.calibration.workspace import forget, holds_work
from octavo.cli import command, console, errors, options, show_json
from octavo.request import OF_PROFILE, check_target
from octavo.saving import check_writable
from octavo.steps import request_of
from octavo.system.locks import Lock
from octavo.system.paths import checked_output
from octavo.verification.recorded import REPORT


@contextmanager
def _work(folder: Path, then: str, *, remove: bool) -> Iterator[None]:
    """Remove a folder of unfinished work if nothing can come of it, or say that it is there."""
    own = remove and not holds_work(folder)
    try:
        yield
    except (octavo.RequestError, octavo.BudgetError):
        # Going on from here would end here again. What was there before is another run's.
        if own:
            forget(folder)
        raise
    except Exception:
        if folder.is_dir():
            errors.print(f"unfinished work is kept in {folder}; {then}", soft_wrap=True)
        raise


def _progress(quiet: bool) -> bool | None:
    return False if quiet else None


@command
def compress(
    context: typer.Context,
    source: options.SOURCE,
    out: options.OUT,
    ratio: options.RATIO = None,
    size: options.SIZE = None,
    bits: options.BITS = None,
    target: options.TARGET = "disk",
    speedup: options.SPEEDUP = None,
    latency: options.LATENCY = None,
    shape: options.SHAPE = None,
    data: options.DATA = None,
    objective: options.OBJECTIVE = None,
    curvature: options.CURVATURE = "kfac",
    methods: options.METHODS = None,
    preset: options.PRESET = "default",
    ignore: options.IGNORE = None,
    keep: options.KEEP = None,
    profile: Annotated[
        Path | None, typer.Option(parser=options.path, help="A saved profile to solve, in place of measuring again.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            parser=options.path,
            help="A plan to carry out: to its budget as 'octavo plan' wrote it, to the letter if edited.",
        ),
    ] = None,
    resume: options.RESUME = False,
    overwrite: options.OVERWRITE = False,
    seed: options.SEED = 0,
    memory: options.MEMORY = None,
    executor: options.EXECUTOR = None,
    json_output: options.JSON = False,
) -> None:
    """Compress SOURCE to a size, and write artifact and report to --out.

    Example: octavo compress all-MiniLM-L6-v2 --ratio 8 --out folded
    """
    said = options.given(context)
    check_target(target, said)
    request: dict[str, Any] = {
        "data": data,
        "objective": objective,
        "curvature": curvature,
        "methods": options.listed(methods),
        "preset": preset,
        "ignore": ignore or [],
        "keep": options.pairs(keep),
        "seed": seed,
        "target": target,
    }
    out = checked_output(out)
    # Beside the output, so that it is on the same disk, and found again by --resume.
    workspace = profile or out.resolve().parent / f".{out.resolve().name}.octavo-work"
    if profile is not None:
        if said & set(OF_PROFILE):
            raise octavo.RequestError(
                "--profile brings the data, objective, curvature, methods, preset, ignore, keep, seed and --for that "
                "it was made with: leave these out, or leave --profile out to measure again"
            )
        request = request_of(profile)
    with Lock(out):
        check_writable(out, overwrite=overwrite, source=source, others=[data, plan, profile])
        with _work(workspace, "--resume continues it", remove=profile is None and not resume):
            done = octavo.compress(
                source, ratio=ratio, size=size, bits=bits, speedup=speedup, latency=latency,
                shape=shape, plan=plan, workspace=workspace, resume=resume or profile is not None, memory=memory,
                executor=executor, progress=_progress(json_output), **request,
            )  # fmt: skip
            done.command = shlex.join(["octavo", *sys.argv[1:]])
            result = done.save(out, overwrite=overwrite)
        if profile is None:
            done.forget_workspace()
    if json_output:
        long = ("sites", "kept", "curve", "code_lengths")
        show_json({key: value for key, value in result.to_json().items() if key not in long})
        return
    console.print(report.table(result))
    for part in report.told(result):
        console.print(part)
    console.print(report.measured(result.quality))
    if result.artifact.note:
        console.print(f"note: {result.artifact.note}")
    for note in done.notes:
        console.print(f"note: {note}")
    console.print(f"Artifact: {out}    Report: {out / REPORT}")


@command
def profile_(
    source: options.SOURCE,
    out: options.OUT,
    target: options.TARGET = "disk",
    data: options.DATA = None,
    objective: options.OBJECTIVE = None,
    curvature: options.CURVATURE = "kfac",
    methods: options.METHODS = None,
    preset: options.PRESET = "default",
    ignore: options.IGNORE = None,
    keep: options.KEEP = None,
    resume: options.RESUME = False,
    overwrite: options.OVERWRITE = False,
    seed: options.SEED = 0,
    memory: options.MEMORY = None,
    executor: options.EXECUTOR = None,
    json_output: options.JSON = False,
) -> None:
    """Measure SOURCE once over all sizes; 'octavo plan' and 'octavo compress --profile' then solve it for any.

    Example: octavo profile all-MiniLM-L6-v2 --out measured
    """
    with Lock(out):
        check_writable(out, overwrite=overwrite or resume)
        with _work(out, "--resume continues it", remove=not resume):
            result = octavo.profile(
                source, out, data=data, objective=objective, curvature=curvature, methods=options.listed(methods),
                preset=preset, ignore=ignore or [], keep=options.pairs(keep), resume=resume, seed=seed, target=target,
                memory=memory, executor=executor, progress=_progress(json_output),
            )  # fmt: skip
    points = sum(len(curve.points) for curve in result.curves)
    summary = {"profile": str(out), "sites": len(result.curves), "points": points, "smallest_bytes": result.smallest}
    summary["largest_ratio"] = round(result.original_bytes / result.smallest, 2)
    if json_output:
        show_json(summary)
    else:
        console.print(f"{summary['sites']} sites, {points} points; ratios up to {summary['largest_ratio']:g}")
        console.print(f"Next: octavo plan {out} --ratio 8")


@command
def plan_(
    profile: Annotated[Path, typer.Argument(parser=options.path, help="Folder of a saved profile.")],
    ratio: options.RATIO = None,
    size: options.SIZE = None,
    bits: options.BITS = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", parser=options.path, help="YAML file to write; default: PROFILE/plan.yaml."),
    ] = None,
    overwrite: options.OVERWRITE = False,
    json_output: options.JSON = False,
) -> None:
    """Solve a saved profile for a size, in a moment, and write the plan as YAML that can be edited.

    Example: octavo plan measured --ratio 12
    """
    file = out or profile / "plan.yaml"
    result = octavo.plan(profile, ratio=ratio, size=size, bits=bits)
    result.save(file, overwrite=overwrite)
    if json_output:
        show_json(
            {"plan": str(file), "budget": result.budget.bytes, "bytes": result.bytes, "expected": result.expected}
        )
        return
    table = Table("site", "method", "setting", "bytes", title=f"{result.budget.asked}: {result.bytes:,} bytes expected")
    for name, point in result.points.items():
        table.add_row(name, point.method, ", ".join(f"{k}={v}" for k, v in point.setting.items()), f"{point.bytes:,}")
    console.print(table)
    console.print(f"Expected loss {result.expected:.3g}. Plan: {file}")


@command
def frontier(
    source: options.SOURCE,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", parser=options.path, help="Folder for the profile, used again if it is there."),
    ],
    ratios: Annotated[str, typer.Option(help="Comma-separated ratios.")] = "4,6,8,12,16",
    families: Annotated[
        bool, typer.Option("--families", help="Also give the best plan of every single family.")
    ] = False,
    target: options.TARGET = "disk",
    data: options.DATA = None,
    objective: options.OBJECTIVE = None,
    curvature: options.CURVATURE = "kfac",
    methods: options.METHODS = None,
    preset: options.PRESET = "default",
    seed: options.SEED = 0,
    json_output: options.JSON = False,
) -> None:
    """Build SOURCE at several ratios and measure each, next to the best uniform plan of the same bytes.

    Example: octavo frontier all-MiniLM-L6-v2 --ratios 4,8,16 --out measured
    """
    try:
        wanted = [float(part) for part in ratios.split(",")]
    except ValueError as error:
        raise octavo.RequestError(f"--ratios {ratios!r}: write numbers with commas, such as 4,8,16") from error
    with _work(out, "the same command continues it", remove=False):
        rows = octavo.frontier(
            source, wanted, workspace=out, families=families, progress=_progress(json_output), data=data,
            objective=objective, curvature=curvature, methods=options.listed(methods), preset=preset, seed=seed,
            target=target,
        )  # fmt: skip
    if json_output:
        show_json(rows)
        return
    table = Table("asked", "ratio", "bytes", "of budget", "quality", "uniform", "winner")
    for row in rows:
        other = "-" if row["uniform"] is None else f"{row['uniform']:.4g}"
        table.add_row(
            f"{row['asked']:g}", f"{row['ratio']:.3f}", f"{row['bytes']:,}", f"{row['used']:.2%}",
            f"{row['quality']:.4g}", other, row["winner"],
        )  # fmt: skip
    console.print(table)
