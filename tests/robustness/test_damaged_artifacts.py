"""Whatever is done to an artifact's files, reading it raises ArtifactError or gives exactly what was written."""

import copy
import hashlib
import json
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

import octavo
from octavo import coding
from octavo.errors import ArtifactError

#: A fixture of conftest.py: a command run in this process.
Command = Callable[..., Any]
COUNTED = ("model.safetensors", "octavo.json")


@pytest.fixture(scope="module", params=["bert", "zoo"])
def sound(request: pytest.FixtureRequest) -> Path:
    """Of both kinds of source."""
    return request.getfixturevalue({"bert": "artifact", "zoo": "zoo_artifact"}[request.param])


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Path:
    """A copy to be damaged, of the counted files alone."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for name in COUNTED:
        shutil.copyfile(sound / name, folder / name)
    return folder


def sign(folder: Path, manifest: Any) -> None:
    """Write a manifest with the checksum that makes it look sound, as an attacker would."""
    write_signed(folder, json.dumps(manifest, separators=(",", ":")))


def write_signed(folder: Path, text: str) -> None:
    body = text[1:].encode()
    (folder / "octavo.json").write_bytes(b'{"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'",' + body)


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return octavo.Artifact(folder).state()


def refused(folder: Path) -> None:
    with pytest.raises(ArtifactError) as found:
        read_all(folder)
    assert str(found.value)


def test_a_sound_copy_is_read(damaged: Path, sound: Path, lab: Any) -> None:
    sign(damaged, lab.manifest_of(sound))
    assert (damaged / "octavo.json").read_bytes() == (sound / "octavo.json").read_bytes()
    assert set(read_all(damaged)) == set(read_all(sound))


def test_every_flipped_byte_is_noticed(damaged: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    files = [(damaged / name, (damaged / name).read_bytes()) for name in COUNTED]
    for _ in range(80):
        place = int(torch.randint(sum(len(content) for _, content in files), (), generator=generator))
        change = int(torch.randint(1, 256, (), generator=generator))
        for file, content in files:
            if place < len(content):
                flipped = bytearray(content)
                flipped[place] ^= change
                file.write_bytes(flipped)
                refused(damaged)
                file.write_bytes(content)
                break
            place -= len(content)
    read_all(damaged)


def test_every_truncation_is_noticed(damaged: Path) -> None:
    for name in COUNTED:
        content = (damaged / name).read_bytes()
        for length in (0, 1, 7, 8, 9, 76, 200, len(content) // 2, len(content) - 1):
            (damaged / name).write_bytes(content[:length])
            refused(damaged)
        (damaged / name).write_bytes(content + b"\0")
        refused(damaged)
        (damaged / name).unlink()
        refused(damaged)
        (damaged / name).write_bytes(content)
    read_all(damaged)


def first_site(manifest: dict) -> dict:
    return next(iter(manifest["sites"].values()))


HUGE = [[2**39, 2**39], [2**61, 2**61], [2**200, 2], [2**13, 2**14], [2, 2**26], [10**4, 10**4]]
ODD = [
    [-4, -4],
    [0, 5],
    [0, 0],
    [True, True],
    [64.0, 48.0],
    [1e400, 1],
    ["64", "48"],
    [64],
    [],
    [1] * 9,
    None,
    "ab",
    7,
    {},
]


@pytest.mark.parametrize("shape", HUGE + ODD, ids=str)
def test_shapes(damaged: Path, sound: Path, lab: Any, shape: Any) -> None:
    manifest = lab.manifest_of(sound)
    first_site(manifest)["shape"] = shape
    sign(damaged, manifest)
    refused(damaged)


def _change(**entries: Any) -> Callable[[dict], None]:
    return lambda manifest: first_site(manifest).update(entries)


def _parts(change: Callable[[dict], Any]) -> Callable[[dict], None]:
    def edit(manifest: dict) -> None:
        site = first_site(manifest)
        site["parts"] = change(site["parts"]) or site["parts"]

    return edit


def _first_part(change: Callable[[list], list]) -> Callable[[dict], None]:
    def edit(parts: dict) -> None:
        name = next(iter(parts))
        parts[name] = change(parts[name])

    return _parts(edit)


def _nested(depth: int) -> dict:
    form: dict = {"form": "grid"}
    for _ in range(depth):
        form = {"form": "sum", "base": form, "correction": {"form": "grid"}}
    return form


def _rename_file(name: str) -> Callable[[dict], None]:
    def edit(manifest: dict) -> None:
        manifest["files"] = {name: manifest["files"]["model.safetensors"]}

    return edit


CHANGES = {
    "unknown form": _change(form={"form": "zip"}),
    "no form": _change(form={}),
    "a form that is a list": _change(form=["grid"]),
    "another form": _change(form={"form": "codebook"}),
    "a sum of nothing": _change(form={"form": "sum"}),
    "a rank beyond": _change(
        form={"form": "lowrank", "rank": 2**40, "left": {"form": "grid"}, "right": {"form": "grid"}}
    ),
    "an endless rank": _change(form={"form": "lowrank", "rank": float("inf"), "left": {}, "right": {}}),
    "survivors beyond": _change(form={"form": "sparse", "kept": 2**40, "values": {"form": "grid"}}),
    "a pattern beyond": _change(form={"form": "sparse", "kept": 4, "pattern": [20, 40], "values": {"form": "grid"}}),
    "forms nested 50 deep": _change(form=_nested(50)),
    "unknown dtype": _change(dtype="float8"),
    "integer dtype": _change(dtype="int32"),
    "dtype of an attribute": _change(dtype="nn"),
    "dtype that is a list": _change(dtype=["float32"]),
    "unknown layout": _change(layout=["diagonal", 1]),
    "layout with groups": _change(layout=["rows_first", 2]),
    "layout with a third": _change(layout=["transposed", 3]),
    "layout with no groups": _change(layout=["transposed", 0]),
    "layout with many groups": _change(layout=["transposed", 2**62]),
    "layout with half a group": _change(layout=["transposed", 0.5]),
    "short layout": _change(layout=["rows_first"]),
    "layout that is a word": _change(layout="rows_first"),
    "null layout": _change(layout=None),
    "parts that begin before": _first_part(lambda part: [-1, *part[1:]]),
    "parts that begin later": _first_part(lambda part: [1, *part[1:]]),
    "parts that end beyond": _first_part(lambda part: [part[0], 2**40, *part[2:]]),
    "parts of negative length": _first_part(lambda part: [part[0], -1, *part[2:]]),
    "parts of half bytes": _first_part(lambda part: [0.0, float(part[1]), *part[2:]]),
    "parts with true": _first_part(lambda part: [False, part[1], *part[2:]]),
    "floats for codes": _first_part(lambda part: [*part[:2], "float32", 2, 2]),
    "floats of no dtype": _first_part(lambda part: [*part[:2], ["float32"], 2, 2]),
    "floats of huge shape": _first_part(lambda part: [*part[:2], "float32", 2**39, 2**39]),
    "floats of negative shape": _first_part(lambda part: [*part[:2], "float32", -1, -part[1] // 4]),
    "integers for floats": _first_part(lambda part: [*part[:2], "int8", part[1]]),
    "a part twice": _parts(lambda parts: {**parts, "again": next(iter(parts.values()))}),
    "a part less": _parts(lambda parts: dict(list(parts.items())[:-1])),
    "parts in a list": _parts(lambda parts: list(parts.values())),
    "a file above": _rename_file("../model.safetensors"),
    "a file elsewhere": _rename_file("/etc/passwd"),
    "another file": _rename_file("model.safetensors.bak"),
    "a missing file": _rename_file("model-00001-of-00002.safetensors"),
    "no file": lambda manifest: manifest.update(files={}),
    "version 999": lambda manifest: manifest.update(version=999),
    "version 1.5": lambda manifest: manifest.update(version=1.5),
    "another format": lambda manifest: manifest.update(format="gguf"),
    "no bytes": lambda manifest: manifest["source"].update(bytes=0),
    "an alias of nothing": lambda manifest: manifest["aliases"].update(x="nothing"),
    "an alias of itself": lambda manifest: manifest["aliases"].update(x="x"),
    "an alias of a list": lambda manifest: manifest["aliases"].update(x=["x"]),
    "an alias of a tensor's name": lambda manifest: manifest["aliases"].update({n: n for n in manifest["sites"]}),
    "a tensor twice": lambda manifest: manifest["kept"].update({n: [0, "float32"] for n in manifest["sites"]}),
    "a tensor more": lambda manifest: manifest["coded"].update(x=[0, 4]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_signed_lies(damaged: Path, sound: Path, lab: Any, change: str) -> None:
    manifest = lab.manifest_of(sound)
    CHANGES[change](manifest)
    sign(damaged, manifest)
    refused(damaged)


CODED_LIES: dict[str, Callable[..., list]] = {
    "another width": lambda crc, *shape: [crc, "float16", *shape],
    "an integer dtype": lambda crc, *shape: [crc, "int64", *shape],
    "no dtype": lambda crc, *shape: [crc, "float8", *shape],
    "another shape": lambda crc, *shape: [crc, "float64", *shape, 2],
    "huge shape": lambda crc, *shape: [crc, "float64", 2**40],
    "two dtypes": lambda crc, *shape: [crc, "float64", "float64", *shape],
    "nothing": lambda crc, *shape: [],
}


@pytest.mark.parametrize("change", CODED_LIES)
def test_signed_lies_about_coded_floats(zoo_artifact: Path, tmp_path: Path, lab: Any, change: str) -> None:
    folder = shutil.copytree(zoo_artifact, tmp_path / "zoo")
    manifest = lab.manifest_of(folder)
    name, entry = next(iter(manifest["coded"].items()))
    manifest["coded"][name] = CODED_LIES[change](*entry)
    sign(folder, manifest)
    refused(folder)


def test_a_link_is_not_followed(damaged: Path, sound: Path) -> None:
    for name in COUNTED:
        (damaged / name).unlink()
        (damaged / name).symlink_to(sound / name)
        refused(damaged)
        (damaged / name).unlink()
        (damaged / name).mkdir()
        refused(damaged)
        (damaged / name).rmdir()
        shutil.copyfile(sound / name, damaged / name)
    read_all(damaged)


def sign_header(folder: Path, header: bytes, data: bytes) -> None:
    """Write a .safetensors of any header, and a manifest that vouches for it."""
    content = struct.pack("<Q", len(header)) + header + data
    (folder / "model.safetensors").write_bytes(content)
    manifest = json.loads((folder / "octavo.json").read_text())
    del manifest["sha256"]
    manifest["files"] = {"model.safetensors": [len(content), zlib.crc32(content[: 8 + len(header)])]}
    sign(folder, manifest)


def _entry(dtype: Any = "U8", shape: Any = (4,), data_offsets: Any = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


@pytest.mark.parametrize(
    "entry",
    [
        {},
        [],
        None,
        5,
        {"dtype": "U8"},
        _entry(dtype="F8"),
        _entry(dtype=["U8"]),
        _entry(shape=[5]),
        _entry(shape=[-2, -2]),
        _entry(shape=[4.0]),
        _entry(shape=4),
        _entry(shape=[2**40], data_offsets=[0, 2**40]),
        _entry(shape=[0, 2**70], data_offsets=[0, 0]),
        _entry(data_offsets=[0.0, 4.0]),
        _entry(data_offsets=[-4, 0]),
        _entry(data_offsets=[4, 0]),
        _entry(data_offsets=[0, 2, 4]),
        _entry(data_offsets="04"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_signed_headers(damaged: Path, entry: Any) -> None:
    content = (damaged / "model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    header[next(name for name in header if name != "__metadata__")] = entry
    sign_header(damaged, json.dumps(header).encode(), content[end:])
    refused(damaged)


@pytest.mark.parametrize("header", [b"[]", b"{}", b"null", b"{", b"\xff\xfe", b'{"a":' * 100_000])
def test_signed_headers_that_are_none(damaged: Path, header: bytes) -> None:
    sign_header(damaged, header, b"")
    refused(damaged)


@pytest.mark.parametrize(
    "text",
    [
        "{" + '"a":{' * 100_000 + "}" * 100_001,
        '{"a":' + "[" * 100_000,
        "{" + '"a":' * 3,
        "{}",
        '{"format":"octavo"}',
        '{"format":"octavo","version":1,"sites":[]}',
        '{"version":' + "9" * 5000 + "}",
    ],
    ids=lambda text: f"{text[:24]}",
)
def test_signed_text_that_is_no_manifest(damaged: Path, text: str) -> None:
    write_signed(damaged, text)
    refused(damaged)


def paths(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """The way to every value within; of many tensors of one kind the last three stand for all."""
    keys = list(value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ())
    for key in keys[-3:] if at == ("kept",) or (at == ("sites",) and len(keys) > 10) else keys:
        inner = value[key]
        yield (*at, key)
        yield from paths(inner, (*at, key))


def holder(manifest: Any, path: tuple) -> Any:
    for key in path[:-1]:
        manifest = manifest[key]
    return manifest


#: What only tells of the source and of the writer; nothing is restored from it.
def informative(path: tuple) -> bool:
    return path[0] in ("octavo", "source", "configurations", "unfilled")


def check(folder: Path, expected: dict[str, torch.Tensor], path: tuple) -> None:
    """Reading raises ArtifactError, and only what restores nothing may be changed without that."""
    try:
        state = read_all(folder)
    except ArtifactError:
        return
    assert informative(path), path
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_every_missing_key_is_noticed(damaged: Path, sound: Path, lab: Any) -> None:
    manifest = lab.manifest_of(sound)
    for path in paths(manifest):
        changed = copy.deepcopy(manifest)
        del holder(changed, path)[path[-1]]
        sign(damaged, changed)
        if path[0] in ("configurations", "unfilled") or (path[0] == "aliases" and len(path) == 2):
            continue  # A tied name that is not there was perhaps never there, and neither was a configuration.
        refused(damaged)


OTHER = [None, [], "x", 7, 2**80, -1, True, 1.5, {}]


@pytest.mark.parametrize("turn", range(3))
def test_every_other_value_is_noticed(zoo_artifact: Path, tmp_path: Path, lab: Any, turn: int) -> None:
    """Every value in the manifest in turn: its neighbours, of the same kind at other sites, get the other values."""
    manifest, expected = lab.manifest_of(zoo_artifact), read_all(zoo_artifact)
    damaged = shutil.copytree(zoo_artifact, tmp_path / "damaged")
    for number, path in enumerate(paths(manifest)):
        value = OTHER[(number + 3 * turn) % len(OTHER)]
        if holder(manifest, path)[path[-1]] == value or (path, value) == (("aliases",), {}):
            continue  # The same, or no tied names, which there need not be.
        changed = copy.deepcopy(manifest)
        holder(changed, path)[path[-1]] = value
        sign(damaged, changed)
        check(damaged, expected, path)


_MEASURE = """
import json, resource, sys
from pathlib import Path
import octavo
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: octavo.Artifact(sys.argv[1]).state()
except octavo.ArtifactError: pass
before = peak()
for path in sys.argv[2:]:
    try: octavo.Artifact(path).state()
    except octavo.ArtifactError: continue
    sys.exit(f"{path} was read")
print(peak() - before)
"""


def inflate(folder: Path) -> None:
    """Give a site fifty parts of few bytes, each of which decodes to as much as one alone may."""
    content = (folder / "model.safetensors").read_bytes()
    tensors = load(content)
    manifest = json.loads((folder / "octavo.json").read_text())
    name, site = next(iter(manifest["sites"].items()))
    part = coding.encode(torch.zeros(8 * site["shape"][0] * site["shape"][1], dtype=torch.int64))
    tensors[name] = torch.frombuffer(bytearray(part * 50), dtype=torch.uint8)
    site["parts"] = {f"part {k}": [k * len(part), len(part)] for k in range(50)}
    site["crc"] = zlib.crc32(part * 50)
    del manifest["sha256"]
    sign(folder, manifest)
    content = save(tensors)
    end = 8 + struct.unpack("<Q", content[:8])[0]
    sign_header(folder, content[8:end], content[end:])


def test_parts_that_inflate(zoo_artifact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(zoo_artifact, tmp_path / "zoo")
    inflate(folder)
    with pytest.raises(ArtifactError, match=r"needs [0-9]+ bytes of memory"):
        read_all(folder)


def test_huge_claims_take_no_memory(zoo_artifact: Path, tmp_path: Path, lab: Any) -> None:
    folders = []

    def add(change: Callable[[dict], Any]) -> None:
        folder = tmp_path / f"{len(folders)}"
        shutil.copytree(zoo_artifact, folder)
        manifest = lab.manifest_of(folder)
        change(manifest)
        sign(folder, manifest)
        folders.append(folder)

    for shape in HUGE:
        add(_change(shape=shape))
    add(lambda manifest: next(iter(manifest["coded"].values())).append(2**40))
    add(lambda manifest: next(iter(manifest["coded"].values())).__setitem__(slice(1, None), ["float64", 2**40]))
    add(CHANGES["a rank beyond"])
    add(CHANGES["survivors beyond"])
    add(CHANGES["floats of huge shape"])
    add(lambda manifest: None)
    inflate(folders[-1])
    words = [sys.executable, "-c", _MEASURE, str(zoo_artifact), *map(str, folders)]
    done = subprocess.run(words, env=lab.environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 << 10, f"{int(done.stdout)} KiB"


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def harms(folder: Path) -> Iterator[Path]:
    """Copies of an artifact, each damaged in another way."""
    for name, place in (("model.safetensors", -1), ("model.safetensors", 20), ("octavo.json", 300)):
        copied = shutil.copytree(folder, folder.parent / f"flipped-{name}-{place}")
        flip(copied / name, place)
        yield copied
    for name in COUNTED:
        copied = shutil.copytree(folder, folder.parent / f"cut-{name}")
        (copied / name).write_bytes((copied / name).read_bytes()[:-50])
        yield copied
        copied = shutil.copytree(folder, folder.parent / f"missing-{name}")
        (copied / name).unlink()
        yield copied


@pytest.mark.parametrize("words", [["verify"], ["verify", "--json"], ["inspect"], ["inspect", "--json"]], ids=" ".join)
def test_commands_fail_with_one_clear_line(command: Command, artifact: Path, tmp_path: Path, words: list[str]) -> None:
    assert command(*words, artifact).code == 0
    for folder in harms(shutil.copytree(artifact, tmp_path / "folded")):
        result = command(*words, folder)
        if words[0] == "inspect" and folder.name == "flipped-model.safetensors--1":
            continue  # Nothing is decoded, so the content of a site is not read either.
        assert result.code == 1, folder
        assert re.match(r"error: ArtifactError: .+\n$", result.err), result.err
        assert "--json" not in words or json.loads(result.out)["error"] == "ArtifactError"


def test_inspect_of_lies(command: Command, artifact: Path, tmp_path: Path, lab: Any) -> None:
    folder = shutil.copytree(artifact, tmp_path / "folded")
    for name in ("unknown form", "no form", "unknown dtype", "parts in a list", "no bytes", "a part less"):
        manifest = lab.manifest_of(artifact)
        CHANGES[name](manifest)
        sign(folder, manifest)
        assert command("inspect", folder).code == 1, name


def test_what_is_no_artifact(command: Command, bert: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", bert, bert / "config.json"):
        result = command("verify", path)
        assert result.code == 1 and f"{path}: not an artifact, since it has no octavo.json" in result.said
        with pytest.raises(ArtifactError):
            octavo.load(path)


def test_load_and_from_pretrained(artifact: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    for folder in harms(shutil.copytree(artifact, tmp_path / "folded")):
        with pytest.raises(ArtifactError):
            octavo.load(folder)
        if folder.name != "missing-model.safetensors":
            # Without it, the loader of transformers gives up before it asks Octavo.
            with pytest.raises(ArtifactError):
                AutoModel.from_pretrained(folder)


def test_no_byte_of_a_kept_tensor_is_taken_unchecked(artifact: Path, tmp_path: Path, lab: Any) -> None:
    from transformers import AutoModel

    content = (artifact / "model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    for name in list(lab.manifest_of(artifact)["kept"])[:3]:
        folder = shutil.copytree(artifact, tmp_path / name)
        flip(folder / "model.safetensors", end + header[name]["data_offsets"][0])
        with pytest.raises(ArtifactError, match=re.escape(name)):
            AutoModel.from_pretrained(folder)


def test_a_module_that_does_not_fit(zoo_artifact: Path, lab: Any) -> None:
    with pytest.raises(ArtifactError, match="does not fit Net"):
        octavo.load(zoo_artifact, into=lab.net())
