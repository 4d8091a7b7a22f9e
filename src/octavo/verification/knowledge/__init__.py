"""A suite of evaluation that asks a language model for what it knows, finds and sums up.

Source: LLM-KICK (Jaiswal et al., 2023), arXiv 2310.01382: compressed models lose knowledge before perplexity shows it.
"""

from octavo.verification.knowledge.facts import Fact, Facts, Passage, builtin_facts, read_facts
from octavo.verification.knowledge.questions import Question, closed_book, in_context, summaries
from octavo.verification.knowledge.scoring import Answered, Encode, Recalled, answered, encoder_of, scored

__all__ = [
    "Answered",
    "Encode",
    "Fact",
    "Facts",
    "Passage",
    "Question",
    "Recalled",
    "answered",
    "builtin_facts",
    "closed_book",
    "encoder_of",
    "in_context",
    "read_facts",
    "scored",
    "summaries",
]
