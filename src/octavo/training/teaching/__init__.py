"""Teaching: losses that make a student follow the outputs and the inner states of a teacher."""

from octavo.training.teaching.channels import Channels, channel_divergence
from octavo.training.teaching.hidden import HiddenStates, evenly, hidden_error
from octavo.training.teaching.internals import outputs_within
from octavo.training.teaching.lesson import Lesson
from octavo.training.teaching.logits import Logits
from octavo.training.teaching.phases import Phase, teach
from octavo.training.teaching.relations import (
    ATTENTION,
    VALUES,
    Projections,
    Relations,
    projections,
    relation,
    relation_divergence,
)
from octavo.training.teaching.terms import Term
from octavo.training.teaching.tokens import same_tokens

__all__ = [
    "ATTENTION", "VALUES", "Channels", "HiddenStates", "Lesson", "Logits", "Phase", "Projections", "Relations", "Term",
    "channel_divergence", "evenly", "hidden_error", "outputs_within", "projections", "relation", "relation_divergence",
    "same_tokens", "teach",
]  # fmt: skip
