"""Model folders in the pack-quantized format of compressed-tensors: what a weight takes, and how it is written.

A weight of 4 or 8 bits is three tensors: ``weight_packed``, (rows, words) with codes in 32-bit words, the first code in
the lowest bits, each shifted to be positive; ``weight_scale``, (rows, groups); and ``weight_shape``. The configuration
lists the modules of every kind. Names and shapes tell the exact bytes of both files before anything is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.artifact import Packed
from octavo.artifact.packing import DTYPES
from octavo.errors import MissingExtraError
from octavo.forms import Dense, Form, Grid

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = "pack-quantized"
#: A tensor of a file without its content: dtype and shape.
TensorOutline = tuple[torch.dtype, tuple[int, ...]]
#: Names of dtypes in safetensors files, in its order of writing.
_CODES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64", torch.float32: "F32",
    torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16",
    torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
#: Bits of codes that the kernels of vLLM and SGLang run.
_BITS = (4, 8)
_WORD = 32


def require_compressed_tensors() -> Any:
    """The package; raises an error that explains how to install it."""
    try:
        import compressed_tensors
    except ImportError as error:
        raise MissingExtraError(
            "--for compressed-tensors needs the package of that name, which is not installed: pip install "
            "'octavo[compressed-tensors]'"
        ) from error
    return compressed_tensors


def gains(form: Form) -> int:
    """Factors of a row that :func:`scaled` takes: one for each of its scales."""
    return form.scale.shape[1] if isinstance(form, Grid) else 1


def scaled(form: Form, factors: Tensor) -> Form:
    """A form multiplied by factors (rows, groups) of its scales; floats stay as they are."""
    if not isinstance(form, Grid):
        return form
    scale = (form.scale.float() * factors).to(form.scale.dtype)
    return form if torch.equal(scale, form.scale) else replace(form, scale=scale)


@dataclass(frozen=True)
class PackQuantized:
    """How a weight is stored.

    Parameters
    ----------
    bits
        Bits of a code; 0 for floats.
    groups
        Scales of a row.
    dtype
        That of the scales, or of the floats.
    """

    bits: int
    groups: int
    dtype: torch.dtype

    @classmethod
    def of_form(cls, form: Form) -> PackQuantized:
        """How a form is stored."""
        if isinstance(form, Dense):
            return cls(0, 0, form.weight.dtype)
        assert isinstance(form, Grid)
        low, high = (int(bound) for bound in torch.aminmax(form.codes))
        bits = next(bits for bits in _BITS if -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1))
        return cls(bits, form.scale.shape[1], form.scale.dtype)

    @classmethod
    def of_packed(cls, packed: Packed, shape: tuple[int, int]) -> PackQuantized:
        """How a packed form of a shape is stored, from its sizes alone."""
        if "weight" in packed.parts:
            return cls(0, 0, DTYPES[packed.parts["weight"][2]])
        dtype = DTYPES[packed.parts["scale"][2]]
        assert packed.resident is not None
        # Of a form found for a sample of rows only the counted bytes are those of the whole matrix. They tell one kind
        # from another, since a row's scales take as many bytes as are left beside its codes.
        for bits in _BITS:
            left = packed.resident - cls(bits, 0, dtype).bytes(shape)
            groups, rest = divmod(left, shape[0] * dtype.itemsize)
            if groups > 0 and rest == 0 and shape[1] % groups == 0:
                return cls(bits, groups, dtype)
        raise ValueError(f"{packed.resident} bytes are not those of a weight of shape {shape}")

    def outlines(self, name: str, shape: tuple[int, int]) -> dict[str, TensorOutline]:
        """The tensors of a weight of that name and shape."""
        if not self.bits:
            return {name: (self.dtype, shape)}
        words = math.ceil(shape[1] * self.bits / _WORD)
        return {
            f"{name}_packed": (torch.int32, (shape[0], words)),
            f"{name}_scale": (self.dtype, (shape[0], self.groups)),
            f"{name}_shape": (torch.int64, (2,)),
        }

    def bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of its tensors."""
        return sum(map(_bytes, self.outlines("", shape).values()))

    def tensors(self, name: str, form: Form) -> dict[str, Tensor]:
        """The tensors of a weight with their content."""
        if isinstance(form, Dense):
            return {name: form.weight.contiguous()}
        assert isinstance(form, Grid)
        require_compressed_tensors()
        from compressed_tensors.compressors.pack_quantized import pack_to_int32

        return {
            f"{name}_packed": pack_to_int32(form.codes.to(torch.int8), self.bits),
            f"{name}_scale": form.scale.contiguous(),
            f"{name}_shape": torch.tensor(form.shape),
        }

    def words(self, columns: int) -> str:
        """Words for a report: ``4 bits, groups of 64``."""
        if not self.bits:
            return str(self.dtype).removeprefix("torch.")
        return f"{self.bits} bits, " + ("a scale a row" if self.groups == 1 else f"groups of {columns // self.groups}")


def file_bytes(outlines: Mapping[str, TensorOutline]) -> int:
    """Bytes of a safetensors file of such tensors, as the library writes it."""
    order = sorted(outlines, key=lambda name: (list(_CODES).index(outlines[name][0]), name.encode()))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        stop = start + _bytes(outlines[name])
        header[name] = {"dtype": _CODES[outlines[name][0]], "shape": outlines[name][1], "data_offsets": [start, stop]}
        start = stop
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + length + -length % 8 + start


def _bytes(outline: TensorOutline) -> int:
    return math.prod(outline[1]) * outline[0].itemsize


def config_text(
    config: Mapping[str, Any], modules: Mapping[str, tuple[PackQuantized, int]], ignore: Iterable[str]
) -> bytes:
    """The configuration of a model whose modules are stored in some way.

    Parameters
    ----------
    config
        The model's own configuration.
    modules
        How the weights of modules are stored, with the number of their columns, by the modules' names.
    ignore
        Names of other modules with weights.
    """
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    kinds: dict[tuple[int, int | None], list[str]] = {}
    floats = list(ignore)
    for name, (stored, columns) in modules.items():
        group = None if stored.groups <= 1 else columns // stored.groups
        (kinds.setdefault((stored.bits, group), []) if stored.bits else floats).append(name)
    if kinds:
        config["quantization_config"] = _quantization(kinds, sorted(floats))
    return (json.dumps(config, indent=2) + "\n").encode()


def _quantization(kinds: Mapping[tuple[int, int | None], list[str]], ignore: list[str]) -> dict[str, Any]:
    package = require_compressed_tensors()
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    def scheme(bits: int, group: int | None, targets: list[str]) -> Any:
        strategy = "channel" if group is None else "group"
        weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy=strategy, group_size=group)
        return QuantizationScheme(targets=targets, weights=weights, format=FORMAT)

    # Modules are named one by one: a runtime that joins layers, such as q, k and v, finds each part.
    groups = {
        f"w{bits}-{'row' if group is None else group}": scheme(bits, group, names)
        for (bits, group), names in sorted(kinds.items(), key=lambda item: (item[0][0], item[0][1] or 0))
    }
    made = QuantizationConfig(
        config_groups=groups, format=FORMAT, quantization_status=QuantizationStatus.COMPRESSED, ignore=ignore
    )
    return {"version": package.__version__, **json.loads(made.model_dump_json())}


def write_file(folder: Path, tensors: Mapping[str, Tensor], config: bytes) -> None:
    """Write both files of a model."""
    from safetensors.torch import save_file

    save_file(dict(tensors), folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_bytes(config)
