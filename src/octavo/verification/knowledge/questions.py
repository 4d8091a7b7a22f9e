"""Questions made from facts and passages: what is known, what is found in the context, what sums a text up."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from octavo.verification.knowledge.facts import SLOT, Fact, Passage

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
        drawn = draw.sample(others, min(CANDIDATES - 1, len(others)))
        made.append(Question(fact.prompt, (fact.answer, *drawn), fact.label))
    return made


def in_context(facts: Sequence[Fact], statements: int = STATEMENTS) -> list[Question]:
    """Statements on subjects that the facts do not know, and then a question about one of them.

    Templates and answers are those of the facts. The answer stands in the context alone, and the candidates are all
    answers in it. So memory does not help. Templates with fewer than three answers are left out.
    """
    draw, answers = random.Random(1), _answers({fact: fact.template for fact in facts})
    known = {word for fact in facts for word in fact.subject.split()}
    fresh = [name for name in NAMES if name not in known]
    unknown = fresh if len(fresh) >= statements else NAMES
    made = []
    for fact in _few([fact for fact in facts if len(answers[fact.template]) > 2]):
        own = draw.sample(answers[fact.template], min(statements, len(answers[fact.template]), len(unknown)))
        names = draw.sample(unknown, len(own))
        lines = [f"{fact.template.replace(SLOT, name)} {answer}.\n" for name, answer in zip(names, own, strict=True)]
        asked = draw.randrange(len(own))
        prompt = "".join(lines) + fact.template.replace(SLOT, names[asked])
        made.append(Question(prompt, (own[asked], *own[:asked], *own[asked + 1 :])))
    return made


def summaries(passages: Sequence[Passage]) -> list[Question]:
    """Passages, each with its summary among those of others, compared by what the passage adds to its likelihood."""
    draw, every = random.Random(2), list(dict.fromkeys(passage.summary for passage in passages))
    made = []
    for passage in _few(passages):
        others = [summary for summary in every if summary != passage.summary]
        drawn = draw.sample(others, min(SUMMARIES - 1, len(others)))
        made.append(Question(f"{passage.text}\n{_IN_SHORT}", (passage.summary, *drawn), bare=_IN_SHORT))
    return made


def _answers(keys: Mapping[Fact, str]) -> dict[str, list[str]]:
    """The different answers of facts with the same key, in the order of the facts."""
    found: dict[str, dict[str, None]] = {}
    for fact, key in keys.items():
        found.setdefault(key, {})[fact.answer] = None
    return {key: list(answers) for key, answers in found.items()}


def _few(entries: Sequence[Entry]) -> list[Entry]:
    """At most so many, spread evenly."""
    count = min(MOST, len(entries))
    return [entries[number * len(entries) // count] for number in range(count)]
