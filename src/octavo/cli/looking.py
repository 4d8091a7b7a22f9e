"""Commands that inspect something: inspect, verify, evaluate."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from octavo import report
from octavo.cli import options
from octavo.cli.frame import command, console, show_json
from octavo.errors import ArtifactError
from octavo.system.paths import checked
from octavo.verification import evaluating, verifying
from octavo.verification.foreign import is_foreign
from octavo.verification.inspecting import inspected

BASE = Annotated[
    Path | None, typer.Option(parser=options.path, help="The model that a delta was made from. Default: OCTAVO_BASE.")
]


@command
def inspect(
    artifact: Annotated[
        Path,
        typer.Argument(
            parser=options.path,
            help="Folder of an artifact. Files for another runtime have no manifest: see octavo verify and report.",
        ),
    ],
    json_output: options.JSON = False,
) -> None:
    """Show the content of an artifact from its manifest, without decoding.

    Example: octavo inspect folded
    """
    if is_foreign(checked(artifact)):
        raise ArtifactError(
            f"{artifact}: holds files for another runtime, which have no manifest to show; octavo verify checks them, "
            "and the folder's report.html lists every weight"
        )
    found = inspected(checked(artifact))
    if json_output:
        show_json(found)
        return
    table = Table("site", "form", "shape", "bytes", "bits/weight")
    for name, site in found.sites.items():
        shape = "x".join(map(str, site.shape))
        table.add_row(name, site.form, shape, f"{site.bytes:,}", f"{site.bits_per_weight:.2f}")
    console.print(table)
    source = found.source
    console.print(
        f"{source['title']}: {source['bytes']:,} -> {found.bytes:,} bytes, ratio {found.ratio:.3f}, "
        f"{found.bits_per_weight:.2f} bits per weight; {found.kept} tensors kept",
    )
    if found.resident is not None:
        console.print(f"made for memory: {found.resident:,} bytes while it runs packed")


@command
def verify(
    artifact: Annotated[
        Path, typer.Argument(parser=options.path, help="Folder of an artifact, or of files for another runtime.")
    ],
    base: BASE = None,
    json_output: options.JSON = False,
) -> None:
    """Read an artifact back: sizes, checksums, weights and outputs as recorded when it was written.

    Example: octavo verify folded
    """
    result = verifying.verify(checked(artifact), base=base)
    if json_output:
        show_json(result)
        return
    packed = result.packed
    if packed is not None:
        off = "not compared, since there is no model with a known input"
        if packed.error is not None:
            off = f"outputs are off by {packed.error:.2g} (at most {packed.allowed:.2g})"
        console.print(f"packed: {packed.held:,} bytes in memory, {packed.stated:,} stated; {off}")
    console.print(f"{result.tensors} tensors, {result.bytes:,} bytes, ratio {result.ratio:.3f}")
    weights = "not recorded" if result.weights_match is None else "equal, bit for bit"
    apart = result.outputs_difference
    outputs = (
        "not recorded" if apart is None else "equal, bit for bit" if not apart else f"equal to rounding ({apart:.1g})"
    )
    console.print(f"weights: {weights}; outputs: {outputs}")
    if result.loader is not None:
        console.print(f"loaded with {result.loader}: nothing missing")
    if result.quality is not None:
        console.print(f"When it was written: {report.measured(result.quality)}")


@command
def evaluate(
    model: Annotated[Path, typer.Argument(parser=options.path, help="A model folder or an artifact.")],
    data: Annotated[
        Path | None,
        typer.Option(
            parser=options.path,
            help="Texts, or a folder of images or sounds; for spearman a CSV of sentence,sentence,score; for a suite "
            "facts, as lines of JSON or a CSV.",
        ),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(parser=options.path, help="The source to compare with, for divergence.")
    ] = None,
    metric: Annotated[str, typer.Option(help="divergence, spearman or perplexity.")] = "divergence",
    objective: options.OBJECTIVE = None,
    suite: Annotated[
        str | None, typer.Option(help="knowledge: facts, retrieval and summaries, for language models.")
    ] = None,
    packed: Annotated[bool, typer.Option("--packed", help="Run an artifact from packed codes.")] = False,
    json_output: options.JSON = False,
) -> None:
    """Measure a model or an artifact on data.

    Example: octavo evaluate folded --against all-MiniLM-L6-v2 --data sentences.txt

    Example: octavo evaluate folded --metric perplexity --data book.txt

    Example: octavo evaluate folded --suite knowledge --data facts.jsonl
    """
    result = evaluating.evaluate(
        model, data=data, against=against, metric=metric, objective=objective, suite=suite, packed=packed
    )
    if json_output:
        show_json(result)
        return
    if isinstance(result, evaluating.Knowledge):
        console.print(_answers(result))
        console.print(f"perplexity of the built-in text: {result.perplexity:.6g}; facts: {result.data}")
        return
    for key, value in asdict(result).items():
        console.print(f"{key}: {value:.6g}" if isinstance(value, float) else f"{key}: {value}")


def _answers(found: evaluating.Knowledge) -> Table:
    """The scores of a suite, one kind of question a row."""
    table = Table("questions", "number", "written", "likeliest", "by chance", "1 / rank")
    kinds = {"facts": found.facts, "facts in the context": found.in_context, "summaries": found.summaries}
    for kind, score in {**kinds, **{f"facts, {label}": score for label, score in found.labels.items()}}.items():
        written = "" if score.written is None else f"{score.written:.1%}"
        shares = f"{score.likeliest:.1%}", f"{score.chance:.1%}", f"{score.reciprocal_rank:.3f}"
        table.add_row(kind, str(score.questions), written, *shares)
    return table
