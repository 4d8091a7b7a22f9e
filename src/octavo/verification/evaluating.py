"""Measuring a source or an artifact on the user's data."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.artifact import MANIFEST, Artifact
from octavo.calibration import inputs
from octavo.calibration.objective import KL, Cosine, Objective
from octavo.calibration.runner import Runner
from octavo.errors import MissingExtraError, RequestError
from octavo.sources.batches import Batch
from octavo.sources.encoders import is_installed, load_encoder
from octavo.sources.memory import fits
from octavo.sources.sentences import members, split_name, transformer_folder
from octavo.sources.source import Source
from octavo.sources.tokens import check_tokens, context_of, is_causal, text_batches, window_batches
from octavo.system.matmul import fast_matmul
from octavo.system.paths import checked, reason
from octavo.verification.knowledge import (
    Recalled,
    answered,
    builtin_facts,
    closed_book,
    encoder_of,
    in_context,
    read_facts,
    scored,
    summaries,
)
from octavo.verification.loading import load


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a source or an artifact at ``path``, by ``metric``."""

    path: str
    metric: str


@dataclass(frozen=True)
class Divergence(Evaluation):
    """How far outputs are from those of another model, in units of ``metric``.

    Parameters
    ----------
    data
        On what it was measured.
    examples
        Number of examples.
    mean, p95
        Over all examples; ``p95`` is the 95th percentile.
    """

    data: str
    examples: int
    mean: float
    p95: float


@dataclass(frozen=True)
class Spearman(Evaluation):
    """Rank correlation, -1 to 1, of cosine similarities with human scores over ``pairs`` of sentences."""

    pairs: int
    spearman: float


@dataclass(frozen=True)
class Perplexity(Evaluation):
    """Exponential of the mean loss of the next token, in nats, over ``tokens`` of ``data``."""

    data: str
    tokens: int
    perplexity: float


@dataclass(frozen=True)
class Knowledge(Evaluation):
    """What a language model knows, finds in its context and sums up, beside its perplexity.

    Parameters
    ----------
    data
        Where the facts are from.
    perplexity
        Of the built-in text.
    facts
        Facts without any context: closed-book recall.
    in_context
        Facts on subjects that the facts do not know, among statements that hold the answer: retrieval.
    summaries
        The summary of a passage among those of others.
    labels
        Closed-book recall of the facts of every label.
    """

    data: str
    perplexity: float
    facts: Recalled
    in_context: Recalled
    summaries: Recalled
    labels: Mapping[str, Recalled]


METRICS = ("divergence", "spearman", "perplexity")
SUITES = ("knowledge",)
#: Perplexity is measured on non-overlapping windows of this many tokens, or of the model's context if shorter.
PERPLEXITY_WINDOW = 512
#: Largest nats per token with a finite exponential.
_LARGEST_LOSS = 700.0


@fast_matmul()
def evaluate(
    path: str | Path,
    *,
    data: Any = None,
    against: str | Path | None = None,
    metric: str = "divergence",
    objective: str | Objective | None = None,
    suite: str | None = None,
    packed: bool = False,
) -> Any:
    """Measure a source or an artifact.

    Parameters
    ----------
    path
        A model folder or an artifact.
    data
        Texts (``divergence``, ``perplexity``), a folder of images or sounds (``divergence``), a CSV of sentence,
        sentence, score (``spearman``), or facts (``knowledge``); built-in ones by default.
    against
        The source to compare with, for ``divergence``.
    metric
        ``divergence`` (mean and 95th percentile of the objective against ``against``), ``spearman`` (correlation of
        cosine similarities with human scores) or ``perplexity`` (of the next token, for causal language models).
    suite
        ``knowledge`` asks a causal language model for facts closed-book, for facts in its context and for summaries,
        and measures perplexity beside. It takes the place of a metric.
    packed
        Whether an artifact runs from packed codes.

    Returns
    -------
    Divergence or Spearman or Perplexity or Knowledge
        What was measured, by ``metric`` or ``suite``.

    Raises
    ------
    RequestError
        If the metric or suite is unknown, or something that it needs is missing.

    Examples
    --------
    >>> import octavo
    >>> found = octavo.evaluate("folded", against="path/to/model", data="held-out.txt")
    >>> found.mean < 0.1
    True
    """
    if suite is not None:
        if suite not in SUITES:
            raise RequestError(f"suite {suite!r} is not known; choose {', '.join(SUITES)}")
        if against is not None or objective is not None or metric != "divergence":
            raise RequestError(f"suite {suite}: has its own measures; leave --metric, --against and --objective out")
        path = checked(path)
        return _knowledge(path, _open(path, packed=packed), data)
    if metric not in METRICS:
        raise RequestError(f"metric {metric!r} is not known; choose one of {', '.join(METRICS)}")
    path = checked(path)
    if against is not None:
        if metric != "divergence":
            raise RequestError(f"--against is only for the metric divergence, not {metric}; leave it out")
        against = checked(against)
    elif metric == "divergence":
        raise RequestError("divergence compares with a source; give the source with --against")
    if metric == "perplexity" and objective is not None:
        raise RequestError("--objective is for comparing outputs, and perplexity does not compare; leave it out")
    source = _open(path, packed=packed)
    if metric == "perplexity":
        return _perplexity(path, source, data)
    if metric == "spearman":
        return _spearman(path, source, data, inputs.choose_objective(source, objective))
    assert against is not None
    reference = inputs.open_source(against)
    batches, text = inputs.load_data(reference, data, limit=None)
    if reference.module is None or source.module is None or not batches:
        raise RequestError(f"{against}: divergence needs a model that runs, and data for it")
    wanted = inputs.choose_objective(reference, objective, batches)
    batches = inputs.prepared(reference, wanted, batches)
    inputs.prepared(source, wanted, batches)
    outputs = zip(*(_model(one).outputs(batches, wanted) for one in (reference, source)), strict=True)
    try:
        losses = torch.cat([wanted.compared(old, new) for old, new in outputs])
    except RequestError as error:
        raise RequestError(f"{path} against {against}: {error}") from error
    if not bool(losses.isfinite().all()):
        raise RequestError(f"{path}: the divergence from {against} is NaN or Inf on these data; check both models")
    p95 = float(losses.quantile(0.95))
    return Divergence(str(path), wanted.metric, text, len(losses), float(losses.mean()), p95)


def _knowledge(path: Path, source: Source, data: Any) -> Knowledge:
    given = builtin_facts() if data is None else read_facts(data)
    plain = _perplexity(path, source, None)
    module, wanted, model = source.module, KL(), _model(source)
    assert source.folder is not None and module is not None
    encode = encoder_of(source.folder)

    def run(batches: Sequence[Batch]) -> Iterator[Tensor]:
        check_tokens(module, batches)
        return model.outputs(wanted.pieces(module, batches), wanted)

    known, found, summed = (
        answered(questions, encode, run)
        for questions in (closed_book(given.facts), in_context(given.facts), summaries(given.passages))
    )
    labels = dict.fromkeys(one.question.label for one in known if one.question.label)
    return Knowledge(
        str(path),
        "knowledge",
        given.title,
        plain.perplexity,
        scored(known),
        scored(found),
        scored(summed),
        {label: scored([one for one in known if one.question.label == label]) for label in labels},
    )


def _open(path: Path, *, packed: bool) -> Source:
    if not (path / MANIFEST).exists():
        if packed:
            raise RequestError(
                f"{path}: is not an artifact, so it cannot run packed; compress it first, or leave --packed out"
            )
        return inputs.open_source(path)
    artifact = Artifact(path)
    if members(path) and is_installed() and not packed:
        encoder = load_encoder(path)
        source = inputs.open_source(encoder)
        source.path, source.is_encoder = path, True
        return source
    if packed and members(path) and any(split_name(name)[0] for name in artifact.names()):
        raise RequestError(f"{path}: has layers after its transformer that cannot run packed; leave --packed out")
    model = load(path, packed=packed)
    if not isinstance(model, nn.Module):
        raise RequestError(
            f"{path}: holds bare tensors without a model to run; load them into your module and measure there"
        )
    if packed:
        # Its tensors only run and are not read.
        return Source(path.name, path, {}, {}, {}, model.get_parameter, model, is_transformers=True)
    source = inputs.open_source(model)
    source.path, source.is_transformers = path, True
    return source


def _model(source: Source) -> Runner:
    return inputs.model_of(source, blockwise=not fits(source, None))


def _spearman(path: Path, source: Source, data: Any, wanted: Objective) -> Spearman:
    try:
        from scipy.stats import spearmanr
    except ImportError as error:
        raise MissingExtraError("spearman needs scipy, which is not installed: pip install 'octavo[hf]'") from error
    if not isinstance(wanted, Cosine):
        raise RequestError(
            f"spearman compares vectors by cosine, but {type(wanted).__name__.lower()} compares other outputs; give "
            "--objective cosine and a model that returns vectors or hidden states"
        )
    if data is None or source.folder is None or source.module is None:
        raise RequestError("spearman needs a sentence encoder and --data with lines of sentence,sentence,score")
    try:
        with open(checked(data), encoding="utf-8-sig", newline="") as file:
            rows = [(row[0], row[1], float(row[2])) for row in csv.reader(file) if len(row) >= 3]
    except (OSError, ValueError, csv.Error) as error:
        raise RequestError(f"{data}: not a CSV of sentence, sentence, score: {reason(error)}") from error
    if len(rows) < 2:
        raise RequestError(f"{data}: has {len(rows)} pairs; at least 2 are needed")
    texts = sorted({text for row in rows for text in row[:2]}, key=len)
    batches = inputs.prepared(source, wanted, text_batches(transformer_folder(source.folder), texts, source.module))
    vectors = torch.cat(list(_model(source).outputs(batches, wanted)))
    place = {text: index for index, text in enumerate(texts)}
    similarity = [float(vectors[place[a]] @ vectors[place[b]]) for a, b, _ in rows]
    scores = [score for *_, score in rows]
    if not all(map(math.isfinite, (*scores, *similarity))) or len(set(scores)) < 2 or len(set(similarity)) < 2:
        raise RequestError(
            f"{data}: no ranks to correlate: all scores or all similarities are equal or not finite; give pairs that "
            "differ, in words that the model knows"
        )
    return Spearman(str(path), "spearman", len(rows), float(spearmanr(similarity, scores).statistic))


def _perplexity(path: Path, source: Source, data: Any) -> Perplexity:
    if source.module is None or source.folder is None or not is_causal(source.module):
        raise RequestError(f"{source.title}: perplexity needs a causal language model from a transformers folder")
    texts, text = inputs.texts_of(data)
    windows = window_batches(source.folder, texts, min(PERPLEXITY_WINDOW, context_of(source.module)))
    wanted = KL()
    windows = inputs.prepared(source, wanted, windows)
    total, count = 0.0, 0
    for batch, logs in zip(windows, _model(source).outputs(windows, wanted), strict=True):
        following = batch["input_ids"][:, 1:]
        total -= float(logs[:, :-1].gather(2, following[..., None]).double().sum())
        count += following.numel()
    if not total / count < _LARGEST_LOSS:
        raise RequestError(
            f"{source.title}: the loss per token is {total / count:g}, too large for a perplexity; check the model and "
            "the data"
        )
    return Perplexity(str(path), "perplexity", text, count, math.exp(total / count))
