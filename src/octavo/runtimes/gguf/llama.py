"""A GGUF file as llama.cpp runs it: its outputs, its distance from the source, and its speed.

llama.cpp ends its process where it meets something unexpected. So it runs in a process of its own, this module as a
program: ``python -m octavo.runtimes.gguf.llama FILE REQUEST OUT``.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.errors import ArtifactError, MissingExtraError

#: Tokens of a run that is timed.
_TIMED = 64
#: Seconds after which a run is given up.
_PATIENCE = 1800
#: The exit status of a process in which the package does not start.
_ABSENT = 75


@dataclass(frozen=True)
class Ran:
    """Figures of a file that llama.cpp ran.

    Parameters
    ----------
    sequences, tokens
        How much text was compared.
    divergence
        Mean Kullback-Leibler divergence from the source, nats a token.
    apart
        The same from Octavo's own decoding of the file: llama.cpp rounds inputs of matrices to 8 bits.
    perplexity, source_perplexity
        Perplexity by llama.cpp, and of the source, of the same tokens.
    per_second
        Tokens generated a second, one after another.
    threads
        Threads that it used.
    """

    sequences: int
    tokens: int
    divergence: float
    apart: float
    perplexity: float
    source_perplexity: float
    per_second: float
    threads: int


def has_llama_cpp() -> bool:
    """Whether ``llama-cpp-python`` is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def ran(file: Path, rows: Sequence[Tensor], source: Sequence[Tensor], decoded: Sequence[Tensor], context: int) -> Ran:
    """Run a file on sequences of token numbers.

    Parameters
    ----------
    rows
        Token numbers of each sequence (tokens,).
    source, decoded
        Logits (tokens, vocabulary) of the source and of the artifact for them.
    context
        Positions that the model has.

    Raises
    ------
    ArtifactError
        If llama.cpp cannot run the file.
    MissingExtraError
        If ``llama-cpp-python`` does not start.
    """
    threads = torch.get_num_threads()
    found, apart, own, given = 0.0, 0.0, 0.0, 0.0
    with tempfile.TemporaryDirectory(prefix="octavo-") as folder:
        speed = _in_child(file, rows, context, threads, Path(folder))
        for number, (row, before, after) in enumerate(zip(rows, source, decoded, strict=True)):
            logits = torch.from_numpy(np.load(Path(folder) / f"{number}.npy"))[:, : before.shape[1]].log_softmax(1)
            wanted = before.float().log_softmax(1)
            found += _divergence(wanted, logits)
            apart += _divergence(after.float().log_softmax(1), logits)
            own -= _likelihood(logits, row)
            given -= _likelihood(wanted, row)
    count = sum(map(len, rows))
    predicted = count - len(rows)
    perplexity, source_perplexity = (float(np.exp(nats / predicted)) for nats in (own, given))
    return Ran(len(rows), count, found / count, apart / count, perplexity, source_perplexity, speed, threads)


def _in_child(file: Path, rows: Sequence[Tensor], context: int, threads: int, folder: Path) -> float:
    """Run the file in a process of its own, which writes logits to a folder; returns tokens a second."""
    request = {"rows": [row.tolist() for row in rows], "context": context, "threads": threads}
    (folder / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-m", __name__, str(file), str(folder / "request.json"), str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired as error:
        raise ArtifactError(f"{file}: llama.cpp ran for {_PATIENCE} seconds; try the file by hand") from error
    if done.returncode == _ABSENT:
        raise MissingExtraError(f"llama-cpp-python is installed but does not start: {done.stderr.strip()[-300:]}")
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()[-1:]
        raise ArtifactError(
            f"{file}: llama.cpp cannot run it: {told[0][:300] if told else f'it ended with {done.returncode}'}; please "
            "report this with the model's config.json"
        )
    return float((folder / "speed.txt").read_text())


def _divergence(wanted: Tensor, found: Tensor) -> float:
    return float((wanted.exp() * (wanted - found)).sum())


def _likelihood(logits: Tensor, row: Tensor) -> float:
    return float(logits[:-1].gather(1, row[1:, None].long()).sum())


def _main(file: str, request: str, out: str) -> None:
    """Write the logits of every sequence, and the speed of generation."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        sys.exit(_ABSENT)

    asked = json.loads(Path(request).read_text())
    rows, threads = asked["rows"], asked["threads"]
    context = min(asked["context"], max(map(len, rows)) + _TIMED)
    model: Any = llama_cpp.Llama(
        file, n_ctx=context, n_threads=threads, n_threads_batch=threads, logits_all=True, verbose=True
    )
    for number, row in enumerate(rows):
        model.reset()
        model.eval(row)
        np.save(Path(out) / f"{number}.npy", model.scores[: len(row)])
    model.reset()
    model.eval(rows[0][:4])
    count, begin = min(_TIMED, context - 4), time.perf_counter()
    for _ in range(count):
        model.eval([rows[0][-1]])
    (Path(out) / "speed.txt").write_text(str(count / (time.perf_counter() - begin)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
