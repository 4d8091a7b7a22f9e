"""Small transformers that read the tokens of MiniLM, and what they are taught and tested with."""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.recipes.frame.bases import minilm
from octavo.recipes.frame.data import Parts, sentiment, texts
from octavo.sources.batches import run
from octavo.sources.model_classes import require_transformers
from octavo.sources.tokens import text_batches
from octavo.training import accuracy, cross_entropy, fit

if TYPE_CHECKING:
    from octavo.recipes.frame.lab import Lab

#: Sentences of a batch, and words of a passage of running text.
SIZE, WORDS = 32, 20
#: Epochs and learning rate of the classifier that is MiniLM itself.
EPOCHS, RATE = 1, 1e-4
#: Learning rates of small students on labels.
RATES = (2.5e-4, 5e-4, 1e-3)
#: Layers and width of small students, and the learning rate at which they fill gaps.
DEPTH, WIDTH, FILLING = 3, 96, 2e-3
#: Tokens of MiniLM's vocabulary: the number of all, that of a gap to be filled, and the first that is a word.
TOKENS, GAP, WORD = 30522, 103, 999
#: Figures of a reader on text that it has not seen; frequencies are those of the words that it has read.
NATS, COUNTED = "nats of a gap", "nats of a gap by frequencies"
Inputs = dict[str, Tensor]
Labelled = tuple[Inputs, Tensor]


def encoder(lab: Lab, depth: int, seed: int, width: int = WIDTH) -> Any:
    """An untrained BERT without dropout, with as many heads as MiniLM, and an inner layer four times as wide.

    In quick runs it is a quarter as wide.
    """
    transformers, width = require_transformers(), width // 4 if lab.quick else width
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=TOKENS, hidden_size=width, num_hidden_layers=depth, num_attention_heads=12,
        intermediate_size=4 * width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False)


def pretrained(lab: Lab) -> Any:
    """MiniLM without dropout, which would blur what is taught; in quick runs an untrained encoder of as many layers."""
    if lab.quick:
        return encoder(lab, 6, 0, 2 * WIDTH).eval()
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = require_transformers().AutoModel.from_pretrained(
        minilm(), local_files_only=True, add_pooling_layer=False, **quiet
    )
    return model.eval()


class Classifier(nn.Module):
    """An encoder, the mean over its tokens, and a linear layer."""

    def __init__(self, encoder: Any, classes: int = 2) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Tokens and their mask, (N, tokens), to logits (N, classes)."""
        states, mask = self.encoder(input_ids, attention_mask).last_hidden_state, attention_mask[..., None]
        return self.head((states * mask).sum(1) / mask.sum(1))


def reviews(lab: Lab) -> Parts[list[Labelled]]:
    """SST-2 in batches of tokens and labels; sentences of similar length share a batch."""
    found = sentiment(lab)

    def batched(rows: Sequence[tuple[str, int]]) -> list[Labelled]:
        # The tokenizer's batches are in the order of lengths, and equal lengths stay in order.
        rows = sorted(rows, key=lambda row: len(row[0]))
        labels = torch.tensor([label for _, label in rows]).split(SIZE)
        return list(zip(read([text for text, _ in rows]), labels, strict=True))

    return Parts(batched(found.train), batched(found.development), batched(found.test), found.digest)


def passages(lab: Lab, count: int) -> list[Inputs]:
    """Batches of passages of running text, evenly spaced over all of it."""
    words = texts(lab).train.split()
    starts = [number * (len(words) - WORDS) // count for number in range(count)]
    return read([" ".join(words[start : start + WORDS]) for start in starts])


def read(sentences: Sequence[str]) -> list[Inputs]:
    """Sentences as batches of tokens and masks."""
    found = text_batches(minilm(), sentences, size=SIZE)
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in found]


def dealt(batches: Sequence[Any], seed: int) -> Callable[[int], Iterator[Any]]:
    """The batches of an epoch in an order drawn from the seed and the epoch's number."""

    def epoch(number: int) -> Iterator[Any]:
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(1000 * seed + number))
        return (batches[k] for k in order.tolist())

    return epoch


class Filling(nn.Module):
    """An encoder that predicts the tokens in gaps, by its own table of tokens."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.config.hidden_size
        self.last = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, gaps: Tensor) -> Tensor:
        """Logits (gaps, vocabulary) at the places of the bools ``gaps``."""
        states = self.encoder(input_ids, attention_mask).last_hidden_state[gaps]
        return self.last(states) @ self.encoder.embeddings.word_embeddings.weight.t()


def with_gaps(batches: Sequence[Inputs], seed: int, share: float = 0.15) -> Callable[[int], Iterator[Labelled]]:
    """Batches whose words have gaps, a share of them, and the words that were there; drawn again in every epoch."""

    def epoch(number: int) -> Iterator[Labelled]:
        draws = torch.Generator().manual_seed(1000 * seed + number)
        for batch in dealt(batches, seed)(number):
            ids = batch["input_ids"]
            gaps = (torch.rand(ids.shape, generator=draws) < share) & (ids >= WORD)
            yield {**batch, "input_ids": ids.masked_fill(gaps, GAP), "gaps": gaps}, ids[gaps]

    return epoch


def filled(module: nn.Module, batch: Labelled) -> Tensor:
    """Cross entropy of the words in the gaps of a batch from :func:`with_gaps`."""
    inputs, words = batch
    return functional.cross_entropy(run(module, inputs), words)


def reader(lab: Lab, name: str, texts: Sequence[Inputs], steps: int, made_of: str) -> tuple[Any, dict[str, float]]:
    """A small encoder that has filled gaps, trained once; and its figures on texts that it has not seen.

    Parameters
    ----------
    made_of
        A digest of the texts; every fiftieth batch is held out.
    """
    held, rest = texts[::50], [batch for number, batch in enumerate(texts) if number % 50]

    def make() -> Filling:
        return Filling(encoder(lab, DEPTH, 0))

    def train(model: nn.Module) -> None:
        fit(model, lambda epoch: itertools.islice(endless(rest), steps), filled, lr=FILLING)

    model = lab.base(name, make, train, data=made_of, quick=lab.quick, steps=steps, lr=FILLING)
    tests, logs = list(with_gaps(held, 1)(0)), frequencies(rest).log()
    with torch.no_grad():
        figures = {
            NATS: statistics.fmean(float(filled(model, batch)) for batch in tests),
            COUNTED: statistics.fmean(float(-logs[words].mean()) for _, words in tests),
        }
    assert isinstance(model, Filling)
    return model.encoder, figures


def frequencies(batches: Sequence[Inputs]) -> Tensor:
    """Shares (vocabulary,) of the words that can be gaps; each word is counted once more than it occurs."""
    ids = torch.cat([batch["input_ids"].flatten() for batch in batches])
    counts = 1.0 + ids[ids >= WORD].bincount(minlength=TOKENS)
    counts[:WORD] = 0.0
    return counts / counts.sum()


def endless(batches: Sequence[Inputs]) -> Iterator[Labelled]:
    """Batches with gaps, epoch after epoch."""
    return itertools.chain.from_iterable(map(with_gaps(batches, 0), itertools.count()))


def classifier(lab: Lab, parts: Parts[list[Labelled]]) -> Classifier:
    """The model of :func:`pretrained` as a classifier of :func:`reviews`, trained once."""

    def make() -> Classifier:
        torch.manual_seed(0)
        return Classifier(pretrained(lab))

    def train(model: nn.Module) -> None:
        some = parts.train[:2] if lab.quick else parts.train
        fit(model, dealt(some, 0), cross_entropy, epochs=EPOCHS, lr=RATE, warmup=0.1)

    model = lab.base("minilm-sst2", make, train, data=parts.digest, quick=lab.quick, epochs=EPOCHS, lr=RATE)
    assert isinstance(model, Classifier)
    return model


def tuned(
    lab: Lab, model: Any, parts: Parts[list[Labelled]], steps: int, seed: int, arm: str | None = None, before: int = 0
) -> Classifier:
    """A copy of an encoder as a classifier, trained on labels at the rate that is best on development data."""

    def learned(lr: float, arm: str | None = None) -> Classifier:
        torch.manual_seed(seed)
        one = Classifier(copy.deepcopy(model))
        batches = dealt(parts.train, seed)
        lab.train(one, batches, cross_entropy, steps=steps, seed=seed, arm=arm, before=before, lr=lr)
        return one

    def score(lr: float) -> float:
        return right(learned(lr), parts.development)

    return learned(lab.choose(f"rate of labels, {arm}", score, RATES), arm)


def spaced(batches: Sequence[Labelled], count: int) -> list[Labelled]:
    """So many of the batches, of all lengths of sentences."""
    count = min(count, len(batches))
    return [batches[k * len(batches) // count] for k in range(count)]


def right(model: nn.Module, batches: Sequence[Labelled]) -> float:
    """Percent of the labels."""
    return 100 * accuracy(model, batches)
