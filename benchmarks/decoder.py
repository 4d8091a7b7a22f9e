"""A Llama whose widths are multiples of 256, un-quantized, with its tokenizer: for types of llama.cpp that need both.

`python benchmarks/decoder.py FOLDER` makes it from the language model that the studies train (docs/adding-a-recipe.md): its
704 neurons a layer become 768, and 300 steps train all weights again.
OCTAVO_DATA must name the studies' texts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from octavo.recipes.frame import Lab, studies
from octavo.recipes.frame.bases import language_model
from octavo.recipes.frame.data import texts
from octavo.recipes.frame.windows import perplexity
from octavo.training import next_token

NEURONS, STEPS, SIZE, RATE = 768, 300, 32, 3e-4


def widened(model: torch.nn.Module) -> torch.nn.Module:
    """The model with more neurons, which say nothing yet."""
    from transformers import LlamaForCausalLM

    config = type(model.config)(**{**model.config.to_dict(), "intermediate_size": NEURONS})
    torch.manual_seed(0)
    wider = LlamaForCausalLM(config)
    state = wider.state_dict()
    for name, tensor in model.state_dict().items():
        if name.endswith("down_proj.weight"):
            state[name].zero_()
        state[name][tuple(slice(size) for size in tensor.shape)] = tensor
    wider.load_state_dict(state)
    return wider


def tokenizer(text: str, vocabulary: int) -> object:
    """The byte-pair encoding that the studies learn, as a tokenizer of transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        text.splitlines(), trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made)


def main(folder: Path) -> None:
    """Make it, and print its perplexity before and after."""
    lab = Lab(next(iter(studies().values())))
    model, parts = language_model(lab, tied=True)
    model = widened(model)
    print("perplexity before", perplexity(model, parts.test[:256]))
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    order = torch.randperm(len(parts.train), generator=torch.Generator().manual_seed(1))
    model.train()
    for step, rows in enumerate(order[: STEPS * SIZE].split(SIZE)):
        loss = next_token(model, {"input_ids": parts.train[rows]})
        loss.backward()
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        if step % 20 == 0:
            print(step, float(loss), flush=True)
    print("perplexity after", perplexity(model.eval(), parts.test[:256]))
    model.save_pretrained(folder)
    tokenizer(texts(lab).train, model.config.vocab_size).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
