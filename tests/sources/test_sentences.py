"""Encoders of sentence-transformers: every layout is compressed, loaded by its own class, and measured there."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import octavo

pytest.importorskip("sentence_transformers")

WORDS = 300
TEXTS = [" ".join(f"w{(7 * i + 3 * j * j) % (WORDS - 2)}" for j in range(4 + i % 5)) for i in range(48)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("encoder") / "bert"
    words = {word: index for index, word in enumerate(["<pad>", "<unk>", *(f"w{i}" for i in range(WORDS - 2))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def modules(layout: str, bert: Path) -> list[Any]:
    import sentence_transformers.models as S
    from tokenizers import Tokenizer

    torch.manual_seed(1)
    if layout == "static":
        return [S.StaticEmbedding(Tokenizer.from_file(str(bert / "tokenizer.json")), embedding_dim=32)]
    body = S.Transformer(str(bert))
    if layout in ("cls", "max", "mean", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"):
        return [body, S.Pooling(32, pooling_mode=layout)]
    if layout == "cls+mean":
        return [body, S.Pooling(32, pooling_mode=("cls", "mean")), S.Normalize()]
    if layout == "dense":
        return [body, S.Pooling(32), S.Dense(32, 24), S.Normalize()]
    if layout == "two dense":
        return [body, S.Pooling(32), S.Dense(32, 64), S.Dense(64, 32, bias=False)]
    if layout == "equal dense":
        dense = S.Dense(32, 32)
        return [body, S.Pooling(32), dense, copy.deepcopy(dense)]
    if layout == "one dense twice":
        dense = S.Dense(32, 32)
        return [body, S.Pooling(32), dense, dense]
    if layout == "layers":
        body = S.Transformer(str(bert), config_kwargs={"output_hidden_states": True})
        return [body, S.WeightedLayerPooling(32, 2, 0), S.Pooling(32)]
    assert layout == "layer norm"
    return [body, S.Pooling(32), S.LayerNorm(32)]


#: Poolings of every kind are tried in tests/calibration/test_pooling.py.
LAYOUTS = [
    "mean", "max", "cls+mean", "dense", "two dense", "layer norm", "static", "equal dense", "one dense twice", "layers",
]  # fmt: skip


def saved(layout: str, bert: Path, folder: Path) -> Path:
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(modules=modules(layout, bert), device="cpu", prompts={"query": "w1 "})
    encoder.save(str(folder))
    return folder


def divergence(source: Path, artifact: Path, texts: list[str]) -> float:
    from sentence_transformers import SentenceTransformer

    one, two = (
        torch.nn.functional.normalize(
            SentenceTransformer(str(path), device="cpu").encode(texts, convert_to_tensor=True), dim=1
        )
        for path in (source, artifact)
    )
    return float((one - two).double().square().sum(1).mean() / 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_compressed_and_loads_as_it_did(layout: str, bert: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    source, out = saved(layout, bert, tmp_path / "source"), tmp_path / "out"
    done = octavo.compress(source, ratio=6, data=TEXTS, preset="fast", methods=["entropy", "keep"])
    report = done.save(out)
    assert report["quality"]["loader"] == "SentenceTransformer(path)" and report["quality"]["metric"] == "1 - cosine"
    weights = sum(file.stat().st_size for file in source.rglob("*.safetensors"))
    assert report["source"]["bytes"] <= weights <= 1.1 * report["source"]["bytes"]
    stated = report["quality"]["value"]
    held = [text for batch in done.opened.held_data for text in texts_of(batch)]
    assert 0 < stated == pytest.approx(divergence(source, out, held), rel=1e-3)
    assert SentenceTransformer(str(out), device="cpu").prompts["query"] == "w1 "
    octavo.verify(out)


def texts_of(batch: dict[str, torch.Tensor]) -> list[str]:
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [" ".join(f"w{int(token) - 2}" for token in row[mask.bool()]) for row, mask in rows]


def test_weights_of_every_folder_are_sites(bert: Path, tmp_path: Path) -> None:
    source = saved("two dense", bert, tmp_path / "source")
    done = octavo.compress(source, ratio=4, preset="data-free")
    done.save(tmp_path / "out", report=False)
    assert {"2_Dense/linear.weight", "3_Dense/linear.weight"} <= {site.name for site in done.opened.sites}
    artifact = octavo.Artifact(tmp_path / "out")
    assert {"2_Dense/model.safetensors", "3_Dense/model.safetensors"} <= set(artifact.manifest["files"])
    assert divergence(source, tmp_path / "out", TEXTS) < 0.1


def test_the_first_module_in_a_folder_of_its_own(bert: Path, tmp_path: Path) -> None:
    """Encoders saved by early versions keep the transformer in 0_Transformer."""
    source = saved("dense", bert, tmp_path / "source")
    inner = source / "0_Transformer"
    inner.mkdir()
    for file in list(source.iterdir()):
        if file.is_file() and file.name not in ("modules.json", "config_sentence_transformers.json", "README.md"):
            shutil.move(file, inner / file.name)
    listed = json.loads((source / "modules.json").read_text())
    listed[0]["path"] = "0_Transformer"
    (source / "modules.json").write_text(json.dumps(listed))
    done = octavo.compress(source, ratio=4, data=TEXTS, preset="fast")
    report = done.save(tmp_path / "out")
    held = [text for batch in done.opened.held_data for text in texts_of(batch)]
    assert report["quality"]["value"] == pytest.approx(divergence(source, tmp_path / "out", held), rel=1e-3)
    octavo.verify(tmp_path / "out")


def test_a_list_of_modules_that_leaves_the_folder_is_refused(bert: Path, tmp_path: Path) -> None:
    source = saved("dense", bert, tmp_path / "source")
    listed = json.loads((source / "modules.json").read_text())
    for path in ("../elsewhere", "/elsewhere", "a/b"):
        listed[2]["path"] = path
        (source / "modules.json").write_text(json.dumps(listed))
        with pytest.raises(octavo.RequestError, match=r"modules\.json"):
            octavo.compress(source, ratio=4, preset="data-free")


@pytest.fixture(scope="module", params=["dense", "cls+mean", "static"])
def loaded(request: pytest.FixtureRequest, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An encoder as its users load it from an artifact."""
    from sentence_transformers import SentenceTransformer

    folder = tmp_path_factory.mktemp("loaded")
    source = saved(request.param, bert, folder / "source")
    octavo.compress(source, ratio=4, preset="data-free", methods=["rtn"]).save(folder / "out")
    return SentenceTransformer(str(folder / "out"), device="cpu")


def vectors(encoder: Any) -> torch.Tensor:
    return torch.as_tensor(encoder.encode(TEXTS[:6]))


def test_a_loaded_encoder_is_saved_as_any_other(loaded: Any, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    loaded.save(str(tmp_path))
    assert not list(tmp_path.rglob("octavo.json"))
    config = tmp_path / "config.json"
    assert not config.exists() or "quantization_config" not in json.loads(config.read_text())
    again = SentenceTransformer(str(tmp_path), device="cpu")
    assert torch.equal(vectors(again), vectors(loaded))
    assert again.prompts["query"] == loaded.prompts["query"] == "w1 "


def test_a_loaded_encoder_is_copied_and_sent_to_processes(loaded: Any) -> None:
    """``start_multi_process_pool`` pickles it."""
    for again in (pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded)):
        assert torch.equal(vectors(again), vectors(loaded))


@pytest.mark.parametrize("loaded", ["dense"], indirect=True)
def test_a_pool_of_processes_encodes(loaded: Any) -> None:
    pool = loaded.start_multi_process_pool(["cpu"])
    try:
        found = torch.as_tensor(loaded.encode(TEXTS[:6], pool=pool))
    finally:
        loaded.stop_multi_process_pool(pool)
    torch.testing.assert_close(found, vectors(loaded), rtol=1e-4, atol=1e-5)


def test_prompts_are_put_before_texts(loaded: Any) -> None:
    one, other = (torch.as_tensor(loaded.encode(texts, **how)) for texts, how in (
        (TEXTS[:3], {"prompt_name": "query"}), ([f"w1 {text}" for text in TEXTS[:3]], {}),
    ))  # fmt: skip
    torch.testing.assert_close(one, other)
    assert not torch.allclose(one, torch.as_tensor(loaded.encode(TEXTS[:3])))


def test_an_encoder_with_a_prompt_of_its_own_is_measured_with_it(bert: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(
        modules=modules("mean", bert), device="cpu", prompts={"query": "w1 w2 w3 "}, default_prompt_name="query"
    )
    encoder.save(str(tmp_path / "source"))
    done = octavo.compress(tmp_path / "source", ratio=6, data=TEXTS, preset="fast", methods=["rtn"])
    report = done.save(tmp_path / "out", report=False)
    held = [text.removeprefix("w1 w2 w3 ") for batch in done.opened.held_data for text in texts_of(batch)]
    assert set(held) <= set(TEXTS)
    assert report["quality"]["value"] == pytest.approx(
        divergence(tmp_path / "source", tmp_path / "out", held), rel=1e-3
    )
    assert SentenceTransformer(str(tmp_path / "out"), device="cpu").default_prompt_name == "query"


@pytest.mark.parametrize("layout", ["dense", "layers", "static"])
def test_an_encoder_is_evaluated_as_a_whole(layout: str, bert: Path, tmp_path: Path) -> None:
    source, out = saved(layout, bert, tmp_path / "source"), tmp_path / "out"
    octavo.compress(source, ratio=4, preset="data-free").save(out, report=False)
    found = octavo.evaluate(out, against=source, data=TEXTS)
    assert 0 < found.mean == pytest.approx(divergence(source, out, TEXTS), rel=1e-3)


def test_a_sparse_encoder_with_weights_of_its_own(bert: Path, tmp_path: Path) -> None:
    import sentence_transformers.models as S
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.models import SparseAutoEncoder

    body, sparse = S.Transformer(str(bert)), SparseAutoEncoder(32, 64, k=8, k_aux=16)
    SparseEncoder(modules=[body, S.Pooling(32), sparse], device="cpu").save_pretrained(str(tmp_path / "source"))
    done = octavo.compress(tmp_path / "source", ratio=4, data=TEXTS, preset="fast")
    report = done.save(tmp_path / "out", report=False)
    held = [text for batch in done.opened.held_data for text in texts_of(batch)]
    one, two = (
        torch.nn.functional.normalize(
            SparseEncoder(str(tmp_path / name), device="cpu").encode(held, convert_to_sparse_tensor=False), dim=1
        )
        for name in ("source", "out")
    )
    assert report["quality"]["value"] == pytest.approx(float((one - two).square().sum(1).mean() / 2), rel=1e-3)
