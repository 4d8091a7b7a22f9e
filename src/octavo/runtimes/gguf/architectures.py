"""How models of ``transformers`` are laid out for llama.cpp: names, metadata, and the tensors that it holds otherwise.

Names come from the ``gguf`` package. llama.cpp rotates neighbouring pairs of a head where Llama of ``transformers``
rotates halves, so the rows of its queries and keys are reordered; Gemma's norms are stored with one added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.coding.ggml import row_order
from octavo.errors import MissingExtraError, RequestError
from octavo.sources.source import Source

Config = Mapping[str, Any]


def require_gguf() -> Any:
    """The ``gguf`` package.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("--for gguf needs the gguf package: pip install 'octavo[gguf]'") from error
    return gguf


@dataclass(frozen=True)
class Placed:
    """Where a tensor goes.

    Parameters
    ----------
    name
        Its name in the file.
    heads
        Number of heads whose rows are reordered; 0 for none.
    add
        What is added to every element.
    transposed
        Whether the model stores it as (inputs, outputs).
    wide
        Whether it must be float32.
    """

    name: str
    heads: int = 0
    add: float = 0.0
    transposed: bool = False
    wide: bool = False

    def rows(self, count: int) -> Tensor:
        """The order in which rows are written."""
        return row_order(count, self.heads)

    def array(self, tensor: Tensor) -> Tensor:
        """The tensor as it is written, in float32."""
        tensor = tensor.float() + self.add
        return (tensor.t() if self.transposed else tensor[self.rows(len(tensor))]).contiguous()


@dataclass(frozen=True)
class Architecture:
    """A kind of model that llama.cpp runs.

    Parameters
    ----------
    name
        As the ``gguf`` package and the files write it.
    metadata
        Writes what is special about it.
    rotated
        Whether rows of queries and keys are reordered.
    norms
        What is added to norms.
    transposed
        Whether linear layers are stored as (inputs, outputs).
    """

    name: str
    metadata: Callable[[Any, Config], None]
    rotated: bool = False
    norms: float = 0.0
    transposed: bool = False


@dataclass(frozen=True)
class Laid:
    """A source laid out for llama.cpp.

    Parameters
    ----------
    tensors
        Places of its tensors.
    config
        Its configuration.
    """

    architecture: Architecture
    tensors: Mapping[str, Placed]
    config: Config

    def metadata(self, writer: Any) -> None:
        """Write the architecture's metadata."""
        self.architecture.metadata(writer, self.config)

    def more(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that the file needs and the model computes."""
        factors = _rope_factors(self.config)
        if factors is not None:
            yield "rope_freqs.weight", factors


def _decoder(writer: Any, config: Config) -> None:
    """Metadata that all decoders with rotary positions share."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(require_gguf().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _llama(writer: Any, config: Config) -> None:
    _decoder(writer, config)
    writer.add_rope_dimension_count(_head(config))
    if config.get("head_dim"):
        _head_lengths(writer, config)


def _with_heads(writer: Any, config: Config) -> None:
    _decoder(writer, config)
    _head_lengths(writer, config)


def _gemma(writer: Any, config: Config) -> None:
    _with_heads(writer, config)
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    scalar = config.get("query_pre_attn_scalar")
    if scalar and scalar != _head(config):
        raise RequestError(
            f"query_pre_attn_scalar is {scalar} and the heads have {_head(config)}: llama.cpp scales attention by the "
            "second; it cannot run this model"
        )


def _gpt2(writer: Any, config: Config) -> None:
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_vocab_size(config["vocab_size"])


def _head(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _head_lengths(writer: Any, config: Config) -> None:
    writer.add_key_length(_head(config))
    writer.add_value_length(_head(config))


def _rope(config: Config) -> Mapping[str, Any]:
    """The rotary settings of the (global) attention, whichever way the configuration has them."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found = dict(found.get("full_attention", found))
    if "rope_theta" not in found and config.get("rope_theta"):
        found["rope_theta"] = config["rope_theta"]
    found.setdefault("rope_type", found.get("type", "default"))
    return found


def _rope_factors(config: Config) -> Tensor | None:
    """Divisors of the rotary frequencies (half a head,), of models whose context was stretched as Llama 3.1's was."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    head, old = _head(config), rope["original_max_position_embeddings"]
    lengths = 2 * math.pi * float(rope["rope_theta"]) ** (torch.arange(0, head, 2).double() / head)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((old / lengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


#: By ``model_type`` of the configuration.
_KNOWN = {
    "llama": Architecture("llama", _llama, rotated=True),
    "qwen2": Architecture("qwen2", _decoder),
    "qwen3": Architecture("qwen3", _with_heads),
    "gemma3_text": Architecture("gemma3", _gemma, norms=1.0),
    "gpt2": Architecture("gpt2", _gpt2, transposed=True),
}
#: Kinds of rotary positions that can be written.
_ROPES = ("default", "linear", "llama3")


def laid_out(source: Source, config: Config) -> Laid:
    """The source laid out for llama.cpp.

    Raises
    ------
    RequestError
        If llama.cpp does not know the architecture, or a tensor has no place in it.
    """
    gguf, where = require_gguf(), source.path or source.title
    kind = config.get("model_type")
    architecture = _KNOWN.get(str(kind))
    if architecture is None:
        raise RequestError(
            f"{where}: models of type {kind!r} cannot be written for llama.cpp yet; --for gguf knows "
            f"{', '.join(_KNOWN)}. Use --for disk, which takes every model"
        )
    if _rope(config)["rope_type"] not in _ROPES:
        raise RequestError(
            f"{where}: rotary positions of type {_rope(config)['rope_type']!r} cannot be written for llama.cpp yet; it "
            f"takes {', '.join(_ROPES)}. Use --for disk"
        )
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(number, config.get("num_hidden_layers") or config["n_layer"])
    heads = config.get("num_attention_heads", 0)
    shared = config.get("num_key_value_heads") or heads
    found = {}
    for name, shape in source.shapes.items():
        if name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")):
            continue  # tables that the model computes
        given = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if given is None:
            raise RequestError(
                f"{where}: tensor {name!r} has no place in llama.cpp's {architecture.name}; use --for disk"
            )
        stem = given.rsplit(".", 2)[-2]
        rotated = {"attn_q": heads, "attn_k": shared}.get(stem, 0) if architecture.rotated else 0
        linear = architecture.transposed and len(shape) == 2 and stem not in ("token_embd", "position_embd", "output")
        add = architecture.norms if stem.endswith("norm") else 0.0
        found[name] = Placed(given, rotated, add, linear, len(shape) < 2 or stem == "position_embd")
    return Laid(architecture, found, config)
