"""Sources: named tensors, and the module that uses them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from octavo.coding.container import DTYPES as INTEGERS
from octavo.errors import RequestError
from octavo.sources.conversions import Conversion
from octavo.sources.modules import own_tensors, state_of
from octavo.sources.narrowing import FLOATS
from octavo.sources.sites import Layout, Site
from octavo.system.ahead import in_order
from octavo.system.raw import raw_bytes
from octavo.system.temporary import TemporaryFolder

#: Called with the amount done and the total.
StepProgress = Callable[[int, int], Any]

#: A smaller weight is kept unchanged: its overhead would cost more than coding saves.
SMALLEST_SITE = 512

#: Dtypes of tensors by their names in safetensors files.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "C64": torch.complex64,
}  # fmt: skip
#: A tensor of zeros and one number of at most this value is an additive mask, even if it is trained.
_MASK = -1e4
#: Weights whose largest element is above this power of two, or below its inverse, are scaled first.
_USUAL = 40
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class Source:
    """A model to compress: named tensors and, if there is one, the module that uses them.

    Parameters
    ----------
    title
        A short name for reports.
    path
        The folder or file it came from, or None for a module in memory.
    shapes, dtypes
        Shape and dtype of every distinct tensor.
    aliases
        Tied names: maps aliases to the name under which the tensor is stored.
    read
        Reads one tensor by name.
    module
        The module, or None for bare tensors. For a folder it is a skeleton until it is run.
    parameters
        Maps tensor names, including tied ones, to the parameter or buffer of ``module`` that contains the tensor.
    conversions
        Tensors that get another shape in ``module``.
    unused
        Tensors that ``module`` does not use.
    fixed
        Tensors stored unchanged, whatever their shape, and why.
    extra
        Plain data stored with tensors, by name (``torch.nn.Module.get_extra_state``).
    unfilled
        Parameters of ``module`` that none of the tensors fills: its own loader gives them random values.
    """

    title: str
    path: Path | None
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    aliases: dict[str, str]
    read: Callable[[str], Tensor]
    module: nn.Module | None = None
    parameters: dict[str, str] = field(default_factory=dict)
    conversions: list[Conversion] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    fixed: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    #: Powers of two near the largest element of weights of unusual size (:attr:`Layout.exponent`).
    exponents: dict[str, int] = field(default_factory=dict, repr=False)
    unfilled: list[str] = field(default_factory=list)
    is_transformers: bool = False
    #: Whether ``module`` is a whole sentence-transformers encoder.
    is_encoder: bool = False
    #: Whether only the transformer of a ``sentence-transformers`` encoder is run.
    transformer_only: bool = False
    #: Bytes of the module's buffers that are not stored, such as tables computed from its configuration.
    unstored: int = 0
    #: Folder of configuration and tokenizer, if not ``path``.
    companions: Path | None = None
    #: Folders that exist as long as this source and all that are made of it.
    temporary: tuple[TemporaryFolder, ...] = field(default=(), repr=False)
    #: Bytes by storage type, if tensors are stored in types that torch lacks.
    stored: dict[str, int] = field(default_factory=dict)
    #: Notes on how the source was read.
    notes: list[str] = field(default_factory=list)
    #: SHA-256 of every tensor's content, from :func:`examine`.
    digests: dict[str, str] = field(default_factory=dict, repr=False)
    #: Tensors that :func:`octavo.calibration.folds.fold` changed. ``read`` gives them; the module holds the originals.
    folded: dict[str, Tensor] = field(default_factory=dict, repr=False)
    #: Whether units were cut so that no config says the shapes of all tensors.
    reshaped: bool = False
    #: The source that lost some of its units to become this one. Bytes, weights and fingerprint are still its own.
    uncut: Source | None = field(default=None, repr=False)
    _direct: tuple[list[Conversion], dict[str, str]] | None = field(default=None, repr=False, init=False)

    @property
    def original(self) -> Source:
        """The source before anything was cut."""
        return self if self.uncut is None else self.uncut

    @property
    def original_bytes(self) -> int:
        """Bytes of the distinct tensors as stored, before anything was cut."""
        return sum(self.stored.values()) or self.original.dense_bytes

    @property
    def dense_bytes(self) -> int:
        """Bytes of the distinct tensors at their dtypes."""
        return sum(math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items())

    @property
    def folder(self) -> Path | None:
        """The folder of configuration and tokenizer, or None."""
        return self.companions or (self.path if self.path is not None and self.path.is_dir() else None)

    @property
    def weights(self) -> int:
        """Number of weights of the model before anything was cut: elements of the distinct tensors."""
        return self.original.elements

    @property
    def elements(self) -> int:
        """Number of elements that are coded, of which there are fewer if weights are products of factors."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and contents; equal sources have equal fingerprints, cut or not."""
        if self.uncut is not None:
            return self.uncut.fingerprint()
        examine(self)
        digest = hashlib.sha256()
        for name in sorted(self.shapes):
            digest.update(f"{name} {self.dtypes[name]} {self.shapes[name]} {self.digests[name]}\n".encode())
        if self.extra:
            digest.update(json.dumps(self.extra, sort_keys=True).encode())
        return digest.hexdigest()

    def every_shape(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, aliases included."""
        return {**self.shapes, **{alias: self.shapes[name] for alias, name in self.aliases.items()}}

    def owner(self, name: str) -> nn.Module | None:
        """The module that holds the tensor ``name``, or None."""
        if self.module is None or name not in self.direct:
            return None
        return self.module.get_submodule(self.direct[name].rpartition(".")[0])

    @property
    def direct(self) -> dict[str, str]:
        """Maps tensor names to names in ``module``, for tensors that keep their shape."""
        if not self.conversions:
            return self.parameters
        known = self._direct
        if known is None or known[0] is not self.conversions:
            converted = {name for conversion in self.conversions for name in conversion.names}
            plain = {name: target for name, target in self.parameters.items() if name not in converted}
            self._direct = known = (self.conversions, plain)
        return known[1]

    @property
    def is_skeleton(self) -> bool:
        """Whether the module has no weights yet."""
        return self.module is not None and any(parameter.is_meta for parameter in self.module.parameters())

    def places(self) -> dict[str, list[tuple[nn.Module, str]]]:
        """The modules that hold each tensor, with its name there, in the order of the model.

        There are several if the tensor is tied. Tensors that change shape in the module are left out.
        """
        if self.module is None:
            return {}
        state = own_tensors(self.module)
        names = {id(state[parameter]): self.aliases.get(name, name) for name, parameter in self.direct.items()}
        result: dict[str, list[tuple[nn.Module, str]]] = {}
        for module in self.module.modules():
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
                if id(tensor) in names:
                    result.setdefault(names[id(tensor)], []).append((module, leaf))
        return result

    def holders(self) -> dict[str, list[nn.Module]]:
        """The modules that hold each tensor, in the order of the model: several if it is tied."""
        return {name: [module for module, _ in places] for name, places in self.places().items()}

    def value(self, name: str, stored: Tensor | None = None) -> Tensor:
        """A tensor of the model, or what it is if ``stored`` takes the place of what is stored of it."""
        return self.read(name) if stored is None else stored

    def placed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module's tensors that change if some tensors of the source are replaced.

        Parameters
        ----------
        weights
            New values by name in the source.
        """
        stored = {parameter: self.aliases.get(name, name) for name, parameter in self.direct.items()}
        given = {own: name for own, name in stored.items() if name in weights}
        # Weights may be decoded only when they are asked for.
        values = in_order(lambda name: self.value(name, weights[name]), given.values())
        result = dict(zip(given, values, strict=True))
        for conversion in self.conversions:
            names = [self.aliases.get(name, name) for name in conversion.names]
            if any(name in weights for name in names):
                parts = (self.value(n, weights[n]) if n in weights else self.value(n) for n in names)
                made = conversion.values([tensor.float() for tensor in parts])
                result.update((target, made[target]) for target in conversion.targets)
        return result

    def sites(self) -> tuple[list[Site], dict[str, str]]:
        """All sites in the order of the source, and the reason for every tensor that is not a site."""
        tied: dict[str, list[str]] = {}
        for alias, name in self.aliases.items():
            tied.setdefault(name, []).append(alias)
        sites, reasons = [], {}
        for name, shape in self.shapes.items():
            dtype = self.dtypes[name]
            if dtype in INTEGERS:
                reasons[name] = "not a floating tensor: coded without loss"
            elif name in self.fixed:
                reasons[name] = self.fixed[name]
            elif dtype not in FLOATS:
                reasons[name] = f"{str(dtype).removeprefix('torch.')} tensor"
            elif len(shape) < 2:
                reasons[name] = f"{len(shape)}-d tensor"
            elif math.prod(shape) < SMALLEST_SITE:
                reasons[name] = f"fewer than {SMALLEST_SITE} weights"
            else:
                kind, layout = self._kind(name, shape)
                layout = replace(layout, exponent=self.exponents.get(name, 0))
                sites.append(Site(name, kind, shape, dtype, layout, tuple(tied.get(name, ()))))
        return sites, reasons

    def layout_of(self, name: str) -> Layout:
        """How a weight is read as a matrix."""
        return self._kind(name, self.shapes[name])[1]

    def _kind(self, name: str, shape: tuple[int, ...]) -> tuple[str, Layout]:
        owner = self.owner(name)
        layer = self._parametrized(name, shape) if isinstance(owner, parametrize.ParametrizationList) else owner
        if isinstance(layer, _CONVOLUTIONS + _TRANSPOSED):
            owner = layer
        if isinstance(owner, _TRANSPOSED):
            return "convolution", Layout("transposed", owner.groups)
        if owner is not None and len(shape) > 2 and not isinstance(owner, _CONVOLUTIONS):
            return "linear", Layout("stacked")
        if isinstance(owner, _CONVOLUTIONS) or (owner is None and len(shape) > 2):
            return "convolution", Layout()
        if type(owner).__name__ == "Conv1D" and len(shape) == 2:
            return "linear", Layout("columns_first")
        if isinstance(owner, nn.Embedding):
            return "embedding", Layout()
        if self.is_transformers and self.module is not None and owner is not None:
            head = getattr(self.module, "get_output_embeddings", lambda: None)()
            if owner is head:
                return "head", Layout()
        # Without a module, only its name distinguishes a token table from a layer.
        return ("embedding" if owner is None and "embed" in name.lower() else "linear"), Layout()

    def _parametrized(self, name: str, shape: tuple[int, ...]) -> nn.Module | None:
        """The layer whose weight is computed from a tensor of the same shape, such as the direction of weight norm."""
        assert self.module is not None
        above, _, leaf = self.direct[name].rpartition(".")[0].rpartition(".parametrizations.")
        layer = self.module.get_submodule(above)
        weight = getattr(layer, leaf, None) if isinstance(layer, _CONVOLUTIONS + _TRANSPOSED) else None
        return layer if isinstance(weight, Tensor) and tuple(weight.shape) == shape else None


def from_module(module: nn.Module, *, title: str | None = None) -> Source:
    """A source from any module in memory; tensors that share their storage are tied."""
    state = state_of(module)
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple, str] = {}
    for name, tensor in state.tensors.items():
        # A transposed view of a square weight has the same address and shape but other strides, so it is a different
        # tensor.
        key = (
            tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()
        )  # fmt: skip
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        tensors[name] = tensor
    if not tensors:
        raise RequestError(
            f"{type(module).__name__}: has no parameters or buffers, so there is nothing to compress; give a module "
            "with weights"
        )
    return Source(
        title=title or type(module).__name__,
        path=None,
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        dtypes={name: tensor.dtype for name, tensor in tensors.items()},
        aliases=aliases,
        # Methods and coders run on the CPU, wherever the module is.
        read=lambda name: tensors[name].detach().cpu(),
        module=module,
        parameters=state.parameters,
        fixed=state.fixed,
        extra=state.extra,
        notes=state.notes,
    )


def examine(source: Source, progress: StepProgress = lambda done, total: None) -> None:
    """Read every tensor once and store the digests of their contents.

    NaN and Inf are refused in weights and in trainable parameters. Masks, buffers and frozen parameters that are not
    weights may hold them and are stored unchanged.

    Raises
    ------
    RequestError
        If a weight holds NaN or Inf; the error names the first and its position.
    """
    names = [name for name in source.shapes if name not in source.digests]
    own = {} if source.module is None else own_tensors(source.module)
    held = {name: own.get(target) for name, target in source.direct.items()}
    buffers = {name for name, tensor in held.items() if not isinstance(tensor, nn.Parameter | None)}
    trained = {name for name, tensor in held.items() if isinstance(tensor, nn.Parameter) and tensor.requires_grad}

    def digest(name: str) -> str:
        tensor = source.read(name).detach()
        if name not in source.fixed and _may_be_site(tensor):
            # NaN and Inf appear in the extremes, which take no memory.
            least, most = map(float, torch.aminmax(tensor))
            if _is_mask(tensor, least, most, trained=name in trained):
                source.fixed[name] = "a mask"
            elif not (math.isfinite(least) and math.isfinite(most)):
                if name not in buffers:
                    raise _not_finite(source, name, tensor)
                source.fixed[name] = "a buffer with values that are not finite"
            elif least < 0 or most > 0:
                exponent = math.frexp(max(-least, most))[1]
                if abs(exponent) > _USUAL:
                    source.exponents[name] = exponent
        elif name in trained and not bool(torch.isfinite(tensor).all()):
            raise _not_finite(source, name, tensor)
        return hashlib.sha256(raw_bytes(tensor)).hexdigest()

    for done, found in enumerate(in_order(digest, names)):
        source.digests[names[done]] = found
        progress(done + 1, len(names))


def _may_be_site(tensor: Tensor) -> bool:
    return tensor.dtype in FLOATS and tensor.ndim >= 2 and tensor.numel() >= SMALLEST_SITE


def _is_mask(tensor: Tensor, least: float, most: float, *, trained: bool) -> bool:
    """Whether a tensor has two values and is no trained weight, or is zero but for very negative entries."""
    if not least < most or (trained and not (least <= _MASK and most == 0)):
        return False
    # A row tells of most tensors that they have more values.
    return all(bool(((part == most) | (part == least)).all()) for part in (tensor[:1], tensor))


def _not_finite(source: Source, name: str, tensor: Tensor) -> RequestError:
    index = tuple(int(i) for i in (~torch.isfinite(tensor)).nonzero()[0])
    return RequestError(
        f"{source.path or source.title}: tensor {name!r} holds {tensor[index].item()} at {index}; weights with NaN or "
        "Inf cannot be compressed, so repair the model first"
    )


def states(source: Source, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the tied names of ``source`` filled in."""
    return {**tensors, **{alias: tensors[name] for alias, name in source.aliases.items() if name in tensors}}
