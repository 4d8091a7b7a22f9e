"""Small models for recipes, trained once and cached, so that compression starts from useful models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from octavo.errors import MissingExtraError
from octavo.recipes import data
from octavo.recipes.base import Trial
from octavo.system.atomic import writing
from octavo.training import cross_entropy, fit, next_token


def shuffled(*tensors: Tensor, size: int, seed: int = 0) -> Callable[[int], Iterable[tuple[Tensor, ...]]]:
    """Shuffled batches of an epoch, drawn from the seed and the epoch's number; the last one is left out."""

    def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(tensors[0]), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            which = order[start : start + size]
            yield tuple(tensor[which] for tensor in tensors)

    return batches


def flipped(batches: Callable[[int], Iterable[Any]]) -> Callable[[int], Iterable[Any]]:
    """Augmented batches: every second one mirrored and each shifted by up to two pixels, by the epoch's number."""

    def augmented(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(epoch)
        for x, y in batches(epoch):
            if int(torch.randint(2, (1,), generator=generator)):
                x = x.flip(-1)
            dy, dx = torch.randint(0, 5, (2,), generator=generator).tolist()
            h, w = x.shape[-2:]
            yield functional.pad(x, (2, 2, 2, 2))[..., dy : dy + h, dx : dx + w], y

    return augmented


def in_batches(pair: tuple[Tensor, Tensor], size: int = 250) -> list[tuple[Tensor, Tensor]]:
    """All examples in order, for measuring."""
    return list(zip(pair[0].split(size), pair[1].split(size), strict=True))


class ResNet(nn.Module):
    """The residual network of CIFAR-10 (He et al., 2016) with ``6 n + 2`` layers of 16, 32 and 64 channels.

    Parameters
    ----------
    blocks
        ``n``: 1 for ResNet-8, 2 for ResNet-14, 3 for ResNet-20.
    """

    def __init__(self, blocks: int = 1, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        layers: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for block in range(blocks):
                layers.append(_Residual(channels, width << stage, 2 if stage and not block else 1))
                channels = width << stage
        self.blocks, self.head = nn.Sequential(*layers), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, classes)."""
        return self.head(self.blocks(functional.relu(self.stem(x))).mean((2, 3)))


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(functional.relu(self.norm1(self.first(x)))))
        # The shortcut without parameters: every other pixel, and channels of zeros.
        short = functional.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        return functional.relu(y + short)


def trained(trial: Trial, name: str, make: Callable[[], nn.Module], train: Callable[[nn.Module], Any]) -> nn.Module:
    """The model of ``make`` after ``train``, from the cache if it was trained before.

    Parameters
    ----------
    name
        A name with everything that determines the weights: architecture, data, epochs, seed.
    """
    model, path = make(), trial.cached(f"{name}.safetensors")
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    trial.step(f"training {name}")
    train(model)
    with writing(path) as aside:
        save_file({key: tensor.contiguous().clone() for key, tensor in model.state_dict().items()}, aside)
    return model.eval()


def classifier(trial: Trial, seed: int, *, blocks: int = 1, epochs: int = 8, width: int = 16) -> nn.Module:
    """A ResNet trained on :func:`octavo.recipes.data.images` with momentum, 8 epochs of 10,000 images by default."""
    split = data.images(trial)
    epochs = 2 if trial.quick else epochs

    def make() -> nn.Module:
        torch.manual_seed(seed)
        return ResNet(blocks, split.classes, width)

    def train(model: nn.Module) -> None:
        batches = flipped(shuffled(*split.train, size=64, seed=seed))
        fit(model, batches, cross_entropy, epochs=epochs, optimizer=momentum(0.1), seed=seed)

    return trained(trial, f"resnet{6 * blocks + 2}-w{width}-e{epochs}-s{seed}", make, train)


def momentum(lr: float, decay: float = 5e-4) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Stochastic gradient descent with Nesterov momentum, the standard for convolutional nets."""
    return lambda model: torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=decay, nesterov=True)


def language_model(trial: Trial, seed: int = 0, *, epochs: int = 4) -> tuple[Any, dict[str, Tensor]]:
    """A Llama of 6 layers, width 256, 8 query and 4 key heads and 4,096 tokens, trained on :func:`data.texts`.

    Returns
    -------
    model, windows
        The ``transformers`` model, and ``train``, ``development`` and ``test`` windows (N, 128) of token ids.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise MissingExtraError("language models need transformers: pip install 'octavo[hf]'") from error
    texts, vocabulary, length = data.texts(trial), 512 if trial.quick else 4096, 32 if trial.quick else 128
    path = trial.cached("bpe.json")
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts.train.splitlines(), trainer)
        tokenizer.save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    windows = {}
    for part in ("train", "development", "test"):
        ids = torch.tensor(tokenizer.encode(getattr(texts, part)).ids)
        windows[part] = ids[: len(ids) // length * length].view(-1, length)
    layers, width = (2, 64) if trial.quick else (6, 256)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers,
        num_attention_heads=8 if width > 64 else 4, num_key_value_heads=4 if width > 64 else 2,
        max_position_embeddings=256, tie_word_embeddings=True, attention_bias=False,
    )  # fmt: skip

    def make() -> nn.Module:
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)

    def train(model: nn.Module) -> None:
        def batches(epoch: int) -> Iterator[dict[str, Tensor]]:
            for (ids,) in shuffled(windows["train"], size=16, seed=seed)(epoch):
                yield {"input_ids": ids}

        fit(model, batches, next_token, epochs=1 if trial.quick else epochs, lr=2e-3, seed=seed)

    return trained(trial, f"llama-l{layers}-d{width}-e{epochs}-s{seed}", make, train), windows


@torch.inference_mode()
def perplexity(model: nn.Module, windows: Tensor, size: int = 32) -> float:
    """The next-token loss of every window (N, tokens)."""
    model.eval()
    total = sum(float(next_token(model, {"input_ids": part})) * len(part) for part in windows.split(size))
    return float(torch.tensor(total / len(windows)).exp())
