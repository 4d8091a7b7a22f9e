"""An artifact of a few kilobytes from a stranger takes no gigabytes: it is refused before memory is taken."""

import gc
import hashlib
import json
import os
import struct
import time
import zlib
from pathlib import Path

import pytest
import torch

import octavo
from octavo.artifact import pack
from octavo.artifact.writing import Contents, Entry, Kept
from octavo.errors import ArtifactError
from octavo.forms import Dense, DenseSparse, Grid, GroupedLowRank, LowRank, RowBlocks, Separable, Sparse, Sum, Trimmed
from octavo.sources.sites import Layout

#: The promise: four times the files, and 200 MB.
LARGEST = 200 << 20
TINY = Dense(torch.ones(1, 1, dtype=torch.float16))


def write(folder, forms):
    """An artifact of forms that nobody asked for, with all checksums right."""
    entries = {
        f"site{k}.weight": Entry(pack(form), form.shape, torch.float32, Layout()) for k, form in enumerate(forms)
    }
    source = {"title": "gift", "fingerprint": "0" * 64, "bytes": 1 << 20, "weights": 1 << 18}
    folder.mkdir(exist_ok=True)
    Contents(source, entries).write(folder)
    return folder


def rewritten(folder, change):
    """The manifest as text, changed and signed again."""
    text = change((folder / "octavo.json").read_text()[77:])
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "octavo.json").write_text('{"sha256":"' + digest + '",' + text)


def header_rewritten(folder, header):
    """A header of the safetensors file, over the same content, and its checksum in the manifest."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    head = json.dumps(header).encode() if isinstance(header, dict) else header
    head = struct.pack("<Q", len(head)) + head
    file.write_bytes(head + content[8 + length :])

    def change(text):
        manifest = json.loads("{" + text)
        manifest["files"] = {"model.safetensors": [file.stat().st_size, zlib.crc32(head)]}
        manifest["sites"] = {}
        manifest["kept"] = {name: [zlib.crc32(b""), "float32"] for name in header} if isinstance(header, dict) else {}
        return json.dumps(manifest)[1:]

    rewritten(folder, change)


def resident(key):
    return next(
        int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if key in line
    )


def outcome(folder):
    """What comes of loading in a process of its own: the error, the seconds, and the most memory that was taken."""
    load = octavo.load  # what it imports takes no memory of the child
    gc.collect()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        said = "loaded"
        try:
            torch.set_num_threads(1)
            Path("/proc/self/clear_refs").write_text("5")
            before, started = resident("VmRSS") - resident("RssFile"), time.monotonic()
            try:
                load(folder)
            except ArtifactError as error:
                said = f"refused: {error}"
            except BaseException as error:
                said = f"raw: {type(error).__name__}: {error}"
            peak = resident("VmHWM") - resident("RssFile") - before
            os.write(writing, json.dumps([said[:600], time.monotonic() - started, peak]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        return json.loads(pipe.read() or '["died", 0, 0]')


def ones(n):
    return torch.ones(n, dtype=torch.bool)


def hollow(rows, columns):
    """A matrix of any size in a few bytes."""
    rows_kept, columns_kept = torch.zeros(rows, dtype=torch.bool), torch.zeros(columns, dtype=torch.bool)
    rows_kept[0] = columns_kept[0] = True
    return Trimmed(TINY, rows_kept, columns_kept)


def flat(rows, columns, dtype=torch.int8):
    return Grid(torch.zeros(rows, columns, dtype=dtype), torch.ones(1, 1))


SIDE = 16_000
HOSTILE = {
    "cut in lowrank": lambda: [LowRank(hollow(1, SIDE), hollow(SIDE, SIDE))],
    "cut in grouped lowrank": lambda: [GroupedLowRank(hollow(SIDE, SIDE), hollow(SIDE, 1), 1)],
    "cut in many groups": lambda: [GroupedLowRank(hollow(4000, 4000 * 100), hollow(4000 * 100, 1), 100)],
    "survivors everywhere": lambda: [
        LowRank(hollow(1, 8000), Sparse(ones(8000 * 2000).view(8000, 2000), flat(1, 8000 * 2000)))
    ],
    "patterns everywhere": lambda: [Sparse(ones(1 << 24).view(4096, 4096), flat(1, 1 << 24), (8, 8))],
    "gaps of 64 bits": lambda: [Sparse(ones(1 << 24).view(4096, 4096), flat(1, 1 << 24, torch.int64))],
    "atoms everywhere": lambda: [
        DenseSparse(flat(4000, 4000), torch.zeros(4000, 4000, dtype=torch.int64), hollow(4000 * 4000, 1), 1, 4000)
    ],
    "blocks of lowrank of cuts": lambda: [
        RowBlocks(torch.arange(256).to(torch.uint8), tuple(LowRank(hollow(1, 4000), hollow(4000, 4000)) for _ in range(256)))
    ],
    "terms": lambda: [Separable(hollow(1000 * 1000, 1000), hollow(1000 * 1000, 1000), hollow(1000 * 1000, 1), 1000)],
    "sums of cuts": lambda: [Sum(LowRank(hollow(1, SIDE), hollow(SIDE, SIDE)), hollow(1, SIDE))],
    "wide codes": lambda: [flat(4096, 4096, torch.int64)],
    "many sites": lambda: [hollow(2000, 2000) for _ in range(64)],
}  # fmt: skip

linux = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux tells a process's peak")


@linux
@pytest.mark.parametrize("name", HOSTILE)
def test_a_small_file_takes_little_memory(name, tmp_path):
    folder = write(tmp_path / "gift", HOSTILE[name]())
    size = sum(file.stat().st_size for file in folder.iterdir())
    said, seconds, peak = outcome(folder)
    assert said == "loaded" or said.startswith("refused"), said
    assert peak <= 4 * size + LARGEST, (said, peak >> 20)
    assert seconds < 10


@linux
@pytest.mark.parametrize(
    "name", ["cut in lowrank", "survivors everywhere", "atoms everywhere", "blocks of lowrank of cuts"]
)
def test_the_refusal_says_why(name, tmp_path):
    said, _, _ = outcome(write(tmp_path / "gift", HOSTILE[name]()))
    assert any(word in said for word in ("bytes of memory", "claims"))


@linux
def test_honest_artifacts_of_the_same_forms_load(tmp_path):
    """The bounds are those of strangers: a hollow matrix and one of zeros are small, and no more than that."""
    forms = [hollow(1000, 1000), flat(2048, 2048), Sparse(ones(1 << 20).view(1024, 1024), flat(1, 1 << 20))]
    folder = write(tmp_path / "honest", forms)
    state = octavo.load(folder)
    for k, form in enumerate(forms):
        assert torch.equal(state[f"site{k}.weight"], form.dense())


@linux
def test_kept_tensors_may_not_overlap(tmp_path):
    folder = write(tmp_path / "gift", [flat(8, 8)])
    Contents(
        {"title": "gift", "fingerprint": "0", "bytes": 1, "weights": 1}, {},
        {"a": Kept(lambda: torch.rand(1 << 18), (1 << 18,), torch.float32, torch.float32)},
    ).write(folder)  # fmt: skip
    end = 4 << 18
    header_rewritten(
        folder, {f"t{k}": {"dtype": "F32", "shape": [1 << 18], "data_offsets": [0, end]} for k in range(500)}
    )
    said, _, peak = outcome(folder)
    assert "overlap" in said
    assert peak < 64 << 20


@linux
@pytest.mark.parametrize("where", ["manifest", "header", "list", "keys"])
def test_json_takes_no_more_than_its_size_justifies(where, tmp_path):
    folder = write(tmp_path / "gift", [flat(8, 8)])
    if where == "header":
        header_rewritten(folder, b'{"x":[' + b",".join([b"{}"] * (10 << 20)) + b"]}")
    else:
        many = {"manifest": "{},", "list": "[],", "keys": '{"a":1},'}[where] * (4 << 20)
        rewritten(folder, lambda text: f'"odd":[{many}{{}}],{text}')
    size = sum(file.stat().st_size for file in folder.iterdir())
    said, seconds, peak = outcome(folder)
    assert said.startswith("refused")
    assert peak <= 4 * size
    assert seconds < 10


@linux
@pytest.mark.parametrize("count", [33, 150_000])
@pytest.mark.parametrize("where", ["site", "part", "coded", "header"])
def test_a_tensor_has_at_most_32_dimensions(where, count, tmp_path):
    folder = write(tmp_path / "gift", [Dense(torch.ones(4, 4))])
    long = [1] * (count - 1) + [16]

    def change(text):
        manifest = json.loads("{" + text)
        (site,) = manifest["sites"].values()
        if where == "site":
            site["shape"] = long
        elif where == "part":
            site["parts"]["weight"][3:] = long
        else:
            manifest["coded"]["odd"] = [0, *long]
        return json.dumps(manifest)[1:]

    if where == "header":
        header_rewritten(folder, {"site0.weight": {"dtype": "F32", "shape": long, "data_offsets": [0, 64]}})
    else:
        rewritten(folder, change)
    said, seconds, _ = outcome(folder)
    assert said.startswith("refused")
    assert seconds < 5


def test_a_name_stands_once_in_a_manifest(tmp_path):
    folder = write(tmp_path / "gift", [flat(8, 8)])
    rewritten(folder, lambda text: f'"sites":{{}},{text}')
    with pytest.raises(ArtifactError, match="duplicate name"):
        octavo.load(folder)
