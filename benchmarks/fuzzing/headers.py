"""Changes of the headers of safetensors files, signed again."""

from __future__ import annotations

import json
import random
import zlib

from fuzzing.draft import Draft, File, mutation, pick
from fuzzing.trees import JUNK, change_keys, change_value

DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "U16", "C64", "F4", "", "F6_E2M3"]


def _file(draft: Draft, rng: random.Random) -> File:
    file = draft.files[pick(rng, draft.files)]
    # The tree is written, not the text that it was read from.
    file.text = None
    return file


def _entry(file: File, rng: random.Random) -> dict:
    return file.header[pick(rng, [name for name in file.header if name != "__metadata__"])]


@mutation("header: value", weight=5)
def _value(draft: Draft, rng: random.Random) -> None:
    change_value(_file(draft, rng).header, rng)
    draft.sign_files()


@mutation("header: keys", weight=5)
def _keys(draft: Draft, rng: random.Random) -> None:
    change_keys(_file(draft, rng).header, rng)
    draft.sign_files()


@mutation("header: entry", weight=8)
def _changed(draft: Draft, rng: random.Random) -> None:
    file = _file(draft, rng)
    entry = _entry(file, rng)
    what = rng.choice(["dtype", "shape", "overlap", "dimensions", "end"])
    start, stop = entry["data_offsets"]
    if what == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif what == "shape":
        entry["shape"] = rng.choice(
            [[], [0], [1], [stop - start], [stop - start, 1], [2**62], [2**40, 2**40], [True], [-1]]
        )
    elif what == "dimensions":
        entry["shape"] = [*entry["shape"], *[1] * rng.choice([1, 30, 64, 65, 150_000])]
    elif what == "overlap":
        other = _entry(file, rng)["data_offsets"][0]
        entry["data_offsets"] = [other, other + stop - start]
    else:
        entry["data_offsets"] = rng.choice(
            [[start, len(file.data)], [start, stop + 1], [start + 1, stop + 1], [0, 0], [stop, start]]
        )
    for name in draft.names():
        try:
            draft.sign_tensor(name)
        except (TypeError, ValueError):
            continue
    draft.sign_files()


@mutation("header: many that overlap", weight=2)
def _many(draft: Draft, rng: random.Random) -> None:
    file, count = _file(draft, rng), rng.choice([3, 300, 3000])
    start = len(file.data)
    file.data += bytes(rng.choice([4, 4096, 1 << 18]))
    size = len(file.data) - start
    for number in range(count):
        file.header[f"many.{number}"] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [start, start + size]}
        draft.manifest["kept"][f"many.{number}"] = [0, "float32"]
    draft.manifest["kept"].update(
        {f"many.{k}": [zlib.crc32(bytes(size)), rng.choice(["float32", "float64"])] for k in range(count)}
    )
    draft.sign_files()


@mutation("header: names", weight=4)
def _names(draft: Draft, rng: random.Random) -> None:
    file = _file(draft, rng)
    old = pick(rng, [name for name in file.header if name != "__metadata__"])
    new = rng.choice(["../../x", "/etc/passwd", "\x1b[31mred", "a\x00b", "layer[/b].weight", "[red]x", "__metadata__.", "x/y", "",
                      "2_Dense/linear.weight", "\u202e", "a" * 20_000, "x\n\rerror: done", "model.safetensors"])  # fmt: skip
    file.header = {new if name == old else name: entry for name, entry in file.header.items()}
    for table in ("sites", "kept", "coded", "bits", "aliases"):
        found = draft.manifest.get(table, {})
        draft.manifest[table] = {new if name == old else name: entry for name, entry in found.items()}
    draft.sign_files()


@mutation("header: text", weight=4)
def _text(draft: Draft, rng: random.Random) -> None:
    file = _file(draft, rng)
    body = json.dumps(file.header, separators=(",", ":")).encode()
    count = rng.choice([1000, 100_000, 1_000_000])
    file.text = rng.choice([
        lambda: b"", lambda: b"[]", lambda: b"null", lambda: b"{}", lambda: body[:-1], lambda: b"\xff\xfe" + body,
        lambda: b'{"__metadata__":{"a":' + b"[" * count + b"]" * count + b"}," + body[1:],
        lambda: b'{"__metadata__":[' + b"{}," * count + b"{}]," + body[1:],
        lambda: body + b" " * count,
        lambda: body.replace(b'{"dtype"', b'{"dtype":"F32","dtype"', 1),
        lambda: b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},' + body[1:],
        lambda: b"{" + b",".join(b'"e%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % k for k in range(count // 50)) + b"," + body[1:],
    ])()  # fmt: skip
    draft.sign_files()


@mutation("header: metadata", weight=2)
def _metadata(draft: Draft, rng: random.Random) -> None:
    _file(draft, rng).header["__metadata__"] = rng.choice(
        [None, {}, [], {"format": "tf"}, {"format": 3}, *[rng.choice(JUNK)()]]
    )
    draft.sign_files()
