"""Windows of tokens of the studies' text, and the perplexity of language models on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from octavo.errors import MissingExtraError
from octavo.recipes.frame.data import Parts, digest, texts
from octavo.system.atomic import writing
from octavo.system.matmul import fast_matmul
from octavo.training import next_token

if TYPE_CHECKING:
    from octavo.recipes.frame.lab import Lab


def text_windows(lab: Lab) -> Parts[Tensor]:
    """Windows of token ids (N, tokens) of :func:`texts`, by byte-pair encoding learned on its training part; cached."""
    found, vocabulary, length = texts(lab), 512 if lab.quick else 4096, 32 if lab.quick else 128
    path = lab.cached(f"windows-{found.digest[:16]}-{vocabulary}-{length}.safetensors")
    if not path.exists():
        lab.step("learning a vocabulary")
        whole = {"train": found.train, "development": found.development, "test": found.test}
        with writing(path) as aside:
            save_file(_tokenized(whole, vocabulary, length), aside)
    parts = load_file(path)
    made = digest(*(parts[name].numpy().tobytes() for name in sorted(parts)))
    return Parts(parts["train"].long(), parts["development"].long(), parts["test"].long(), made)


def _tokenized(whole: dict[str, str], vocabulary: int, length: int) -> dict[str, Tensor]:
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise MissingExtraError("language models need transformers: pip install 'octavo[hf]'") from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(whole["train"].splitlines(), trainer)
    parts = {}
    for name, text in whole.items():
        encoded = tokenizer.encode_batch_fast(text.splitlines(keepends=True))
        ids = torch.tensor([number for line in encoded for number in line.ids], dtype=torch.int16)
        rows = ids[: len(ids) // length * length].view(-1, length)
        # In random order, so that the first few are of every kind of text.
        parts[name] = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return parts


def spread(tokenizer: Any, text: str, count: int, length: int) -> Tensor:
    """Windows (count, length) of token ids, evenly spaced over a text."""
    size = 8 * length
    starts = [number * (len(text) - size) // count for number in range(count)]
    return torch.tensor([tokenizer(text[start : start + size])["input_ids"][:length] for start in starts])


@fast_matmul()
@torch.inference_mode()
def nats(model: nn.Module, part: Tensor) -> list[float]:
    """Nats per token of every window (N, tokens)."""
    return [float(next_token(model.eval(), {"input_ids": row[None]})) for row in part]


@torch.inference_mode()
def perplexity(model: nn.Module, part: Tensor, size: int = 32) -> float:
    """The perplexity of windows (N, tokens)."""
    model.eval()
    total = sum(float(next_token(model, {"input_ids": rows})) * len(rows) for rows in part.split(size))
    return float(torch.tensor(total / len(part)).exp())
