"""The command that rebuilds published systems: reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from octavo.cli import options
from octavo.cli.frame import command, console, errors, show_json
from octavo.cli.listing import show_lines
from octavo.errors import OctavoError, RequestError
from octavo.recipes.frame import Lab, Study, get_study, studies
from octavo.recipes.frame import results as store
from octavo.recipes.frame.pages import figure, write_pages
from octavo.system.paths import checked, checked_output
from octavo.system.replacing import check_kind
from octavo.system.visible import visible


@command
def reproduce(
    name: Annotated[str | None, typer.Argument(help="A study; see --list.")] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="Show every system with the verdicts of its last run.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="Run all studies one by one (hours).")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Run a miniature in seconds, which proves nothing.")] = False,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    results: Annotated[
        Path | None,
        typer.Option(parser=options.path, help="Folder of results. Default: docs/results. Quick ones are never saved."),
    ] = None,
    page: Annotated[
        bool,
        typer.Option(
            "--page", help="Write docs/recipes.md and docs/recipes/ from all results; with --results into that folder."
        ),
    ] = False,
    json_output: options.JSON = False,
) -> None:
    """Rebuild a published system, and check its claims on real data.

    Example: octavo reproduce alds --quick
    """
    if sum([name is not None, listed, every, page]) != 1:
        raise RequestError("study: none is given; name one, or give --list, --all or --page")
    _check(results, page=page, listed=listed, quick=quick, seed=seed)
    if listed:
        _list(store.listing(results), json_output)
        return
    if page:
        check_kind((results or store.folder().parent) / "recipes.md")
        written = write_pages(results)
        if json_output:
            show_json({"page": str(written)})
        else:
            console.print(f"{written} written")
        return
    chosen = list(studies().values()) if every else [get_study(str(name))]
    if not quick:
        where = store.writable(results)
        for study in chosen:
            check_kind(where / f"{study.name}.json")
    done, failed = [], dict[str, OctavoError]()
    for study in chosen:
        try:
            done.append(_run(study, quick=quick, seed=seed, json_output=json_output))
        except OctavoError as error:
            if not every:
                raise
            # Other studies are independent of it.
            failed[study.name] = error
            errors.print(f"{study.name}: {error}", style="red")
            continue
        if not quick:
            file = store.save(done[-1], results)
            errors.print(f"saved: {file}", highlight=False)
    if json_output:
        show_json(done if every else done[0])
    if failed:
        raise RequestError(f"{len(failed)} of {len(chosen)} studies could not run: {', '.join(failed)}")


def _check(results: Path | None, *, page: bool, listed: bool, quick: bool, seed: int) -> None:
    """Refuse options that would have no effect."""
    if (listed or page) and (quick or seed):
        raise RequestError("--quick and --seed only apply when studies run; leave them out")
    if not -(2**31) <= seed < 2**31:
        raise RequestError(f"--seed {seed} does not fit 32 bits; choose a smaller one")
    if results is None:
        return
    if quick:
        raise RequestError("--results is for full results, but quick ones are never saved; leave --results out")
    if (listed or page) and not checked(results).is_dir():
        raise RequestError(f"--results {results}: no such folder; name a folder with results")
    checked_output(results)


def _run(study: Study, *, quick: bool, seed: int, json_output: bool) -> store.StudyResult:
    if not json_output:
        console.print(f"{study.system}: {study.source}")
    with errors.status(Text(f"{study.name} ...")) if errors.is_terminal else _Silent() as status:
        lab = Lab(study, quick, seed, lambda text: status.update(Text(visible(f"{study.name}: {text}"))))
        result = store.reproduce(study, lab)
    if not json_output:
        _show(result)
    return result


def _show(result: store.StudyResult) -> None:
    table = Table("arm", "bytes", result.metric, "spread")
    for arm in result.arms:
        spread = "-" if arm.spread is None else figure(arm.spread)
        table.add_row(arm.name, f"{arm.bytes:,}" if arm.bytes else "-", figure(arm.mean), spread)
    console.print(table)
    for gate in result.gates:
        console.print(f"gate {'passed' if gate.passed else 'not passed'}: {gate.text}")
    for claim in result.claims:
        kind = "" if claim.published else " (extra)"
        console.print(f"{claim.verdict.value}{kind}: {claim.text}")
        for comparison in claim.gaps:
            console.print(f"    {comparison}")
    console.print(result.tally, style="bold")
    if result.reason:
        console.print(result.reason)
    if result.quick:
        console.print("This was a quick run: a miniature that only shows that the code works.")


def _list(found: Sequence[store.ListedStudy], json_output: bool) -> None:
    if json_output:
        show_json(found)
        return
    rows, old = [], False
    for entry in found:
        result = entry.result
        stale = result is not None and bool(store.changed(result))
        rows.append([entry.name, "no result" if result is None else result.tally + "*" * stale, entry.system])
        old |= stale
    show_lines(rows)
    if old:
        console.print("* Code was changed after this result.")


class _Silent:
    """A status line for outputs other than terminals."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, text: object) -> None:
        """Discard the status."""
