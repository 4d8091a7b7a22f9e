"""Artifacts are sized without their content, and written from front to back."""

import json
import zlib
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

import octavo
from octavo.allocation.workspace import Workspace
from octavo.artifact import Contents, Entry, Kept, Sized, is_constant, pack, writing
from octavo.errors import OctavoError
from octavo.forms import Dense, Grid
from octavo.sources.sites import Layout
from octavo.system.raw import raw_bytes

SOURCE = {"title": "some", "fingerprint": "0" * 64, "bytes": 10_000_000, "weights": 5_000_000}


def kept(tensor, stored=None):
    return Kept(lambda: tensor, tuple(tensor.shape), stored or tensor.dtype, tensor.dtype)


def contents(sites=3):
    torch.manual_seed(0)
    made = Contents(SOURCE, aliases={"other": "b.0"})
    for number in range(sites):
        codes = torch.randint(-9, 9, (40 + number, 30), dtype=torch.int8)
        packed = pack(Grid(codes, torch.full((1, 1), 0.5)))
        made.entries[f"b.{number}"] = Entry(packed, (40 + number, 30), torch.float32, Layout())
    made.entries["dense"] = Entry(pack(Dense(torch.randn(8, 8))), (8, 8), torch.bfloat16, Layout())
    made.kept["norm"] = kept(torch.randn(30), torch.float16)
    made.kept["a wide one"] = kept(torch.randn(5, dtype=torch.float64))
    made.kept["brain"] = kept(torch.randn(7).bfloat16())
    made.kept['ümlaut "quoted" \\ \n'] = kept(torch.randn(3))
    made.kept["positions"] = kept(torch.arange(512))
    made.kept["empty"] = kept(torch.zeros(0, 4))
    made.kept["scalar"] = kept(torch.tensor(3.5))
    return made


@pytest.mark.parametrize("shard_bytes", [10_000_000, 2000])
def test_the_bytes_written_are_those_stated(tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(writing, "SHARD_BYTES", shard_bytes)
    made, seen = contents(), []
    stated = made.bytes
    made.write(tmp_path, lambda done, total: seen.append((done, total)))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == stated
    assert len(list(tmp_path.glob("model*.safetensors"))) == (1 if shard_bytes > stated else 2)
    artifact = octavo.Artifact(tmp_path)
    assert artifact.bytes == stated
    assert torch.equal(artifact.tensor("b.1"), artifact.form("b.1").dense())
    assert torch.equal(artifact.tensor("positions"), torch.arange(512))
    assert artifact.tensor("norm").dtype == torch.float32
    assert artifact.tensor("scalar").item() == 3.5
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) == len(artifact.names()) and all(done <= total == stated for done, total in seen)


def test_sizes_need_no_content(tmp_path):
    made = contents()
    stated = made.bytes
    for entry in made.entries.values():
        packed = entry.packed
        entry.packed = replace(packed, content=Sized(packed.bytes, packed.crc))
    assert made.bytes == stated
    with pytest.raises(ValueError, match="only the size"):
        made.write(tmp_path)


def test_files_are_those_of_the_safetensors_library(tmp_path):
    contents().write(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, "pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (a handle is no mapping)
    assert file.read_bytes() == save(tensors, {"format": "pt"})


def test_stored_forms_are_read_when_they_are_written(tmp_path):
    made = contents()
    made.write(tmp_path)
    written = (tmp_path / "model.safetensors").read_bytes()
    room = Workspace(tmp_path / "room", {}, resume=False)
    for name, entry in made.entries.items():
        entry.packed = room.save_packed(name, "some", {}, entry.packed)
        assert entry.packed.crc == zlib.crc32(entry.packed.blob)
        assert room.load_packed(name, "some", {}) == entry.packed
    (tmp_path / "again").mkdir()
    made.write(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == written
    file = next((tmp_path / "room" / "points").iterdir())
    file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(OctavoError, match="was changed while it was in use"):
        made.write(tmp_path / "again")
    file.unlink()
    with pytest.raises(OctavoError, match="cannot be read"):
        made.write(tmp_path / "again")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    contents().write(tmp_path)
    artifact = octavo.Artifact(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(octavo.ArtifactError, match="truncated"):
        artifact.state()


def test_a_manifest_says_what_the_files_hold(tmp_path):
    contents().write(tmp_path)
    manifest = json.loads((tmp_path / "octavo.json").read_text())
    content = (tmp_path / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert manifest["files"] == {"model.safetensors": [len(content), zlib.crc32(content[:header])]}
    assert set(manifest["sites"]) == {"b.0", "b.1", "b.2", "dense"} and set(manifest["coded"]) == {"positions"}


def with_bits(tmp_path):
    made = contents(1)
    made.kept["mask"] = replace(kept(torch.full((6, 7), float("-inf"))), coded=True)
    made.kept["pair"] = kept(torch.complex(torch.randn(5), torch.randn(5)).to(torch.complex128))
    made.kept["eight"] = kept(torch.randn(9).to(torch.float8_e5m2))
    made.extra = {"_extra_state": {"step": 3}}
    stated = made.bytes
    made.write(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == stated
    return made


def forge(folder, change):
    """The manifest with something else in it, and a checksum that fits."""
    import hashlib

    manifest = json.loads((folder / "octavo.json").read_bytes())
    del manifest["sha256"]
    change(manifest)
    body = json.dumps(manifest, separators=(",", ":"))[1:].encode()
    head = b'{"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'",'
    (folder / "octavo.json").write_bytes(head + body)


def test_bits_and_data_are_read_back(tmp_path):
    made = with_bits(tmp_path)
    artifact = octavo.Artifact(tmp_path)
    for name in ("mask", "pair", "eight"):
        found, wanted = artifact.tensor(name), made.kept[name].read()
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
    assert artifact.extra == {"_extra_state": {"step": 3}}
    assert artifact.loadable_shapes()["mask"] == (6, 7)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["bits"].update(mask=["float32", "complex64"]),
        lambda m: m["bits"].update(mask=["float64", "float64"]),
        lambda m: m["bits"].update(mask=["object", "object"]),
        lambda m: m["bits"].update(mask="float32"),
        lambda m: m["bits"].update(mask=[["float32"], "float32"]),
        lambda m: m["bits"].update(norm=["float32", "float32"]),
        lambda m: m.update(bits=[]),
        lambda m: m["coded"].update(mask=[m["coded"]["mask"][0], 2**20, 2**20]),
        lambda m: m["coded"].update(mask=[m["coded"]["mask"][0], 6, 8]),
        lambda m: m["kept"]["eight"].__setitem__(1, "float32"),
        lambda m: m["kept"]["norm"].__setitem__(1, "int64"),
        lambda m: m.update(extra=[1]),
        lambda m: m.update(extra={"norm": 1}),
        lambda m: m["sites"]["b.0"].update(layout=["rows_first", 1, 4000]),
        lambda m: m["sites"]["b.0"].update(layout=["rows_first", 1, True]),
        lambda m: m["sites"]["b.0"].update(layout=["rows_first", 1, 0, 0]),
        lambda m: m["sites"]["b.0"].update(layout=["rows_first", 1, 1.5]),
    ],
)
def test_a_forged_entry_is_refused(tmp_path, change):
    with_bits(tmp_path)
    forge(tmp_path, change)
    with pytest.raises(octavo.ArtifactError):
        octavo.Artifact(tmp_path).state()


def test_the_name_of_the_metadata_is_escaped_both_ways(tmp_path):
    made = contents(1)
    for name in ("__metadata__", "__metadata__.", "__metadata__..", "x.__metadata__"):
        made.kept[name] = kept(torch.full((3,), float(len(name))))
    made.write(tmp_path)
    artifact = octavo.Artifact(tmp_path)
    assert all(float(artifact.tensor(name)[0]) == len(name) for name in made.kept if "metadata" in name)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) >= {"__metadata__.", "__metadata__..", "__metadata__...", "x.__metadata__"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, -0.0, 1 - 1e-3, 3e-5])
def test_a_constant_takes_the_room_of_one_value(tmp_path, dtype, value):
    made, tensor = Contents(SOURCE), torch.full((640, 2), value, dtype=dtype)
    made.kept["ones"] = replace(kept(tensor), coded=True)
    made.kept["others"] = kept(torch.randn(7))
    made.write(tmp_path)
    artifact = octavo.Artifact(tmp_path)
    assert artifact.bytes == made.bytes < 1000
    found = artifact.tensor("ones")
    assert found.dtype == dtype and found.shape == tensor.shape
    assert raw_bytes(found) == raw_bytes(tensor)
    assert made.kept["ones"].measured[0] < 40


def test_what_differs_in_one_bit_is_no_constant():
    assert is_constant(torch.full((64,), 0.3))
    assert not is_constant(torch.tensor([0.0] * 63 + [-0.0]))
    assert not is_constant(torch.full((64,), 3))
    assert not is_constant(torch.full((8,), 0.3))
    assert not is_constant(torch.zeros(0))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float32])
def test_tensors_of_too_many_dimensions_are_named(dtype):
    made = contents()
    made.kept["deep"] = kept(torch.zeros([1] * 33, dtype=dtype))
    with pytest.raises(octavo.RequestError, match=r"'deep' has 33 dimensions.*at most 32"):
        _ = made.bytes


def test_a_site_may_have_as_many_dimensions_as_a_tensor(tmp_path):
    torch.manual_seed(0)
    module = torch.nn.ParameterDict({"w": torch.randn(8, 8, *[2] * 4, *[1] * 20)})
    octavo.compress(module, ratio=3, preset="data-free").save(tmp_path / "out")
    assert octavo.verify(tmp_path / "out").weights_match
    assert octavo.load(tmp_path / "out")["w"].shape == module["w"].shape
