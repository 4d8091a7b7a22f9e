"""Models of real shapes with random weights, for measurements of time and memory that no real model is needed for.

    python benchmarks/shapes.py --shape 7b --layers 8 OUT

writes a Llama folder as ``save_pretrained`` leaves it: bfloat16 shards with their index, ``config.json``, and a small
tokenizer learnt from the built-in text, so that text calibration works. Tensor by tensor, so that no machine is too
small. Weights are Gaussian with log-normal scales of rows and columns and a few large columns, which is what trained
layers look like to a coder; a layer's weights do not depend on how many layers there are.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

#: Shards are closed as soon as they hold this much.
_SHARD_BYTES = 1 << 30
#: Disk that is left to others.
_SPARE_BYTES = 2 << 30
_VOCABULARY = 32000


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    layers: int
    hidden: int
    inner: int
    heads: int
    key_heads: int

    def tensors(self, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order of the files."""
        keys = self.hidden // self.heads * self.key_heads
        yield "model.embed_tokens.weight", (_VOCABULARY, self.hidden)
        for layer in range(layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield f"{prefix}.self_attn.k_proj.weight", (keys, self.hidden)
            yield f"{prefix}.self_attn.v_proj.weight", (keys, self.hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{prefix}.mlp.gate_proj.weight", (self.inner, self.hidden)
            yield f"{prefix}.mlp.up_proj.weight", (self.inner, self.hidden)
            yield f"{prefix}.mlp.down_proj.weight", (self.hidden, self.inner)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (_VOCABULARY, self.hidden)


SHAPES = {
    # TinyLlama 1.1B and Llama 2 7B.
    "1.1b": Shape(22, 2048, 5632, 32, 4),
    "7b": Shape(32, 4096, 11008, 32, 32),
}


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bfloat16 weights that depend on the name alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if len(shape) == 1:
        return (1 + 0.1 * torch.randn(shape, generator=generator)).bfloat16()
    rows, columns = shape
    across = torch.exp(0.25 * torch.randn(rows, 1, generator=generator))
    along = torch.exp(0.25 * torch.randn(columns, generator=generator))
    along[torch.randperm(columns, generator=generator)[: columns // 512]] *= 4
    # Outputs of unit inputs are then about of unit size, as in a model that runs; those of an embedding are small.
    deviation = 0.02 if "embed" in name else 0.7 / math.sqrt(columns)
    matrix = torch.empty(rows, columns, dtype=torch.bfloat16)
    height = max(1, (1 << 22) // columns)
    for start in range(0, rows, height):
        part = torch.randn(min(height, rows - start), columns, generator=generator)
        matrix[start : start + height] = part.mul_(across[start : start + height] * deviation).mul_(along)
    return matrix


def write_shards(shape: Shape, layers: int, folder: Path) -> int:
    """Write weights and their index; returns the bytes of the tensors."""
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    total = size = 0

    def close() -> None:
        nonlocal size
        save_file(held, folder / f"{len(shards)}.part", {"format": "pt"})
        shards.append(list(held))
        held.clear()
        size = 0

    for name, dimensions in shape.tensors(layers):
        held[name] = weight(name, dimensions)
        size, total = size + held[name].nbytes, total + held[name].nbytes
        if size >= _SHARD_BYTES:
            close()
    if held:
        close()
    where = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{index}.part").rename(folder / file)
        where.update(dict.fromkeys(names, file))
    content = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return total


def write_config(shape: Shape, layers: int, folder: Path) -> None:
    """Write what ``transformers`` needs to know to build the model."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "vocab_size": _VOCABULARY, "hidden_size": shape.hidden, "intermediate_size": shape.inner,
        "num_hidden_layers": layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.key_heads,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer learnt from the built-in text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from octavo.sources.texts import builtin_texts

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(builtin_texts(), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=2048
    ).save_pretrained(folder)


def make(name: str, folder: Path, layers: int | None = None) -> int | None:
    """Write a model; returns the bytes of its tensors, or None, with a message, if the disk is too small."""
    shape = SHAPES[name]
    layers = shape.layers if layers is None else layers
    wanted = sum(2 * math.prod(dimensions) for _, dimensions in shape.tensors(layers))
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"{folder}: is not empty; name another folder")
    free = shutil.disk_usage(folder).free
    if free < wanted + _SPARE_BYTES:
        print(f"skipped: {folder} has {free / 1e9:.1f} GB free, {(wanted + _SPARE_BYTES) / 1e9:.1f} GB are needed")
        return None
    total = write_shards(shape, layers, folder)
    write_config(shape, layers, folder)
    write_tokenizer(folder)
    return total


def main() -> None:
    """Write the model asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--layers", type=int, help="of these, in place of all of the shape's")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    total = make(given.shape, given.out, given.layers)
    if total is not None:
        print(f"{given.out}: {total:,} bytes, {total // 2:,} weights")


if __name__ == "__main__":
    main()
