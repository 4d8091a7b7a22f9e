"""Whether two tokenizers number tokens alike."""

from __future__ import annotations

from typing import Any

from octavo.errors import RequestError

#: Text whose tokens show normalization, splitting and special tokens.
_PROBE = "The naïve U.S. reader's 2nd look: 3,141.59 words & ümlauts — don't panic!\n\tEnd."


def same_tokens(teacher: Any, student: Any) -> None:
    """Check that two tokenizers of ``transformers`` give the same numbers to a text.

    Raises
    ------
    RequestError
        If their vocabularies or their tokens of a sample text differ.
    """
    known, own = teacher.get_vocab(), student.get_vocab()
    odd = sorted(token for token in {*known, *own} if known.get(token) != own.get(token))
    if odd:
        raise RequestError(
            f"tokenizers: teacher and student number {len(odd)} of {len({*known, *own})} tokens differently, such as "
            f"{odd[0]!r} ({known.get(odd[0])} and {own.get(odd[0])}); give the student the teacher's tokenizer"
        )
    one, other = (list(tokenizer(_PROBE)["input_ids"]) for tokenizer in (teacher, student))
    if one != other:
        raise RequestError(
            f"tokenizers: teacher and student have one vocabulary but split a text into {len(one)} and {len(other)} "
            "tokens, which differ; give the student the teacher's tokenizer"
        )
