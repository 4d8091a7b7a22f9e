"""A GGUF file as llama.cpp runs it: its outputs, its distance from the source, and its speed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Tokens of a run that is timed.
_TIMED = 64


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


def llama_cpp() -> Any | None:
    """The package ``llama-cpp-python``; None if it is not installed or cannot start."""
    try:
        import llama_cpp as package
    except (ImportError, OSError, RuntimeError):
        return None
    return package


def ran(file: Path, rows: Sequence[Tensor], source: Sequence[Tensor], decoded: Sequence[Tensor]) -> Ran:
    """Run a file on sequences of token numbers.

    Parameters
    ----------
    rows
        Token numbers of each sequence (tokens,).
    source, decoded
        Logits (tokens, vocabulary) of the source and of the artifact for them.
    """
    threads = torch.get_num_threads()
    with _opened(file, max(map(len, rows)) + _TIMED, threads) as model:
        found, apart, own, given, count = 0.0, 0.0, 0.0, 0.0, 0
        for row, before, after in zip(rows, source, decoded, strict=True):
            logits = _logits(model, row)[:, : before.shape[1]].log_softmax(1)
            wanted = before.float().log_softmax(1)
            found += _divergence(wanted, logits)
            apart += _divergence(after.float().log_softmax(1), logits)
            own -= _likelihood(logits, row)
            given -= _likelihood(wanted, row)
            count += len(row)
        predicted = count - len(rows)
        return Ran(
            len(rows),
            count,
            found / count,
            apart / count,
            float(np.exp(own / predicted)),
            float(np.exp(given / predicted)),
            _speed(model, rows[0]),
            threads,
        )


@contextmanager
def _opened(file: Path, context: int, threads: int) -> Iterator[Any]:
    package = llama_cpp()
    assert package is not None
    with _quiet():
        model = package.Llama(
            str(file), n_ctx=context, n_threads=threads, n_threads_batch=threads, logits_all=True, verbose=False
        )
    try:
        yield model
    finally:
        model.close()


@contextmanager
def _quiet() -> Iterator[None]:
    """Standard error closed to messages of the C library, which no option silences."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _logits(model: Any, row: Tensor) -> Tensor:
    """Logits (tokens, vocabulary), float32."""
    model.reset()
    model.eval(row.tolist())
    return torch.from_numpy(np.array(model.scores[: len(row)]))


def _divergence(wanted: Tensor, found: Tensor) -> float:
    return float((wanted.exp() * (wanted - found)).sum())


def _likelihood(logits: Tensor, row: Tensor) -> float:
    return float(logits[:-1].gather(1, row[1:, None].long()).sum())


def _speed(model: Any, row: Tensor) -> float:
    """Tokens a second, generated one after another."""
    model.reset()
    model.eval(row[:4].tolist())
    token, begin = int(row[4 % len(row)]), time.perf_counter()
    for _ in range(_TIMED):
        model.eval([token])
    return _TIMED / (time.perf_counter() - begin)
