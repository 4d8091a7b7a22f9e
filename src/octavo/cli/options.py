"""Options that several commands share, with the words that ``--help`` teaches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from octavo.errors import RequestError

SOURCE = Annotated[str, typer.Argument(help="A transformers folder, a .safetensors file, or a sharded index.")]
OUT = Annotated[Path, typer.Option("--out", "-o", help="Folder to write. It must be empty or not exist.")]
RATIO = Annotated[float | None, typer.Option(help="How many times smaller than the original, such as 8.")]
SIZE = Annotated[str | None, typer.Option(help="The size itself, such as 11MB.")]
BITS = Annotated[float | None, typer.Option(help="Bits per weight of the whole model, such as 3.5.")]
TARGET = Annotated[
    str,
    typer.Option(
        "--for",
        help="What the budget counts: disk (bytes of the files), memory (of the weights while it runs), or speed.",
    ),
]
SPEEDUP = Annotated[float | None, typer.Option(help="For speed: times as fast as PyTorch in float32, such as 2.5.")]
LATENCY = Annotated[str | None, typer.Option(help="For speed: the time that one call may take, such as 5ms.")]
SHAPE = Annotated[str, typer.Option(help="Sequences x tokens at which speed counts.")]
DATA = Annotated[
    Path | None,
    typer.Option(
        help="Calibration texts: one a line, .jsonl or .json with 'text', or a .csv or .tsv with a header. "
        "Default: a built-in English text."
    ),
]
OBJECTIVE = Annotated[
    str | None, typer.Option(help="What to keep: cosine, kl or squared. Default: what fits the model.")
]
CURVATURE = Annotated[
    str,
    typer.Option(
        help="How errors are weighed: kfac, by inputs and outputs apart, or ekfac, which measures both together in a "
        "second pass over the data. More exact, for more memory; the model must fit in it."
    ),
]
METHODS = Annotated[
    str | None, typer.Option(help="Comma-separated methods or families to choose from; see 'octavo methods'.")
]
PRESET = Annotated[str, typer.Option(help="fast, default or best: how much is tried; or data-free.")]
IGNORE = Annotated[list[str] | None, typer.Option(help="Glob of sites to leave as they are. Repeatable.")]
KEEP = Annotated[
    list[str] | None,
    typer.Option(
        help="GLOB=SPEC: a choice for some sites, such as 'embeddings.*=float16' or '*=gptq:bits=4,group=64'."
    ),
]
SEED = Annotated[int, typer.Option(help="Same seed, same bytes.")]
MEMORY = Annotated[
    str | None,
    typer.Option(help="The most memory to take, such as 6GB; a model that does not fit is run block by block."),
]
EXECUTOR = Annotated[
    str,
    typer.Option(help="Where sites are worked on: local threads, ray, or ray://host:port of a cluster; same bytes."),
]
RESUME = Annotated[bool, typer.Option("--resume", help="Continue the interrupted run of the same command.")]
OVERWRITE = Annotated[
    bool, typer.Option("--overwrite", help="Replace the file, or the folder that Octavo wrote, at the output's place.")
]
JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines, and no progress.")]


def listed(text: str | None) -> list[str] | None:
    """``a,b`` as a list."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def pairs(items: list[str] | None) -> dict[str, str]:
    """``GLOB=SPEC`` items as a mapping; the first ``=`` separates."""
    result = {}
    for item in items or []:
        glob, separator, spec = item.partition("=")
        if not separator or not glob or not spec:
            raise RequestError(f"--keep {item!r}: write GLOB=SPEC, such as 'embeddings.*=float16'")
        result[glob] = spec
    return result
