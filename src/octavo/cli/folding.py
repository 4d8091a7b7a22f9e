"""Commands that make something: compress, profile, plan, frontier."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from octavo import pipeline, report
from octavo.allocation.workspace import forget, holds_work
from octavo.cli import options
from octavo.cli.frame import command, console, errors, show_json
from octavo.errors import BudgetError, RequestError
from octavo.request import Request, Role, flagged, names
from octavo.saving import check_writable, save_result
from octavo.system.locks import Lock
from octavo.system.paths import checked_output
from octavo.system.visible import visible
from octavo.targets import get_target
from octavo.verification.recorded import REPORT

#: Lists in a report that are for pages, not for a terminal's JSON.
_LONG = ("sites", "kept", "curve", "code_lengths", "explorer")


@contextmanager
def _work(folder: Path, then: str, *, remove: bool) -> Iterator[None]:
    """Remove a folder of unfinished work if nothing can come of it, or say that it is there."""
    own = remove and not holds_work(folder)
    try:
        yield
    except (RequestError, BudgetError):
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
@options.asking(Request)
def compress(
    context: typer.Context,
    request: Request,
    out: options.OUT,
    profile: Annotated[
        Path | None, typer.Option(parser=options.path, help="A saved profile to solve, in place of measuring again.")
    ] = None,
    overwrite: options.OVERWRITE = False,
    json_output: options.JSON = False,
) -> None:
    """Compress SOURCE to a size, and write artifact and report to --out.

    Example: octavo compress all-MiniLM-L6-v2 --ratio 8 --out folded
    """
    out = checked_output(out)
    workspace = profile or work_beside(out)
    if profile is not None:
        odd = options.given(context, Request, Role.MEASURED)
        if odd:
            raise RequestError(
                f"--profile: these options cannot be combined with it: {flagged(Request, odd)}; leave "
                "them out, since it brings those that it was made with, or measure again without --profile"
            )
        request = request.restored(pipeline.saved_choices(profile))
    get_target(request.target).refuse_named(Request, options.given(context, Request))
    request = replace(request, workspace=workspace, resume=request.resume or profile is not None)
    carry_out(request, out, overwrite=overwrite, json_output=json_output, profile=profile)


def work_beside(out: Path) -> Path:
    """The folder of unfinished work: on the same disk as the output, and found again by --resume."""
    return out.resolve().parent / f".{out.resolve().name}.octavo-work"


def carry_out(request: Request, out: Path, *, overwrite: bool, json_output: bool, profile: Path | None = None) -> None:
    """Compress as a request says in its workspace, save the result, and print what came of it."""
    assert request.workspace is not None
    workspace = Path(request.workspace)
    with Lock(out):
        others = [request.data, request.plan, profile]
        check_writable(out, overwrite=overwrite, source=request.source, others=others)
        with _work(workspace, "--resume continues it", remove=not request.resume):
            done = pipeline.compress(request, progress=_progress(json_output))
            result = save_result(done, out, overwrite=overwrite, command=shlex.join(["octavo", *sys.argv[1:]]))
        if profile is None:
            done.forget_workspace()
    if json_output:
        show_json({key: value for key, value in result.to_json().items() if key not in _LONG})
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
@options.asking(Request, without=(*names(Request, Role.BUDGET), "plan"))
def profile_(
    request: Request, out: options.OUT, overwrite: options.OVERWRITE = False, json_output: options.JSON = False
) -> None:
    """Measure SOURCE once over all sizes; 'octavo plan' and 'octavo compress --profile' then solve it for any.

    Example: octavo profile all-MiniLM-L6-v2 --out measured
    """
    with Lock(out):
        check_writable(out, overwrite=overwrite or request.resume)
        with _work(out, "--resume continues it", remove=not request.resume):
            result = pipeline.profile(request, out, progress=_progress(json_output))
    points = sum(len(curve.points) for curve in result.curves)
    summary = {"profile": str(out), "sites": len(result.curves), "points": points}
    axis = get_target(request.target).budget[0]
    said, then = "", f"octavo compress {visible(request.source)} --profile {out} --{axis} 2 --out DIR"
    if axis == "ratio":
        summary |= {
            "smallest_bytes": result.smallest,
            "largest_ratio": round(result.original_bytes / result.smallest, 2),
        }
        said, then = f"; ratios up to {summary['largest_ratio']:g}", f"octavo plan {out} --ratio 8"
    if json_output:
        show_json(summary)
    else:
        console.print(f"{summary['sites']} sites, {points} points{said}")
        console.print(f"Next: {then}")


@command
@options.asking(Request, only=("ratio", "size", "bits"))
def plan_(
    request: Request,
    profile: Annotated[Path, typer.Argument(parser=options.path, help="Folder of a saved profile.")],
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
    result = pipeline.plan(profile, **request.made(Role.BUDGET))
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
@options.asking(Request, without=(*(set(names(Request, Role.BUDGET)) - {"shape"}), "plan", "resume"))
def frontier(
    request: Request,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", parser=options.path, help="Folder for the profile, used again if it is there."),
    ],
    ratios: Annotated[str | None, typer.Option(help="Comma-separated ratios.", show_default="4,6,8,12,16")] = None,
    speedups: Annotated[str | None, typer.Option(help="For speed: comma-separated speedups.")] = None,
    families: Annotated[
        bool, typer.Option("--families", help="Also give the best plan of every single family.")
    ] = False,
    json_output: options.JSON = False,
) -> None:
    """Build SOURCE at several ratios and measure each, next to the best uniform plan of the same bytes.

    Example: octavo frontier all-MiniLM-L6-v2 --ratios 4,8,16 --out measured
    """
    axis = get_target(request.target).budget[0]
    wanted = _budgets(axis, {"ratio": ratios, "speedup": speedups})
    request = replace(request, workspace=out)
    with _work(out, "the same command continues it", remove=False):
        rows = pipeline.frontier(request, wanted, families=families, progress=_progress(json_output))
    if json_output:
        show_json([asdict(row) for row in rows])
        return
    more = sorted({key for row in rows for key, value in row.more.items() if isinstance(value, float)})
    table = Table("asked", "ratio", "bytes", "of budget", "quality", "uniform", "winner", *more)
    for row in rows:
        if row.error is not None:
            table.add_row(f"{row.asked:g}", f"at most {row.limit:g}", *["-"] * (5 + len(more)))
            continue
        other = "-" if row.uniform is None else f"{row.uniform:.4g}"
        table.add_row(
            f"{row.asked:g}", f"{row.ratio:.3f}", f"{row.bytes:,}", f"{row.used:.2%}", f"{row.quality:.4g}", other,
            row.winner, *(f"{row.more[key]:.4g}" for key in more),
        )  # fmt: skip
    console.print(table)


def _budgets(axis: str, given: dict[str, str | None]) -> list[float]:
    """The budgets of a frontier along a target's axis.

    Raises
    ------
    RequestError
        If others are given, none are where a default is missing, or one is not a number.
    """
    odd = [name for name, text in given.items() if text is not None and name != axis]
    if odd:
        raise RequestError(f"--{odd[0]}s: this target's budget is a {axis}; give --{axis}s in its place")
    text = given.get(axis)
    if text is None:
        text = "4,6,8,12,16" if axis == "ratio" else ""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise RequestError(f"--{axis}s {text!r}: write numbers with commas, such as 4,8,16") from error
