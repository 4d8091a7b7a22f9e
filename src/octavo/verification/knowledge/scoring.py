"""Scores of questions by likelihood: the answer that a model would write, and the rank of the right one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from octavo.errors import RequestError
from octavo.sources.batches import Batch
from octavo.sources.tokens import tokenizer_of
from octavo.verification.knowledge.questions import Question

#: Returns the token ids of a text.
Encode = Callable[[str], Sequence[int]]
#: Returns log-probabilities (sequences, tokens, vocabulary) of the next token for every batch of ``input_ids``.
RunBatches = Callable[[Sequence[Batch]], Iterable[Tensor]]
#: Sequences a batch.
_SIZE = 32


@dataclass(frozen=True)
class Recalled:
    """How well questions are answered.

    Parameters
    ----------
    questions
        How many there are.
    chance
        Share of right answers if candidates were drawn.
    likeliest
        Share of questions whose right answer has the largest likelihood of all candidates.
    reciprocal_rank
        Mean of one over the rank of the right answer by likelihood.
    written
        Share of questions to which greedy decoding writes exactly the right answer; None for summaries, since many
        wordings are right.
    """

    questions: int
    chance: float
    likeliest: float
    reciprocal_rank: float
    written: float | None


@dataclass(frozen=True)
class Answered:
    """How a question was answered.

    Parameters
    ----------
    question
        What was asked.
    rank
        The place of the right answer by likelihood, from 1; equally likely candidates are ahead of it.
    written
        Whether greedy decoding writes the right answer.
    """

    question: Question
    rank: int
    written: bool


def scored(answered: Sequence[Answered]) -> Recalled:
    """The score of questions of one kind, at least one."""
    chance = fmean(1 / len(one.question.answers) for one in answered)
    open_ended = any(one.question.bare is not None for one in answered)
    return Recalled(
        len(answered),
        chance,
        fmean(one.rank == 1 for one in answered),
        fmean(1 / one.rank for one in answered),
        None if open_ended else fmean(one.written for one in answered),
    )


def answered(questions: Sequence[Question], encode: Encode, run: RunBatches) -> list[Answered]:
    """Ask all questions.

    An answer follows its prompt after a space. It has the log-likelihood of all its tokens. It is written by greedy
    decoding if each of its tokens is the likeliest after those before it.
    """
    asked = [[_tokens(encode, one.prompt, answer) for answer in one.answers] for one in questions]
    bare = [[_tokens(encode, one.bare, answer) for answer in one.answers] for one in questions if one.bare is not None]
    found = _likelihoods([pair for group in (*asked, *bare) for pair in group], run)
    result, plain = [], iter(bare)
    for question, group in zip(questions, asked, strict=True):
        totals = [found[pair][0] for pair in group]
        if question.bare is not None:
            totals = [total - found[pair][0] for total, pair in zip(totals, next(plain), strict=True)]
        rank = sum(not total < totals[0] for total in totals)
        result.append(Answered(question, rank, found[group[0]][1]))
    return result


def encoder_of(folder: Path) -> Encode:
    """The tokenizer of a model folder, with the first token that the model expects."""
    tokenizer = tokenizer_of(folder)
    first = tokenizer("", add_special_tokens=True)["input_ids"][:1] if tokenizer.bos_token_id is not None else []
    first = [token for token in first if token == tokenizer.bos_token_id]
    return lambda text: [*first, *tokenizer(text, add_special_tokens=False)["input_ids"]]


Pair = tuple[tuple[int, ...], tuple[int, ...]]


def _tokens(encode: Encode, prompt: str, answer: str) -> Pair:
    """The tokens of a prompt and of its answer. A token across the boundary belongs to the answer."""
    start, whole = encode(prompt), encode(f"{prompt} {answer}")
    common = 0
    while common < len(start) and whole[common] == start[common]:
        common += 1
    if not 0 < common < len(whole):
        raise RequestError(
            f"the question {prompt!r}: its answer {answer!r} begins with its first token, so nothing stands before it; "
            "write a longer template"
        )
    return tuple(whole[:common]), tuple(whole[common:])


def _likelihoods(pairs: Sequence[Pair], run: RunBatches) -> dict[Pair, tuple[float, bool]]:
    """Log-likelihood of every answer, and whether each of its tokens is the likeliest.

    The last token of an answer is not read. So answers that only differ there share a sequence.
    """
    read: dict[tuple[int, ...], list[Pair]] = {}
    for pair in dict.fromkeys(pairs):
        prompt, answer = pair
        read.setdefault((*prompt, *answer[:-1]), []).append(pair)
    ordered = sorted(read, key=len)
    batches = [{"input_ids": _padded(ordered[at : at + _SIZE])} for at in range(0, len(ordered), _SIZE)]
    found: dict[Pair, tuple[float, bool]] = {}
    for sequence, logs in zip(ordered, _rows(run(batches)), strict=True):
        for prompt, answer in read[sequence]:
            own = logs[len(prompt) - 1 : len(sequence)]
            wanted = torch.tensor(answer)
            total = float(own.gather(1, wanted[:, None]).double().sum())
            found[prompt, answer] = total, bool((own.argmax(1) == wanted).all())
    return found


def _padded(sequences: Sequence[tuple[int, ...]]) -> Tensor:
    """Sequences filled up at their end, which a causal model does not see before."""
    longest = len(sequences[-1])
    return torch.tensor([[*one, *[0] * (longest - len(one))] for one in sequences])


def _rows(outputs: Iterable[Tensor]) -> Iterator[Tensor]:
    for batch in outputs:
        yield from batch
