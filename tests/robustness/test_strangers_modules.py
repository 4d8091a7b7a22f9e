"""Modules of an encoder, reports and folders around an artifact: what a stranger puts there misleads nobody."""

import hashlib
import json
import os
import shutil
import warnings
import zlib
from pathlib import Path

import pytest
import transformers

import octavo
from octavo.artifact.configuration import is_configuration
from octavo.errors import ArtifactError, OctavoError
from octavo.integrations.trust import root_of, trusted
from octavo.system.notes import OctavoWarning

LIBRARY = "sentence_transformers"
TRANSFORMER = f"{LIBRARY}.base.modules.transformer.Transformer"


@pytest.fixture
def copy(artifact, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(artifact, folder)
    return folder


def signed(folder, **entries):
    """The manifest with other entries and the checksums of the configurations that are there, signed again."""
    manifest = json.loads((folder / "octavo.json").read_text())
    del manifest["sha256"]
    found = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*.json") if file.is_file()}
    manifest["configurations"] = {
        name: [len(content := file.read_bytes()), zlib.crc32(content)]
        for name, file in found.items()
        if is_configuration(name)
    }
    text = json.dumps({**manifest, **entries})[1:]
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "octavo.json").write_text('{"sha256":"' + digest + '",' + text)


def list_modules(folder, *modules):
    entries = [{"idx": k, "name": str(k), "path": path, "type": kind} for k, (path, kind) in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(entries))
    signed(folder)


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("1_Other", TRANSFORMER),
        ("1_Other", f"{LIBRARY}.sparse_encoder.modules.MLMTransformer"),
        ("1_Other/route", f"{LIBRARY}.base.modules.router.Router"),
    ],
)
@pytest.mark.parametrize("reader", ["SentenceTransformer", "CrossEncoder"])
def test_modules_bring_no_weights_of_their_own(place, kind, reader, copy, bert):
    shutil.copytree(bert, copy / place)
    (copy / "config_sentence_transformers.json").write_text(json.dumps({"model_type": reader}))
    list_modules(copy, ("", TRANSFORMER), (place.split("/")[0], kind))
    for read in (octavo.load, octavo.verify, trusted):
        with pytest.raises(ArtifactError, match="does not belong to this artifact"):
            read(copy)


@pytest.mark.parametrize("place", [".hidden", "1_Deep/.hidden", "1_Deep/a/b/c/d/e"])
def test_pipes_in_folders_of_modules_are_refused(place, copy):
    (copy / place).mkdir(parents=True)
    os.mkfifo(copy / place / "config.json")
    list_modules(copy, ("", TRANSFORMER), (place.split("/")[0], TRANSFORMER))
    for read in (octavo.load, octavo.verify, trusted):
        with pytest.raises(OctavoError):
            read(copy)


@pytest.mark.parametrize("entry", ["{}", "[]", '{"a":1}'])
def test_a_list_of_modules_is_short(entry, copy):
    (copy / "modules.json").write_text("[" + ",".join([entry] * (1 << 20)) + "]")
    signed(copy)
    with pytest.raises(OctavoError, match="too large"):
        octavo.load(copy)


@pytest.mark.parametrize("kind", [[], {}, "", False, 0.0])
def test_resident_bytes_are_a_number(kind, copy):
    signed(copy, resident=kind)
    with pytest.raises(ArtifactError, match="manifest"):
        octavo.verify(copy)


@pytest.mark.parametrize(("part", "key"), [("quality", "value"), ("outputs", "scale"), ("outputs", "samples")])
def test_numbers_of_a_report_may_be_of_any_size(part, key, copy, command):
    file = copy / "report.json"
    report = json.loads(file.read_text())
    (report["quality"] if part == "quality" else report["digests"]["outputs"])[key] = (
        [10**400] if key == "samples" else 10**400
    )
    file.write_text(json.dumps(report))
    result = command("verify", copy)
    assert "unforeseen" not in str(result)


def test_lists_in_lists_count_too(copy):
    file = copy / "config.json"
    types = {"attention_types": [[["global"], 10**9]]}
    file.write_text(json.dumps({**json.loads(file.read_text()), **types}))
    signed(copy)
    with pytest.raises(ArtifactError, match="attention_types"):
        octavo.load(copy)


@pytest.mark.parametrize("kind", ["artifact", "garbage"])
def test_a_model_below_an_artifact_is_none_of_its_modules(kind, copy, bert, monkeypatch):
    shutil.copytree(bert, copy / "source")
    if kind == "garbage":
        (copy / "octavo.json").write_text("{}")
    assert root_of(copy / "source") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", OctavoWarning)
        transformers.AutoModel.from_pretrained(copy / "source")
    # Names at a hub are looked for in the working folder, which may hold an artifact.
    monkeypatch.chdir(copy)
    assert root_of(Path("someones-model")) is None


@pytest.mark.parametrize("size", [10**6, "224", [64], [10**5, 10**5], -1])
def test_an_image_to_compare_outputs_of_has_a_sane_size(size):
    from octavo.verification.probes import fixed_input

    config = transformers.ConvNextConfig(num_channels=3)
    config.__dict__["image_size"] = size
    model = type("Model", (), {"config": config, "main_input_name": "pixel_values"})()
    assert fixed_input(model) is None


@pytest.mark.parametrize(
    "options",
    [
        {"model_kwargs": {"attn_implementation": "stranger/kernel"}},
        {"model_args": {"_attn_implementation": "stranger/kernel:forward"}},
        {"config_kwargs": {"quantization_config": None, "transformers_weights": "other.safetensors"}},
        {"config_kwargs": {"num_hidden_layers": 20_000}},
    ],
    ids=str,
)
def test_options_of_a_module_name_no_code_and_no_weights(options, copy):
    (copy / "sentence_bert_config.json").write_text(json.dumps(options))
    list_modules(copy, ("", TRANSFORMER))
    for read in (octavo.load, octavo.verify, trusted):
        with pytest.raises(ArtifactError, match="sentence_bert_config"):
            read(copy)


def test_a_dense_module_is_as_small_as_its_weights(copy):
    library = pytest.importorskip("sentence_transformers")
    (copy / "1_Dense").mkdir()
    (copy / "1_Dense" / "config.json").write_text(json.dumps({"in_features": 60_000, "out_features": 20_000}))
    list_modules(copy, ("", TRANSFORMER), ("1_Dense", f"{LIBRARY}.base.modules.dense.Dense"))
    with pytest.raises(ArtifactError, match="far more weights"):
        library.SentenceTransformer(str(copy), device="cpu")
