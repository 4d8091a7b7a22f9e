"""Weights as quantizers store them in model folders, and the floats that they stand for.

Every format is read from its tensors alone: no package of a quantizer is needed. Sources: the files that AutoGPTQ,
AutoAWQ, compressed-tensors and bitsandbytes write, and the block-scaled float8 weights of DeepSeek-V3.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.errors import RequestError

#: Floats of one weight from its parts, by the end of their names.
Decoding = Callable[[Mapping[str, Tensor]], Tensor]
#: AutoAWQ stores the columns of a word in this order.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
#: Quantizers whose weights are read.
READ = ("gptq", "awq", "compressed-tensors", "fp8", "fbgemm_fp8", "bitsandbytes")
#: Tensors for rounding activations, and a mark of how bitsandbytes orders its codes.
_DROPPED = (".input_scale", ".output_scale", ".input_zero_point", ".weight_format")


@dataclass(frozen=True)
class CodedWeight:
    """A weight stored as codes.

    Parameters
    ----------
    name
        Name of the weight as floats.
    parts
        The tensors that hold it, by the end of their names.
    """

    name: str
    parts: dict[str, str]
    decode: Decoding


def is_dropped(name: str) -> bool:
    """Whether a tensor belongs to a quantizer and not to the model."""
    return name.endswith(_DROPPED)


def coded_weights(dtypes: Mapping[str, torch.dtype], config: Mapping[str, Any]) -> list[CodedWeight]:
    """The weights of a folder that are stored as codes.

    Parameters
    ----------
    dtypes
        Of all tensors, by name.
    config
        The ``quantization_config`` of the model's configuration.

    Raises
    ------
    RequestError
        If the quantizer, or one of its formats, is not one of :data:`READ`.
    """
    method = str(config.get("quant_method", ""))
    if method not in READ:
        raise RequestError(f"quantized by {method or 'an unnamed method'}, which is not read")
    if method == "gptq":
        decode, parts = _gptq(config), ("qweight", "qzeros", "scales", "g_idx")
        return _found(dtypes, "qweight", "weight", parts, decode)
    if method == "awq":
        return _found(dtypes, "qweight", "weight", ("qweight", "qzeros", "scales"), _awq(config))
    if method == "bitsandbytes":
        eight = _found(dtypes, "SCB", "weight", ("weight", "SCB"), _bitsandbytes_8)
        return eight + _bitsandbytes_4(dtypes)
    for scheme in _schemes(config):
        if scheme.get("format") in ("marlin-24", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "sparse-24-bitmask"):
            raise RequestError(f"stored in the format {scheme['format']} of compressed-tensors, which is not read")
    more = ("weight_scale", "weight_scale_inv", "weight_zero_point", "weight_shape", "weight_g_idx")
    packed = _found(dtypes, "weight_packed", "weight", ("weight_packed", *more), _compressed(config))
    scaled = {name: dtype for name, dtype in dtypes.items() if dtype in (*_FLOAT8, torch.int8)}
    plain = [
        CodedWeight(name, _siblings(dtypes, name.removesuffix(".weight"), ("weight", *more)), _scaled)
        for name in scaled
        if name.endswith(".weight")
    ]
    return packed + plain


def _found(
    dtypes: Mapping[str, torch.dtype], marker: str, leaf: str, parts: tuple[str, ...], decode: Decoding
) -> list[CodedWeight]:
    """The weights that have a tensor whose name ends in a marker."""
    layers = [name.removesuffix(f".{marker}") for name in dtypes if name.endswith(f".{marker}")]
    return [CodedWeight(f"{layer}.{leaf}", _siblings(dtypes, layer, parts), decode) for layer in layers]


def _siblings(dtypes: Mapping[str, torch.dtype], layer: str, parts: tuple[str, ...]) -> dict[str, str]:
    return {part: f"{layer}.{part}" for part in parts if f"{layer}.{part}" in dtypes}


def _schemes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The configuration and those of its groups of layers."""
    groups = config.get("config_groups") or {}
    return [config, *(group for group in groups.values() if isinstance(group, Mapping))]


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """Codes in 32-bit words, the lowest bits first: (..., words) to (..., words * 32 / bits).

    Codes may lie across two words.
    """
    if bits not in (2, 3, 4, 8):
        raise RequestError(f"has codes of {bits} bits; 2, 3, 4 and 8 are read")
    if 32 % bits:
        ones = (words[..., None].long() >> torch.arange(32)) & 1
        ones = ones.flatten(-2).unflatten(-1, (-1, bits))
        return (ones << torch.arange(bits)).sum(-1)
    codes = (words[..., None].long() >> torch.arange(0, 32, bits)) & (2**bits - 1)
    return codes.flatten(-2)


def _gptq(config: Mapping[str, Any]) -> Decoding:
    """Codes packed along the inputs, with a step and a zero for every output and group of inputs."""
    bits = int(config.get("bits", 4))
    #: The first version stores zeros less one.
    less = 0 if config.get("checkpoint_format") == "gptq_v2" else 1

    def decode(parts: Mapping[str, Tensor]) -> Tensor:
        codes = _unpacked(parts["qweight"].t(), bits)
        zeros = (_unpacked(parts["qzeros"], bits) + less) & (2**bits - 1)
        scales = parts["scales"].float()
        zeros = zeros[:, : scales.shape[1]]
        size = -(-codes.shape[1] // len(scales))
        group = parts["g_idx"].long() if "g_idx" in parts else torch.arange(codes.shape[1]) // size
        return (codes - zeros.t()[:, group]).float() * scales.t()[:, group]

    return decode


def _awq(config: Mapping[str, Any]) -> Decoding:
    """Codes packed along the outputs in an order of their own."""
    bits, version = int(config.get("bits", 4)), str(config.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise RequestError(f"stored as AWQ {version} of {bits} bits; gemm of 4 bits is read")

    def ordered(words: Tensor) -> Tensor:
        codes = _unpacked(words, 4)
        return codes.unflatten(-1, (-1, 8))[..., list(_AWQ_ORDER)].flatten(-2)

    def decode(parts: Mapping[str, Tensor]) -> Tensor:
        codes, scales = ordered(parts["qweight"]), parts["scales"].float()
        zeros = ordered(parts["qzeros"]) if "qzeros" in parts else torch.full(scales.shape, 8)
        group = torch.arange(len(codes)) // (len(codes) // len(scales))
        return ((codes - zeros[group]).float() * scales[group]).t().contiguous()

    return decode


def _compressed(config: Mapping[str, Any]) -> Decoding:
    """Signed codes packed along the inputs, as the format ``pack-quantized`` of compressed-tensors."""
    widths = {
        int(group["weights"]["num_bits"])
        for group in _schemes(config)
        if isinstance(group.get("weights"), Mapping) and group["weights"].get("num_bits")
    }

    def decode(parts: Mapping[str, Tensor]) -> Tensor:
        rows, columns = (int(size) for size in parts["weight_shape"])
        words = parts["weight_packed"]
        # Groups of layers may have other widths: the one that fits is that of this weight.
        bits = next((b for b in sorted(widths) if 32 % b == 0 and -(-columns * b // 32) == words.shape[1]), 0)
        codes = _unpacked(words, bits)[:, :columns] - 2 ** (bits - 1)
        scales = parts["weight_scale"].float()
        if "weight_g_idx" in parts:
            group = parts["weight_g_idx"].long()
        else:
            group = torch.arange(columns) // -(-columns // scales.shape[1])
        if "weight_zero_point" in parts:
            zeros = parts["weight_zero_point"]
            if zeros.dtype == torch.int32:
                zeros = _unpacked(zeros.t(), bits).t()[:rows] - 2 ** (bits - 1)
            codes = codes - zeros.long()[:, group]
        return codes.float() * scales[:, group]

    return decode


def _scaled(parts: Mapping[str, Tensor]) -> Tensor:
    """Bytes or float8 values with a scale for the matrix, its rows, or blocks of it."""
    values = parts["weight"].float()
    scales = parts.get("weight_scale", parts.get("weight_scale_inv"))
    if scales is None:
        raise RequestError("has codes without a scale")
    scales = scales.float()
    if "weight_zero_point" in parts:
        values = values - _spread(parts["weight_zero_point"].float(), values.shape)
    return values * _spread(scales, values.shape)


def _spread(scales: Tensor, shape: torch.Size) -> Tensor:
    """Scales of blocks as scales of all elements. The last block of a dimension may be smaller."""
    if scales.ndim < 2:
        return scales.reshape(-1, 1) if scales.numel() > 1 else scales.reshape(1, 1)
    for dim, size in enumerate(shape):
        if scales.shape[dim] not in (1, size):
            # Blocks have 128 rows or columns, or divide the matrix.
            block = 128 if -(-size // 128) == scales.shape[dim] else -(-size // scales.shape[dim])
            scales = scales.repeat_interleave(block, dim).narrow(dim, 0, size)
    return scales


def _bitsandbytes_8(parts: Mapping[str, Tensor]) -> Tensor:
    """Bytes with the largest value of every row."""
    return parts["weight"].float() * (parts["SCB"].float()[:, None] / 127)


def _bitsandbytes_4(dtypes: Mapping[str, torch.dtype]) -> list[CodedWeight]:
    """Two codes in a byte, the first in the high bits, with a table of values and a scale for every block."""
    names = [name.removesuffix(".absmax") for name in dtypes if name.endswith(".weight.absmax")]
    return [
        CodedWeight(
            name,
            {
                "weight": name,
                **{other.removeprefix(f"{name}."): other for other in dtypes if other.startswith(f"{name}.")},
            },
            _four,
        )
        for name in names
    ]


def _four(parts: Mapping[str, Tensor]) -> Tensor:
    state = next(value for part, value in parts.items() if part.startswith("quant_state."))
    about = json.loads(bytes(state.tolist()))
    packed = parts["weight"].flatten().long()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()
    scales = parts["absmax"]
    if "nested_absmax" in parts:
        outer = parts["nested_absmax"].float()[torch.arange(len(scales)) // int(about["nested_blocksize"])]
        scales = parts["nested_quant_map"].float()[scales.long()] * outer + float(about["nested_offset"])
    shape = [int(size) for size in about["shape"]]
    blocks = torch.arange(len(codes)) // int(about["blocksize"])
    values = parts["quant_map"].float()[codes] * scales.float()[blocks]
    return values[: torch.Size(shape).numel()].reshape(shape)
