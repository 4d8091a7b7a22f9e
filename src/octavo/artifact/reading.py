"""Reading artifacts.

Artifacts are untrusted. The checksums of the manifest and of every tensor are verified, and file names may not leave
the folder. Shapes are checked against the file sizes before memory is allocated. Nothing is ever executed.

Files are read and not mapped, since pages of a mapping stay in memory. An artifact is verified tensor by tensor in less
memory than its size.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import octavo.forms as forms
from octavo import coding
from octavo.artifact.configuration import changes, is_configuration
from octavo.artifact.deltas import Delta, find_base
from octavo.artifact.opening import read_headers, read_manifest
from octavo.artifact.packing import DTYPES, check_parts, dtype_name, from_bytes, is_shape, naturals, unpack
from octavo.artifact.writing import BITS, MANIFEST
from octavo.coding import Allowance
from octavo.errors import ArtifactError, RequestError
from octavo.forms.base import allowance_for
from octavo.sources.bases import Base
from octavo.sources.differences import added
from octavo.sources.modules import SUPPORTED
from octavo.sources.narrowing import FLOATS
from octavo.sources.sites import Layout
from octavo.system.raw import narrowed
from octavo.system.tensor_files import Place

#: Decoded weights may take this many times the bytes of the artifact; real artifacts stay far below.
_LARGEST_RATIO = 2000
#: Bytes allowed beyond that, and additional bytes allowed for decoding.
_SLACK, _WORK = 64 << 20, 80 << 20
#: The size of a float64.
_LARGEST_EXPONENT = 1023

#: Dtypes of tensors stored bit for bit.
_EXACT = {dtype_name(dtype): dtype for dtype in SUPPORTED}

#: Makes a weight of some shape and dtype that runs from its form, which the layout reads it as.
AsWeight = Callable[[forms.Form, Layout, tuple[int, ...], torch.dtype], Tensor]


class Artifact:
    """An artifact on disk, opened for reading.

    Raises
    ------
    ArtifactError
        If anything in it is damaged, unknown or implausible.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self._tensors = read_headers(self.path, _mapping(self.manifest, "files"))
        self.sites: Mapping[str, Any] = _mapping(self.manifest, "sites")
        self.kept: Mapping[str, Any] = _mapping(self.manifest, "kept")
        self.coded: Mapping[str, Any] = _mapping(self.manifest, "coded")
        self.aliases: Mapping[str, Any] = _mapping(self.manifest, "aliases")
        #: Coded tensors that are not integers: the dtype of their bits, and the dtype to return.
        self.bits: Mapping[str, Any] = _mapping({"bits": {}, **self.manifest}, "bits")
        #: Plain data that the source stored with its tensors.
        self.extra: Mapping[str, Any] = _mapping({"extra": {}, **self.manifest}, "extra")
        #: Bytes and checksums of the configuration files, by relative path.
        self.configurations: Mapping[str, Any] = _mapping({"configurations": {}, **self.manifest}, "configurations")
        for name, entry in self.configurations.items():
            if not (is_configuration(name) and isinstance(entry, list) and len(entry) == 2 and naturals(entry)):
                raise ArtifactError(f"{self.path}: the manifest's entry of the configuration {name!r} is malformed")
        #: Parameter names that neither the source nor the artifact fills; None if not recorded.
        self.unfilled: list[str] | None = self.manifest.get("unfilled")
        if self.unfilled is not None and not _are_words(self.unfilled):
            raise ArtifactError(f"{self.path}: the manifest's 'unfilled' is not a list of names")
        #: Whether the shapes of tensors are not those that the config says, since units were cut.
        self.reshaped: bool = self.manifest.get("reshaped", False)
        if not isinstance(self.reshaped, bool):
            raise ArtifactError(f"{self.path}: the manifest's 'reshaped' is not true or false")
        #: Aliases that also appear in the files under their own name.
        self.named = self._take_named()
        #: The base that this is a delta of; None if all tensors are stored.
        self.delta = self._take_delta()
        named = [*self.sites, *self.kept, *self.coded]
        if set(named) != set(self._tensors) or len(named) != len(self._tensors):
            odd = sorted(set(named) ^ set(self._tensors))[:3]
            raise ArtifactError(f"{self.path}: manifest and files name different tensors: {', '.join(odd)}")
        for alias, name in self.aliases.items():
            if not isinstance(name, str) or name not in {*self._tensors, *self.same} or alias in self._tensors:
                raise ArtifactError(f"{self.path}: {alias!r} cannot be tied to {name!r}")
        #: Bytes that decoding may take besides the decoded tensors.
        self._work = _LARGEST_RATIO * self.bytes + _SLACK + _WORK - self._check_entries()

    @property
    def bytes(self) -> int:
        """Bytes of all files needed to restore the weights, by ``stat``."""
        return sum(file.stat().st_size for file in self.files())

    @property
    def resident(self) -> int | None:
        """Bytes of all tensors while the model runs packed, from the manifest; None if it was made for disk."""
        return self.manifest.get("resident")

    @property
    def is_plain(self) -> bool:
        """Whether every loader of safetensors files reads its tensors as they are."""
        return not (self.sites or self.coded or self.named or self.reshaped or self.delta)

    @property
    def same(self) -> Sequence[str]:
        """Names of the tensors that a delta takes from its base as they are; none of another artifact."""
        return () if self.delta is None else self.delta.same

    @cached_property
    def base(self) -> Base:
        """The base of a delta, found as :func:`octavo.artifact.deltas.find_base` does; its fingerprint is checked."""
        assert self.delta is not None
        rests = [*self.same, *(name for name in self._tensors if name not in self.delta.whole)]
        base = find_base(self.path, self.delta, rests)
        shapes = self._shapes()
        for name in rests:
            if name in shapes and base.shape(name) != shapes[name]:
                raise ArtifactError(
                    f"{self.path}: tensor {name!r} has shape {list(shapes[name])}, and {base.shape(name)} in the base; "
                    "they do not belong together, so copy the artifact again"
                )
        return base

    def files(self) -> list[Path]:
        """The files that count as artifact bytes."""
        return [self.path / name for name in (MANIFEST, *self.manifest["files"])]

    def changed(self) -> list[str]:
        """Configuration files that were changed since writing, each with the kind of change."""
        return changes(self.path, self.configurations) if "configurations" in self.manifest else []

    def names(self) -> list[str]:
        """Names of all stored tensors; tied tensors have one name."""
        return list(self._tensors)

    def content(self, name: str) -> memoryview:
        """The raw bytes of a stored tensor, with verified checksum."""
        crc = self.sites[name].get("crc") if name in self.sites else (self.coded.get(name) or self.kept[name])[0]
        content = memoryview(self._tensors[name].content().numpy())  # type: ignore[arg-type]
        if zlib.crc32(content) != crc:
            raise ArtifactError(f"{self.path}: tensor {name!r} is damaged (checksum mismatch); copy the artifact again")
        return content

    def form(self, name: str) -> forms.Form:
        """The form of a site, with verified checksum."""
        entry = self.sites[name]
        matrix = self.layout(name).matrix_shape(_shape(name, entry))
        content = self.content(name)
        try:
            return unpack(content, entry["parts"], entry["form"], matrix, self._allowance(matrix))
        except ArtifactError as error:
            raise ArtifactError(f"{self.path}: site {name!r}: {error}") from error

    def layout(self, name: str) -> Layout:
        """The layout that maps the weight of a site to the matrix of its form."""
        return _layout(name, self.sites[name])

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a site in the source, to which its weight is rounded."""
        return _dtype(name, self.sites[name].get("dtype"))

    def weight(self, name: str, as_weight: AsWeight) -> Tensor:
        """A site as a weight that runs from its form; other tensors and scaled weights as in the source."""
        if name not in self.sites or self.layout(name).exponent:
            return self.tensor(name)
        entry = self.sites[name]
        return as_weight(self.form(name), self.layout(name), _shape(name, entry), _dtype(name, entry.get("dtype")))

    def tensor(self, name: str) -> Tensor:
        """A tensor as in the source: shape, dtype and name; of a delta that of the tuned model."""
        if self.delta is None or name in self.delta.whole:
            return self.stored(name)
        if name in self.same:
            return self.base.read(name).clone()
        return added(self.base.read(name), self.stored(name), self.delta.dtype)

    def stored(self, name: str) -> Tensor:
        """What is stored of a tensor: the tensor itself, or its difference to that of the base."""
        if name in self.sites:
            entry = self.sites[name]
            matrix = self.form(name).dense()
            weight = self.layout(name).from_matrix(matrix, _shape(name, entry))
            return narrowed(weight, _dtype(name, entry.get("dtype")))
        if name in self.bits:
            return self._of_bits(name)
        if name in self.coded:
            return self._decoded(name)
        place = self._tensors[name]
        return from_bytes(self.content(name), place.dtype, place.shape).to(_EXACT[self.kept[name][1]])

    def _of_bits(self, name: str) -> Tensor:
        """A tensor whose bits were coded as integers."""
        shape, (stored, dtype) = self.coded[name][1:], (_EXACT[word] for word in self.bits[name])
        count, bits = math.prod(shape), self._decoded(name)
        return (bits.view(stored).reshape(shape) if count else torch.zeros(shape, dtype=stored)).to(dtype)

    def state(self, names: Iterable[str] | None = None, *, as_weight: AsWeight | None = None) -> dict[str, Tensor]:
        """All tensors; tied names share one tensor. Sites are decoded in parallel.

        Parameters
        ----------
        names
            Those that are wanted; all by default.
        as_weight
            What sites are, such as :func:`octavo.runtimes.packed.packed_weight`; decoded by default.
        """
        read = self.tensor if as_weight is None else partial(self.weight, as_weight=as_weight)
        # Largest first, so that the largest is not decoded alone at the end.
        wanted = [*self._tensors, *self.same] if names is None else list(names)
        order = sorted(wanted, key=lambda name: -self._tensors[name].length if name in self._tensors else 0)
        if self.delta is not None:
            if as_weight is not None:
                raise RequestError(f"{self.path}: is a delta, which has no packed codes of the model; leave packed out")
            # Looked for here: threads do not know what the caller gave.
            self.base  # noqa: B018
        threads = self._threads(order)
        before = torch.get_num_threads()
        # One thread per site: operations that use several threads would wait for each other.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            tensors = dict(zip(order, pool.map(read, order), strict=True))
        torch.set_num_threads(before)
        return {**tensors, **{alias: tensors[name] for alias, name in self.aliases.items() if name in tensors}}

    def _allowance(self, matrix: tuple[int, int]) -> Allowance:
        """Memory that decoding a site may take: limited by its shape and by the artifact's size."""
        return Allowance(min(allowance_for(matrix).bytes, self._work))

    def _threads(self, names: Iterable[str]) -> int:
        """How many sites are decoded at a time, limited by the memory that the artifact justifies."""
        shapes = (
            self.layout(name).matrix_shape(_shape(name, self.sites[name])) for name in names if name in self.sites
        )
        largest = max((allowance_for(shape).bytes for shape in shapes), default=1)
        return max(1, min(torch.get_num_threads(), self._work // largest))

    def _decoded(self, name: str) -> Tensor:
        """The integers of a coded tensor, or its bits as integers."""
        return coding.decode(self.content(name), allowance=Allowance(self._work))

    def loadable_shapes(self) -> dict[str, tuple[int, ...]]:
        """Decoded shapes of all tensors that a loader finds in the files; a delta needs its base to tell them."""
        shapes = self._shapes()
        if self.delta is not None:
            shapes.update((name, self.base.shape(name) or ()) for name in self.same)
        return {**shapes, **{alias: shapes[self.aliases[alias]] for alias in self.named}}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Decoded shapes of what is stored."""
        shapes = {name: tuple(entry["shape"]) for name, entry in self.sites.items()}
        shapes.update((name, tuple(entry[1:])) for name, entry in self.coded.items())
        shapes.update((name, self._tensors[name].shape) for name in self.kept)
        return shapes

    def _take_delta(self) -> Delta | None:
        """Remove the tensors that a delta takes from its base from those that are stored."""
        if "base" not in self.manifest:
            return None
        stored = {*self.sites, *self.kept, *self.coded}
        same = [name for name in self._tensors if name not in stored and _is_empty(self._tensors[name])]
        for name in same:
            del self._tensors[name]
        delta = Delta.read(self.manifest["base"], same)
        unknown = sorted(set(delta.whole) - set(self._tensors))
        if unknown:
            raise ArtifactError(f"{self.path}: the manifest says that {unknown[0]!r} is whole, which is not stored")
        return delta

    def _take_named(self) -> list[str]:
        """Remove the aliases that appear in the files without content, for other loaders."""
        places = {alias: self._tensors.get(alias) for alias in self.aliases}
        named = [alias for alias, place in places.items() if place and _is_empty(place)]
        for alias in named:
            del self._tensors[alias]
        return named

    def _check_entries(self) -> int:
        """Refuse malformed entries and implausible sizes before any memory is allocated.

        Returns the bytes of all decoded tensors.
        """
        source = _mapping(self.manifest, "source")
        sizes = [source.get(key) for key in ("bytes", "weights")]
        words = [self.manifest.get("octavo"), *(source.get(key) for key in ("title", "fingerprint"))]
        resident = [] if self.resident is None else [self.resident]
        if not (naturals([*sizes, *resident]) and all(sizes)) or not all(isinstance(word, str) for word in words):
            raise ArtifactError(f"{self.path}: the manifest lacks the source or the version of Octavo")
        total = 0
        for name, entry in self.sites.items():
            shape = _shape(name, entry)
            _layout(name, entry)
            if not _dtype(name, entry.get("dtype")).is_floating_point:
                raise ArtifactError(f"{self.path}: site {name!r} has dtype {entry['dtype']}; expected floats")
            kind = entry["form"].get("form") if isinstance(entry.get("form"), dict) else None
            if not isinstance(kind, str) or kind not in forms.FORMS:
                raise ArtifactError(f"{self.path}: site {name!r} has the unknown form {kind!r}")
            try:
                check_parts(entry.get("parts"), self._tensors[name].length)
            except ArtifactError as error:
                raise ArtifactError(f"{self.path}: site {name!r}: {error}") from error
            total += math.prod(shape) * DTYPES[entry["dtype"]].itemsize
        for name, entry in self.kept.items():
            if not isinstance(entry, list) or len(entry) != 2:
                raise ArtifactError(f"{self.path}: the manifest entry of {name!r} is malformed")
            self._check_pair(name, self._tensors[name].dtype, entry[1])
            # Other loaders read these tensors directly and check nothing.
            self.content(name)
            total += math.prod(self._tensors[name].shape) * _EXACT[entry[1]].itemsize
        for name, entry in self.bits.items():
            words = entry if isinstance(entry, list) and len(entry) == 2 else [None, None]
            if name not in self.coded or not isinstance(words[0], str) or words[0] not in _EXACT:
                raise ArtifactError(f"{self.path}: the bits of {name!r} have dtype {words[0]!r}")
            self._check_pair(name, _EXACT[words[0]], words[1])
        total += sum(self._check_coded(name, entry) for name, entry in self.coded.items())
        if set(self.extra) & {*self._tensors, *self.aliases}:
            raise ArtifactError(f"{self.path}: the manifest stores data under the name of a tensor")
        if total > _LARGEST_RATIO * self.bytes + _SLACK:
            raise ArtifactError(
                f"{self.path}: refused, as it claims {total} bytes of weights in {self.bytes} bytes of files, more "
                f"than {_LARGEST_RATIO} times compressed"
            )
        return total

    def _check_coded(self, name: str, entry: Any) -> int:
        """The bytes of a coded tensor and of its integers; its head must match the manifest."""
        if not (isinstance(entry, list) and entry and naturals(entry[:1]) and is_shape(entry[1:])):
            raise ArtifactError(f"{self.path}: the manifest entry of {name!r} is malformed")
        head, shape, given = coding.describe(self.content(name)), tuple(entry[1:]), 0
        dtype = head.dtype
        if name in self.bits:
            stored, back = (_EXACT[word] for word in self.bits[name])
            dtype, given = BITS.get(stored.itemsize, torch.int64), math.prod(shape) * back.itemsize
            shape = (math.prod(shape) * stored.itemsize // dtype.itemsize,)
        if (head.dtype, head.shape) != (dtype, shape):
            raise ArtifactError(
                f"{self.path}: {name!r} decodes to {list(head.shape)} of {head.dtype}, expected {list(shape)} of "
                f"{dtype}"
            )
        return head.elements * dtype.itemsize + given

    def _check_pair(self, name: str, stored: torch.dtype, given: Any) -> None:
        """Floats may be stored in another precision; other dtypes are returned as stored."""
        dtype = _EXACT.get(given) if isinstance(given, str) else None
        if dtype is None or (dtype != stored and not {dtype, stored} <= {*FLOATS}):
            raise ArtifactError(f"{self.path}: {name!r} has dtype {given!r}, but is stored as {dtype_name(stored)}")


def _is_empty(place: Place) -> bool:
    """Whether a tensor stands in a file for its name alone."""
    return (place.dtype, place.shape) == (torch.uint8, (0,))


def _are_words(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _mapping(manifest: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = manifest.get(key)
    if not isinstance(value, dict):
        raise ArtifactError(f"the manifest has no {key!r}")
    return value


def _shape(name: str, entry: Any) -> tuple[int, ...]:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or not is_shape(shape) or len(shape) < 2 or 0 in shape:
        raise ArtifactError(f"site {name!r} has shape {str(shape)[:80]}")
    return tuple(shape)


def _layout(name: str, entry: Mapping[str, Any]) -> Layout:
    layout, shape = entry.get("layout", ["rows_first", 1]), _shape(name, entry)
    parts = layout if isinstance(layout, list) and len(layout) in (2, 3) else [None, 0]
    kind, groups, exponent = [*parts, 0][:3]
    whole = naturals([groups]) and groups > 0 and (groups == 1 or (kind == "transposed" and shape[0] % groups == 0))
    if (
        kind not in ("rows_first", "columns_first", "transposed", "stacked")
        or not whole
        or type(exponent) is not int
        or abs(exponent) > _LARGEST_EXPONENT
        or (kind == "columns_first" and len(shape) != 2)
    ):
        raise ArtifactError(f"site {name!r} has layout {layout!r} for shape {list(shape)}")
    return Layout(kind, groups, exponent)


def _dtype(name: str, dtype: Any) -> torch.dtype:
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ArtifactError(f"{name!r} has dtype {dtype!r}")
    return DTYPES[dtype]
