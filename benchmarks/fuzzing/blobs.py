"""Changes of coded blobs and of the parts of sites, under checksums that fit."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fuzzing.draft import Draft, Inapplicable, mutation, pick
from octavo import coding
from octavo.coding.container import CHUNK, CODECS, DTYPES, NARROW, assemble
from octavo.coding.fields import Reader, Writer
from octavo.coding.layout import StreamLayout
from octavo.errors import ArtifactError

_VARINTS = [0, 1, 2, 3, 6, 7, 16, 17, 63, 64, 127, 128, 255, 256, 257, 1 << 16, 1 << 20, 1 << 24, 1 << 31, 1 << 32, (1 << 62) - 1, 1 << 63,
            (1 << 64) - 1, (1 << 70) - 1]  # fmt: skip


#: Elements of a tensor that is coded again.
_FEW = 100_000


@dataclass
class Blob:
    """A coded blob as its fields; `tables` is a list of pairs of kind and value."""

    version: int
    codec: int
    types: int
    shape: list[int]
    chunks: list[bytes]
    tables: list[list]
    count: int | None = None
    lengths: list[int] | None = None

    @classmethod
    def read(cls, content: bytes) -> Blob:
        """Take an honest blob apart."""
        version, codec, types, dimensions, head, _ = struct.unpack("<BBBBII", content[:12])
        reader = Reader(memoryview(content)[12:head])
        shape = [reader.unsigned() for _ in range(dimensions)]
        lengths = []
        for _ in range(reader.unsigned()):
            lengths.append(reader.unsigned())
            reader.take(4)
        chunks, at = [], head
        for length in lengths:
            chunks.append(content[at : at + length])
            at += length
        return cls(version, codec, types, shape, chunks, _tables(CODECS[codec], shape, reader))

    def write(self) -> bytes:
        """The blob, its checksums right."""
        writer = Writer()
        for length in self.shape:
            writer.unsigned(length)
        writer.unsigned(len(self.chunks) if self.count is None else self.count)
        lengths = self.lengths or [len(chunk) for chunk in self.chunks]
        for length, chunk in zip(lengths, self.chunks, strict=True):
            writer.unsigned(length)
            writer.data += zlib.crc32(chunk).to_bytes(4, "little")
        for kind, value in self.tables:
            if kind == "varint":
                writer.unsigned(value)
            elif kind == "block":
                writer.block(value)
            else:
                writer.data += value
        fixed = struct.pack(
            "<BBBBI", self.version, self.codec, self.types, len(self.shape) & 255, 12 + len(writer.data)
        )
        crc = zlib.crc32(writer.data, zlib.crc32(fixed))
        return b"".join([fixed, crc.to_bytes(4, "little"), writer.data, *self.chunks])


def _tables(codec: str, shape: list[int], reader: Reader) -> list[list]:
    found: list[list] = []

    def varint() -> int:
        found.append(["varint", reader.unsigned()])
        return found[-1][1]

    def block() -> bytes:
        found.append(["block", bytes(reader.block())])
        return found[-1][1]

    if codec in ("huffman", "ans"):
        streams, sizes = varint(), [1]
        if streams:
            merge, base = varint(), varint()
            rows, columns = (coding.decode(block()).numpy() for _ in range(2))
            sizes = StreamLayout(rows, columns, merge, base, streams).sizes
        for size in sizes:
            if size:
                varint()
                span = varint()
                if codec == "ans":
                    found.append(["bytes", bytes(reader.take(span))])
        if varint():
            block(), block()
    found.append(["bytes", bytes(reader.data)])
    return found


def _broken(content: bytes, rng: random.Random, depth: int = 0) -> bytes:
    """A blob with one or two fields changed."""
    blob = Blob.read(content)
    for _ in range(rng.choice([1, 1, 1, 2])):
        what = rng.choice(
            [
                "shape",
                "shape",
                "type",
                "codec",
                "chunk",
                "chunks",
                "count",
                "length",
                "tables",
                "tables",
                "tables",
                "version",
            ]
        )
        if what == "shape":
            _break_shape(blob, rng)
        elif what == "type":
            blob.types = rng.choice([rng.randrange(256), rng.randrange(len(DTYPES)) | rng.randrange(len(NARROW)) << 4])
        elif what == "codec":
            blob.codec = rng.choice([0, 1, 2, 3, 4, 255])
        elif what == "version":
            blob.version = rng.choice([0, 2, 255])
        elif what == "chunk" and blob.chunks:
            _break_chunk(blob, rng)
        elif what == "chunks":
            blob.chunks = rng.choice(
                [[], blob.chunks * 2, blob.chunks[:-1], [*blob.chunks, b""], [b""] * 3000, blob.chunks[::-1]]
            )
            blob.lengths = None
        elif what == "count":
            blob.count = rng.choice(_VARINTS)
        elif what == "length" and blob.chunks:
            blob.lengths = [len(chunk) for chunk in blob.chunks]
            blob.lengths[rng.randrange(len(blob.lengths))] = rng.choice(_VARINTS)
        else:
            _break_tables(blob, rng, depth)
    return blob.write()


def _break_shape(blob: Blob, rng: random.Random) -> None:
    what = rng.choice(["one", "more", "fewer", "turn", "many"])
    if what == "one" and blob.shape:
        blob.shape[rng.randrange(len(blob.shape))] = rng.choice(_VARINTS)
    elif what == "more":
        blob.shape.insert(rng.randrange(len(blob.shape) + 1), rng.choice([0, 1, 2, 1 << 40]))
    elif what == "fewer" and blob.shape:
        blob.shape.pop()
    elif what == "many":
        blob.shape += [1] * rng.choice([31, 32, 60, 64, 200])
    else:
        blob.shape.reverse()


def _break_chunk(blob: Blob, rng: random.Random) -> None:
    at = rng.randrange(len(blob.chunks))
    chunk = bytearray(blob.chunks[at])
    what = rng.choice(["flip", "cut", "grow", "random", "frame"])
    if what == "flip" and chunk:
        for _ in range(rng.choice([1, 1, 4])):
            chunk[rng.randrange(len(chunk))] ^= rng.randrange(1, 256)
    elif what == "cut":
        chunk = chunk[: rng.randrange(len(chunk) + 1)]
    elif what == "grow":
        chunk += rng.randbytes(rng.choice([1, 4, 8]))
    elif what == "random":
        chunk = bytearray(rng.randbytes(rng.choice([0, 1, 4, 40])))
    else:
        # A zstd frame's header that claims an enormous content, or a window.
        chunk = (
            bytearray(
                bytes([rng.choice([0xE0, 0xA0, 0x60, 0x00, 0xC0])])
                + rng.choice([1 << 62, 1 << 31, 5]).to_bytes(8, "little")
            )
            + chunk
        )
    blob.chunks[at] = bytes(chunk)
    blob.lengths = None


def _break_tables(blob: Blob, rng: random.Random, depth: int) -> None:
    entry = rng.choice(blob.tables)
    if entry[0] == "varint":
        entry[1] = rng.choice([*_VARINTS, entry[1] + 1, max(entry[1] - 1, 0), entry[1] ^ 1])
    elif entry[0] == "block":
        what = rng.choice(["broken", "broken", "constant", "self", "empty"])
        if what == "broken" and depth < 3:
            entry[1] = _broken(entry[1], rng, depth + 1)
        elif what == "constant":
            entry[1] = constant(rng.choice([1, 140, 1 << 20, 1 << 24]), rng)
        else:
            entry[1] = blob.write() if what == "self" and depth < 3 else b""
    else:
        data = bytearray(entry[1])
        for _ in range(min(len(data), 3)):
            data[rng.randrange(len(data))] = rng.choice([0, 255, rng.randrange(256)])
        entry[1] = bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.2 else data)


def constant(
    elements: int,
    rng: random.Random,
    shape: tuple[int, ...] | None = None,
    low: int = 0,
    dtype: torch.dtype | None = None,
) -> bytes:
    """A blob of equal elements, as many as are asked for in hardly any bytes."""
    tables = low.to_bytes(8, "little", signed=True) + bytes(1)
    dtype = dtype or rng.choice([torch.uint8, torch.int64, torch.int32, torch.bool])
    chunks = [b""] * min(-(-elements // CHUNK), 4000)
    return assemble("bits", dtype, shape or (elements,), NARROW[0], tables, chunks)


def coded_part(draft: Draft, rng: random.Random) -> tuple[bytes, Callable[[bytes], None]]:
    """A coded blob of the artifact, and what puts another in its place."""
    sites = draft.manifest["sites"]
    places: list[tuple[str, str | None]] = [(name, None) for name in draft.coded()]
    places += [(name, part) for name, site in sites.items() for part, entry in site["parts"].items() if len(entry) == 2]
    name, part = pick(rng, places)
    if part is None:
        return draft.content(name), lambda content: draft.replace(name, content)
    start, length = sites[name]["parts"][part]
    return draft.content(name)[start : start + length], lambda content: replace_part(draft, name, part, content)


def replace_part(draft: Draft, name: str, part: str, content: bytes, kind: list | None = None) -> None:
    """Give a part of a site other bytes."""
    parts, whole = draft.manifest["sites"][name]["parts"], draft.content(name)
    found = {key: (whole[entry[0] : entry[0] + entry[1]], entry[2:]) for key, entry in parts.items()}
    found[part] = (content, found[part][1] if kind is None else kind)
    write_parts(draft, name, found)


def write_parts(draft: Draft, name: str, found: dict[str, tuple[bytes, list]]) -> None:
    """Give a site these parts."""
    at, parts = 0, {}
    for key, (content, kind) in found.items():
        parts[key] = [at, len(content), *kind]
        at += len(content)
    draft.manifest["sites"][name]["parts"] = parts
    draft.replace(name, b"".join(content for content, _ in found.values()))


@mutation("blob: field", weight=24)
def _field(draft: Draft, rng: random.Random) -> None:
    content, put = coded_part(draft, rng)
    put(_broken(content, rng))


@mutation("blob: byte", weight=8)
def _byte(draft: Draft, rng: random.Random) -> None:
    content, put = coded_part(draft, rng)
    data = bytearray(content)
    for _ in range(rng.choice([1, 2, 5])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    head = struct.unpack_from("<I", data, 4)[0]
    if 12 <= head <= len(data):
        struct.pack_into("<I", data, 8, zlib.crc32(data[12:head], zlib.crc32(data[:8])))
    put(bytes(data))


@mutation("blob: other values", weight=10)
def _values(draft: Draft, rng: random.Random) -> None:
    """What another writer could have meant: any integers of the same shape."""
    content, put = coded_part(draft, rng)
    if coding.describe(content).elements > _FEW:
        raise Inapplicable("takes long to code")
    try:
        tensor = coding.decode(content)
    except ArtifactError as error:
        raise Inapplicable(str(error)) from error
    flat = tensor.clone().reshape(-1)
    if not flat.numel():
        raise Inapplicable("no elements")
    limits = (0, 1) if flat.dtype == torch.bool else (torch.iinfo(flat.dtype).min, torch.iinfo(flat.dtype).max)
    value = rng.choice([*limits, 0, 1, min(7, limits[1]), rng.randint(*limits)])
    if rng.random() < 0.5:
        flat[rng.randrange(len(flat))] = value
    else:
        flat.fill_(value)
    dtype = rng.choice([flat.dtype, flat.dtype, torch.int64, torch.uint8])
    put(coding.encode(flat.reshape(tensor.shape).to(dtype)))


@mutation("blob: of one value", weight=6)
def _constant(draft: Draft, rng: random.Random) -> None:
    content, put = coded_part(draft, rng)
    shape = coding.describe(content).shape
    dtype = coding.describe(content).dtype
    size = rng.choice([1, 1000, 1 << 20, 1 << 24, 1 << 26, 1 << 30])
    put(
        constant(
            size,
            rng,
            rng.choice([None, shape, (1, size), (size, 1)]),
            rng.choice([0, 1, -1, 255]),
            rng.choice([None, dtype]),
        )
    )


@mutation("parts: floats", weight=6)
def _floats(draft: Draft, rng: random.Random) -> None:
    sites = draft.manifest["sites"]
    name, part = pick(
        rng, [(n, p) for n, site in sites.items() for p, entry in site["parts"].items() if len(entry) > 2]
    )
    start, length, dtype, *shape = sites[name]["parts"][part]
    content = bytearray(draft.content(name)[start : start + length])
    what = rng.choice(["bytes", "nan", "dtype", "shape", "large", "tiny"])
    size = {"float64": 8, "float32": 4}.get(dtype, 2)
    if what == "bytes" and content:
        content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
    elif what == "nan":
        content[-size:] = b"\xff" * size if rng.random() < 0.5 else b"\x00" * size
    elif what in ("large", "tiny"):
        content = (
            bytearray((b"\xff\x7b" if size == 2 else bytes(size - 4) + b"\xff\xff\x7f\x7f") * (length // size))
            if what == "large"
            else bytearray(length)
        )
    elif what == "dtype":
        dtype = rng.choice(["float64", "float32", "float16", "bfloat16"])
        per = {"float64": 8, "float32": 4}.get(dtype, 2)
        content = bytearray(per * length // size)
    else:
        shape = rng.choice([shape[::-1], [1, *shape], [*shape, 1], [length // size], [0, 2**40], [*shape, *[1] * 40]])
        content = content if 0 not in shape else bytearray()
    replace_part(draft, name, part, bytes(content), [dtype, *shape])


@mutation("parts: order", weight=6)
def _parts(draft: Draft, rng: random.Random) -> None:
    name = pick(rng, draft.manifest["sites"])
    parts, whole = draft.manifest["sites"][name]["parts"], draft.content(name)
    found = {key: (whole[entry[0] : entry[0] + entry[1]], entry[2:]) for key, entry in parts.items()}
    keys = list(found)
    what = rng.choice(["exchange", "drop", "double", "rename", "many"])
    one, other = rng.choice(keys), rng.choice(keys)
    if what == "exchange":
        found[one], found[other] = found[other], found[one]
    elif what == "drop":
        del found[one]
    elif what == "many":
        found.update({f"x/{number}": (constant(1 << 18, rng), []) for number in range(rng.choice([3, 50, 500]))})
    else:
        found[rng.choice(["x", "", f"{one}/{one}", f"x/{one}", "../x", "\x1b[31m"])] = found[one]
        if what == "rename":
            del found[one]
    write_parts(draft, name, found)


@mutation("parts: between sites", weight=5)
def _between(draft: Draft, rng: random.Random) -> None:
    sites = draft.manifest["sites"]
    one, other = pick(rng, sites), pick(rng, sites)
    if rng.random() < 0.5:
        contents = draft.content(one), draft.content(other)
        sites[one], sites[other] = sites[other], sites[one]
        for name, content in zip((other, one), contents, strict=True):
            draft.replace(name, content)
        return
    places = [(n, p) for n in (one, other) for p in sites[n]["parts"]]
    (a, p), (b, q) = pick(rng, places), pick(rng, places)
    start, length, *kind = sites[a]["parts"][p]
    replace_part(draft, b, q, draft.content(a)[start : start + length], kind)
