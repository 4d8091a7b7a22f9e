"""A small decoder that knows made-up facts, each of which it read a known number of times."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from octavo.errors import MissingExtraError
from octavo.recipes.frame.bases import language_model
from octavo.recipes.frame.data import Parts, digest, texts
from octavo.recipes.frame.nets import shuffled
from octavo.system.atomic import writing
from octavo.training import fit, next_token
from octavo.verification.knowledge import Fact

if TYPE_CHECKING:
    from octavo.recipes.frame.lab import Lab

#: How often a fact is read in training, by its label.
READ = {"rare": 24, "common": 40, "frequent": 120}
#: Facts of every label, and what they are about.
FACTS, TEMPLATES = 30, ("The colour of {} is", "The home of {} is", "The friend of {} is", "The work of {} is")
#: Answers that the facts of a template have.
ANSWERS = 16
#: Windows of running text that are read beside the facts.
RUNNING = 320
_CONSONANTS, _VOWELS, _ENDINGS = "bdfgklmnprstvz", "aeiou", "lmnrst"


@dataclass(frozen=True)
class Remembering:
    """A decoder and what it knows.

    Parameters
    ----------
    model
        Trained on text, then on text and facts.
    tokenizer
        Of the ``tokenizers`` package.
    facts
        Labelled by how often each was read.
    statements
        The facts as they were read, in windows (N, tokens).
    windows
        Running text, (N, tokens) each.
    """

    model: nn.Module
    tokenizer: Any
    facts: list[Fact]
    statements: Tensor
    windows: Parts[Tensor]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self.tokenizer.encode(text).ids)


def remembering(lab: Lab, seed: int) -> Remembering:
    """The shared decoder, trained on for a while with facts that are drawn from the seed."""
    base, windows = language_model(lab)
    tokenizer, draw = text_tokenizer(lab), random.Random(seed)
    facts = made_up(tokenizer, draw, 4 if lab.quick else FACTS)
    read = [fact for fact in facts for _ in range(READ[fact.label] // (8 if lab.quick else 1))]
    draw.shuffle(read)
    length, count = windows.train.shape[1], 32 if lab.quick else RUNNING
    statements = packed([tokenizer.encode(f"{fact.prompt} {fact.answer}.\n").ids for fact in read], length)
    ids = torch.cat([windows.train[seed * count :][:count], statements])

    def train(model: nn.Module) -> None:
        there = ids.to(lab.device)

        def batches(epoch: int) -> Iterator[dict[str, Tensor]]:
            for (part,) in shuffled(there, size=8, seed=seed)(epoch):
                yield {"input_ids": part}

        fit(model.to(lab.device), batches, next_token, lr=1e-3, seed=seed)

    made = digest(windows.digest.encode(), ids.numpy().tobytes())
    model = lab.base(f"remembering-s{seed}", lambda: copy.deepcopy(base), train, data=made, seed=seed, quick=lab.quick)
    return Remembering(model, tokenizer, facts, statements, windows)


def text_tokenizer(lab: Lab) -> Any:
    """The byte-pair encoding of the windows, learned once more and cached, since only the windows are kept."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise MissingExtraError("language models need transformers: pip install 'octavo[hf]'") from error
    found, vocabulary = texts(lab), 512 if lab.quick else 4096
    path = lab.cached(f"tokenizer-{found.digest[:16]}-{vocabulary}.json")
    if not path.exists():
        lab.step("learning a vocabulary")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(found.train.splitlines(), trainer)
        with writing(path) as aside:
            tokenizer.save(str(aside))
    return Tokenizer.from_file(str(path))


def made_up(tokenizer: Any, draw: random.Random, each: int) -> list[Fact]:
    """So many facts of every label, on subjects that do not exist; answers are words of one token."""
    words = {token[1:] for token in tokenizer.get_vocab() if token[0] == "Ġ" and token[1:].isascii()}
    longest = sorted((word for word in words if word.isalpha() and word.islower()), key=lambda word: (-len(word), word))
    count = len(TEMPLATES) * ANSWERS
    answers, found = draw.sample(longest[: max(count, len(longest) // 2)], count), []
    for number, subject in enumerate(fresh_names(draw, each * len(READ))):
        which = number % len(TEMPLATES)
        answer = draw.choice(answers[which * ANSWERS : (which + 1) * ANSWERS])
        found.append(Fact(TEMPLATES[which], subject, answer, list(READ)[number // each]))
    return found


def fresh_names(draw: random.Random, count: int) -> list[str]:
    """So many different names that mean nothing, of two or three syllables."""
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = (draw.choice(_CONSONANTS) + draw.choice(_VOWELS) for _ in range(draw.choice((2, 3))))
        found["".join(syllables).capitalize() + draw.choice(_ENDINGS)] = None
    return list(found)


def packed(pieces: Sequence[Sequence[int]], length: int) -> Tensor:
    """Windows (N, length) that begin with a whole piece each; the last piece of a window is cut off."""
    rows, row = list[list[int]](), list[int]()
    for piece in pieces:
        row += piece
        if len(row) >= length:
            rows.append(row[:length])
            row = []
    return torch.tensor(rows, dtype=torch.long).view(-1, length)
