"""Questions made from facts and passages: what is known, what is found in the context, what sums a text up."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from octavo.verification.knowledge.facts import Fact, Passage

#: Answers that an answer is ranked among, itself included.
CANDIDATES = 16
#: Statements in the context of a question, one of which answers it.
STATEMENTS = 4
#: Summaries that a summary is ranked among, itself included.
SUMMARIES = 8
#: The most questions of one kind.
MOST = 256
#: What stands between a passage and its summary.
_IN_SHORT = "In short:"
#: Subjects of statements in the context. Each has another initial, so that tokenizers tell them apart.
NAMES = (
    "Agatha", "Boris", "Cedric", "Delphine", "Edmund", "Fiona", "Gideon", "Harriet", "Ivor", "Jemima", "Kenneth",
    "Leonora", "Magnus", "Nadine", "Oswald", "Prudence", "Quentin", "Rosalind", "Silas", "Tabitha", "Ursula",
    "Vernon", "Winifred", "Xavier", "Yvonne", "Zelda",
)  # fmt: skip

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Question:
    """A text and possible continuations of it.

    Parameters
    ----------
    prompt
        What the model reads.
    answers
        Candidates; the first one is right.
    label
        The group of the fact.
    bare
        A prompt without what the answer depends on. The log-likelihood after it is subtracted, so that an answer that
        is likely anyway gains nothing. None if nothing is subtracted.
    """

    prompt: str
    answers: tuple[str, ...]
    label: str = ""
    bare: str | None = None


def closed_book(facts: Sequence[Fact]) -> list[Question]:
    """The facts as they are, each answer among other answers of its template.

    Other answers to the same question are right too, and are no candidates.
    """
    draw, answers = random.Random(0), _answers({fact: fact.template for fact in facts})
    right = _answers({fact: fact.prompt for fact in facts})
    made = []
    for fact in _few(facts):
        others = [answer for answer in answers[fact.template] if answer not in right[fact.prompt]]
        made.append(Question(fact.prompt, _among(draw, fact.answer, others, CANDIDATES), fact.label))
    return made


def in_context(facts: Sequence[Fact], statements: int = STATEMENTS) -> list[Question]:
    """Statements on subjects that the facts do not know, and then a question about one of them; one for every fact.

    Templates and answers are those of the facts, and the candidates are answers of the template asked for. The right
    one is drawn, so it stands in the context alone, and memory does not help.
    """
    draw, answers = random.Random(1), _answers({fact: fact.template for fact in facts})
    known = {word for fact in facts for word in fact.subject.split()}
    fresh = [name for name in NAMES if name not in known]
    made = []
    for fact in _few(facts):
        others = draw.sample([other for other in facts if other != fact], min(statements, len(facts)) - 1)
        name, *names = draw.sample(fresh if len(fresh) >= statements else NAMES, len(others) + 1)
        right = draw.choice(answers[fact.template])
        told = [replace(fact, subject=name, answer=right)]
        told += [replace(other, subject=subject) for other, subject in zip(others, names, strict=True)]
        lines = [f"{one.prompt} {one.answer}.\n" for one in draw.sample(told, len(told))]
        candidates = _among(draw, right, [answer for answer in answers[fact.template] if answer != right], CANDIDATES)
        made.append(Question("".join(lines) + told[0].prompt, candidates))
    return made


def summaries(passages: Sequence[Passage]) -> list[Question]:
    """Passages, each with its summary among those of others, compared by what the passage adds to its likelihood."""
    draw, every = random.Random(2), list(dict.fromkeys(passage.summary for passage in passages))
    made = []
    for passage in _few(passages):
        answers = _among(draw, passage.summary, [one for one in every if one != passage.summary], SUMMARIES)
        made.append(Question(f"{passage.text}\n{_IN_SHORT}", answers, bare=_IN_SHORT))
    return made


def _answers(keys: Mapping[Fact, str]) -> dict[str, list[str]]:
    """The different answers of facts with the same key, in the order of the facts."""
    found: dict[str, dict[str, None]] = {}
    for fact, key in keys.items():
        found.setdefault(key, {})[fact.answer] = None
    return {key: list(answers) for key, answers in found.items()}


def _among(draw: random.Random, right: str, others: Sequence[str], most: int) -> tuple[str, ...]:
    """The right answer, and others up to so many in all."""
    return (right, *draw.sample(others, min(most - 1, len(others))))


def _few(entries: Sequence[Entry]) -> list[Entry]:
    """At most so many, spread evenly."""
    count = min(MOST, len(entries))
    return [entries[number * len(entries) // count] for number in range(count)]
