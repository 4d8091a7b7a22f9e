"""The command that rebuilds published systems: reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from octavo.cli import options
from octavo.cli.frame import command, console, errors, show_json
from octavo.cli.listing import show_lines
from octavo.errors import OctavoError, RequestError
from octavo.recipes import Trial, get_recipe, recipes
from octavo.recipes import results as store
from octavo.system.paths import checked, checked_output
from octavo.system.replacing import check_kind
from octavo.system.visible import visible


@command
def reproduce(
    name: Annotated[str | None, typer.Argument(help="A recipe; see --list.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show every system with its claim and last result.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Run all recipes one by one (hours).")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run a miniature in under a minute, which proves nothing.")
    ] = False,
    seed: Annotated[int, typer.Option(help="The first of the three seeds.")] = 0,
    results: Annotated[
        Path | None,
        typer.Option(parser=options.path, help="Folder of results. Default: docs/results. Quick ones are never saved."),
    ] = None,
    page: Annotated[
        bool, typer.Option("--page", help="Write docs/recipes.md from all results; with --results next to them.")
    ] = False,
    json_output: options.JSON = False,
) -> None:
    """Rebuild a published system, and check its claim on real data.

    Example: octavo reproduce alds --quick
    """
    if sum([name is not None, listed, every, page]) != 1:
        raise RequestError("recipe: none is given; name one, or give --list, --all or --page")
    _check(results, page=page, listed=listed, quick=quick, seed=seed)
    if listed:
        _list(store.listing(results), json_output)
        return
    if page:
        check_kind((results or store.folder().parent) / "recipes.md")
        written = store.write_page(results)
        if json_output:
            show_json({"page": str(written)})
        else:
            console.print(f"{written} written")
        return
    chosen = list(recipes().values()) if every else [get_recipe(str(name))]
    if not quick:
        where = store.writable(results)
        for recipe in chosen:
            check_kind(where / f"{recipe.name}.json")
    done, failed = [], dict[str, OctavoError]()
    for recipe in chosen:
        try:
            done.append(_run(recipe, quick=quick, seed=seed, json_output=json_output))
        except OctavoError as error:
            if not every:
                raise
            # Other recipes are independent of it.
            failed[recipe.name] = error
            errors.print(f"{recipe.name}: {error}", style="red")
            continue
        if not quick:
            file = store.save(done[-1], results)
            errors.print(f"saved: {file}", highlight=False)
    if json_output:
        show_json(done if every else done[0])
    if failed:
        raise RequestError(f"{len(failed)} of {len(chosen)} recipes could not run: {', '.join(failed)}")


def _check(results: Path | None, *, page: bool, listed: bool, quick: bool, seed: int) -> None:
    """Refuse options that would have no effect."""
    if (listed or page) and (quick or seed):
        raise RequestError("--quick and --seed only apply when recipes run; leave them out")
    if not -(2**31) <= seed < 2**31:
        raise RequestError(f"--seed {seed} does not fit 32 bits; choose a smaller one")
    if results is None:
        return
    if quick:
        raise RequestError("--results is for full results, but quick ones are never saved; leave --results out")
    if (listed or page) and not checked(results).is_dir():
        raise RequestError(f"--results {results}: no such folder; name a folder with results")
    checked_output(results)


def _run(recipe: Any, *, quick: bool, seed: int, json_output: bool) -> store.RecipeResult:
    if not json_output:
        console.print(f"{recipe.system}: {recipe.source}")
        console.print(f"claim: {recipe.claim}")
    with errors.status(Text(f"{recipe.name} ...")) if errors.is_terminal else _Silent() as status:
        result = store.reproduce(
            recipe, Trial(quick, seed, lambda text: status.update(Text(visible(f"{recipe.name}: {text}"))))
        )
    if not json_output:
        _show(result)
    return result


def _show(result: store.RecipeResult) -> None:
    also = list(dict.fromkeys(key for arm in result.arms for key in arm.also))
    table = Table("arm", "bytes", result.metric, "spread", *also)
    for arm in result.arms:
        spread = "-" if arm.spread is None else store.figure(arm.spread)
        others = [store.figure(arm.also[key]) if key in arm.also else "-" for key in also]
        table.add_row(arm.name, f"{arm.bytes:,}" if arm.bytes else "-", store.figure(arm.mean), spread, *others)
    console.print(table)
    for check in result.checks:
        console.print(f"{'holds' if check.holds else 'fails'}: {check.statement} {check.figures}")
    console.print("holds" if result.holds else "does not hold at this scale", end=": ", style="bold")
    console.print(result.reason)
    if result.quick:
        console.print("This was a quick run: a miniature that only shows that the code works.")


def _list(found: Sequence[store.ListedRecipe], json_output: bool) -> None:
    if json_output:
        show_json(found)
        return
    verdicts = {None: "no result", True: "holds", False: "fails here"}
    rows, old = [], False
    for entry in found:
        result = entry.result
        changed = result is not None and store.outdated(result)
        verdict = verdicts[None if result is None else result.holds] + "*" * changed
        rows.append([entry.name, verdict, "" if result is None else result.date, entry.system])
        old |= changed
    show_lines(rows)
    if old:
        console.print("* The recipe was changed after this result.")


class _Silent:
    """A status line for outputs other than terminals."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, text: object) -> None:
        """Discard the status."""
