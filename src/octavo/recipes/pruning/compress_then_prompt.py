"""Compress, Then Prompt: soft prompts trained on compressed weights, on other weights, texts, and against rivals."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from octavo.forms import Dense, Form, LowRank, Sum
from octavo.methods import Setting
from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.bases import language_model
from octavo.recipes.frame.data import SST2, TEXT, sentiment
from octavo.recipes.frame.nets import shuffled
from octavo.recipes.frame.windows import nats
from octavo.recipes.testbeds.one_shot import one_shot
from octavo.recipes.testbeds.remembering import text_tokenizer
from octavo.training import Prompted, SoftPrompt, formed, forms_of, next_token

#: How blocks are compressed. The first is the paper's: an eighth of 16 bits.
LEVELS: dict[str, tuple[str, Setting]] = {
    "50% and 4 bits": ("sparsegpt", {"sparsity": 0.5, "bits": 4}),
    "70% sparse": ("sparsegpt", {"sparsity": 0.7, "bits": 8}),
    "2 bits": ("gptq", {"bits": 2, "group": 64}),
}
#: Vectors of a prompt: as many numbers as gains and biases of the block's outputs together.
LENGTH = 25
#: Steps of every tuning, and sequences in each.
STEPS, SIZE = 100, 8
RATES = (3e-3, 1e-2, 3e-2)
