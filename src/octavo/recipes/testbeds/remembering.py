"""A small decoder that knows made-up facts, each read a known number of times, and finds fresh ones in its context."""

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
from octavo.verification.knowledge import Fact, Passage, fresh_names

if TYPE_CHECKING:
    from octavo.recipes.frame.lab import Lab

#: How often a fact is read in training, by its label.
READ = {"rare": 16, "common": 64, "frequent": 256}
#: What facts are about.
TEMPLATES = ("The colour of {} is", "The home of {} is", "The friend of {} is", "The work of {} is")
#: Answers a template, and facts a label.
ANSWERS, FACTS = 16, 40
#: Windows of running text beside the facts, and windows of statements on fresh subjects with questions on them.
RUNNING, EPISODES = 800, 320


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
    windows
        Running text, (N, tokens) each.
    passages
        Paragraphs of test text without their first sentence, which is the summary.
    """

    model: nn.Module
    tokenizer: Any
    facts: list[Fact]
    windows: Parts[Tensor]
    passages: list[Passage]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self.tokenizer.encode(text).ids)


def remembering(lab: Lab, seed: int) -> Remembering:
    """The shared decoder, trained on for a while with facts that are drawn from the seed."""
    base, windows = language_model(lab)
    tokenizer, draw = text_tokenizer(lab), random.Random(seed)
    facts = made_up(tokenizer, draw, 4 if lab.quick else FACTS)
    few = 16 if lab.quick else 1
    length, running = windows.train.shape[1], windows.train[seed * RUNNING :][: RUNNING // few]
    read = [fact for fact in facts for _ in range(READ[fact.label] // (few if few == 1 else 8))]
    draw.shuffle(read)
    statements = packed([_ids(tokenizer, f"{fact.prompt} {fact.answer}.\n") for fact in read], length)
    made = [_ids(tokenizer, episode(facts, draw)) for _ in range(EPISODES // few)]
    ids = torch.cat([running, statements, packed(made, length)])

    def train(model: nn.Module) -> None:
        there = ids.to(lab.device)

        def batches(epoch: int) -> Iterator[dict[str, Tensor]]:
            for (part,) in shuffled(there, size=16, seed=seed)(epoch):
                yield {"input_ids": part}

        fit(model.to(lab.device), batches, next_token, lr=1e-3, seed=seed)

    key = digest(windows.digest.encode(), ids.numpy().tobytes())
    model = lab.base(f"remembering-s{seed}", lambda: copy.deepcopy(base), train, data=key, seed=seed, quick=lab.quick)
    return Remembering(model, tokenizer, facts, windows, paragraphs(lab, tokenizer, length))


def text_tokenizer(lab: Lab) -> Any:
    """The byte-pair encoding of the windows, learned once more, since only windows are kept."""
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
    words = sorted(word[1:] for word in tokenizer.get_vocab() if word[0] == "Ġ" and word[1:].isascii())
    long = sorted((word for word in words if word.isalpha() and word.islower()), key=lambda word: -len(word))
    answers = draw.sample(long[: max(len(TEMPLATES) * ANSWERS, len(long) // 2)], len(TEMPLATES) * ANSWERS)
    subjects = fresh_names(draw, each * len(READ))
    found = []
    for number, subject in enumerate(subjects):
        which = number % len(TEMPLATES)
        own = answers[which * ANSWERS : (which + 1) * ANSWERS]
        label = list(READ)[number // each]
        found.append(Fact(TEMPLATES[which], subject, draw.choice(own), label))
    return found


def episode(facts: Sequence[Fact], draw: random.Random) -> str:
    """Six statements on fresh subjects, and then all of them again in another order."""
    template = draw.choice(TEMPLATES)
    answers = sorted({fact.answer for fact in facts if fact.template == template})
    own = draw.sample(answers, min(6, len(answers)))
    lines = [
        f"{template.replace('{}', name)} {answer}.\n"
        for name, answer in zip(fresh_names(draw, len(own)), own, strict=True)
    ]
    return "".join(lines + draw.sample(lines, len(lines)))


def packed(pieces: Sequence[Sequence[int]], length: int) -> Tensor:
    """Windows (N, length) that begin with a whole piece each; the last piece of a window is cut off."""
    rows, row = [], list[int]()
    for piece in pieces:
        row += piece
        if len(row) >= length:
            rows.append(row[:length])
            row = []
    return torch.tensor(rows, dtype=torch.long).view(-1, length)


def paragraphs(lab: Lab, tokenizer: Any, length: int) -> list[Passage]:
    """Paragraphs of the test text that fit a window with a summary, 64 at most, spread over the text."""
    fitting = []
    for line in texts(lab).test.splitlines():
        lead, _, rest = line.strip().partition(". ")
        if 20 < len(lead) < 160 and len(rest) > 60 and 20 < len(_ids(tokenizer, line)) < length - 12:
            fitting.append(Passage(rest, f"{lead}."))
    count = min(8 if lab.quick else 64, len(fitting))
    return [fitting[number * len(fitting) // count] for number in range(count)]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text).ids)
