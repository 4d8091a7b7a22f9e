"""Data of studies: found in the folders of OCTAVO_DATA, split without overlap, with a digest of the content."""

import gzip

import numpy as np
import pytest
import torch

from octavo.errors import RequestError
from octavo.recipes.frame import Lab, Study, data
from octavo.recipes.frame.bases import images
from octavo.recipes.frame.nets import augmented, shuffled
from octavo.recipes.testbeds import ctr

LAB = Lab(Study("none", system="", source="", metric="", higher=True, data="", claims={}), quick=True)
FULL = Lab(LAB.study)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two folders of data, of which the second has small Fashion-MNIST and two texts."""
    place = tmp_path / "second" / "fashion-mnist"
    place.mkdir(parents=True)
    for name, count in (("train", 5_040), ("t10k", 30)):
        pixels = np.arange(count * 784, dtype=np.uint32).astype(np.uint8).tobytes()
        (place / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels, 1))
        (place / f"{name}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(bytes(8) + bytes(k % 10 for k in range(count)))
        )
    text = tmp_path / "second" / "text"
    text.mkdir()
    for name in "ab":
        (text / f"{name}.txt").write_text("".join(f"{name} line {number:05d} {'x' * 80}\n" for number in range(25_000)))
    monkeypatch.setenv("OCTAVO_DATA", f"{tmp_path / 'first'}:{tmp_path / 'second'}")
    data._fashion.cache_clear()
    yield tmp_path
    data._fashion.cache_clear()


def test_folders_are_searched_in_turn_and_what_is_missing_is_told(folders):
    assert data.file("text").parent.name == "second"
    with pytest.raises(RequestError, match=r"no folder of '.*second' holds sst2-train.tsv; docs/adding-a-recipe.md"):
        data.sentiment(FULL)


def test_images_are_normalised_and_the_last_are_for_choices(folders):
    split = data.fashion(FULL)
    assert [len(part[1]) for part in (split.train, split.development, split.test)] == [40, 5_000, 30]
    assert split.train[0].shape == (40, 1, 28, 28) and split.train[0].abs().max() < 3
    assert torch.equal(split.development[1][:3], torch.tensor([0, 1, 2]))
    few = data.fashion(FULL, 8)
    assert torch.equal(few.train[0], split.train[0][:8]) and few.digest != split.digest


def test_text_is_dealt_in_pieces_that_do_not_overlap(folders):
    parts = data.texts(FULL)
    lines = [set(part.splitlines()) for part in (parts.train, parts.development, parts.test)]
    assert sum(map(len, lines)) == len(set.union(*lines)) == 50_000
    assert all({line[0] for line in part} == {"a", "b"} for part in lines)
    assert 0.8 < len(parts.train) / len("".join([parts.train, parts.development, parts.test])) < 0.9


def test_passages_know_the_text_that_they_are_from(folders):
    split = data.origins(FULL, words=4, vocabulary=50, each=400)
    parts = (split.train, split.development, split.test)
    assert [len(y) for _, y in parts] == [560, 80, 160] and split.classes == 2
    x, y = split.train
    # Every line begins with the name of its text; of the words of a line only few are known by number.
    assert x.shape == (560, 4) and int(x.max()) < 50 and y.bincount().tolist() == [280, 280]
    assert set(x[y == 0].flatten().tolist()) != set(x[y == 1].flatten().tolist())


def test_quick_runs_need_no_files_and_share_their_images(monkeypatch):
    monkeypatch.setenv("OCTAVO_DATA", "nowhere")
    assert data.fashion(LAB) is data.cifar10(LAB) is images(LAB, "cifar10")
    for parts in (data.texts(LAB), data.sentiment(LAB), data.likeness(LAB), ctr.clicks(LAB)):
        assert len(parts.digest) == 64 and all(len(part) for part in (parts.train, parts.development, parts.test))


def test_clicks_are_shuffled_on_demand():
    plain, mixed = ctr.clicks(LAB), ctr.clicks(LAB, shuffle=1)
    assert plain.digest != mixed.digest and plain.sizes == mixed.sizes
    both = [
        torch.cat([part[1] for part in (parts.train, parts.development, parts.test)]).sum() for parts in (plain, mixed)
    ]
    assert both[0] == both[1]


def test_crossed_fields_are_pairs_of_values_that_occur():
    plain = ctr.clicks(LAB)
    crossed = ctr.crossed(plain, [(0, 2)])
    assert crossed.names[-1] == "user and context" and crossed.digest != plain.digest
    fields = torch.cat([part[0] for part in (crossed.train, crossed.development, crossed.test)])
    assert torch.equal(crossed.train[0][:, :-1], plain.train[0]) and torch.equal(crossed.test[1], plain.test[1])
    pairs = fields[:, [0, 2, 3]].unique(dim=0)
    assert len(pairs) == len(pairs[:, :2].unique(dim=0)) == len(pairs[:, 2].unique()) == crossed.sizes[-1]


def test_augmented_images_are_shifted_and_mirrored_ones_of_the_same_order():
    x, y = torch.rand(64, 2, 8, 8) + 1, torch.arange(64)
    plain, changed = (
        list(batches(3)) for batches in (shuffled(x, y, size=16, seed=5), augmented(x, y, size=16, seed=5))
    )
    assert len(plain) == len(changed) == 4
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    found = set()
    for (_, number), (image, same) in zip(plain, changed, strict=True):
        assert torch.equal(number, same)
        for which, one in zip(same, image, strict=True):
            places = {
                (mirrored, down, right)
                for mirrored in (False, True)
                for down in range(5)
                for right in range(5)
                if torch.equal(one, padded[which, :, down : down + 8, right : right + 8].flip(-1) if mirrored
                               else padded[which, :, down : down + 8, right : right + 8])
            }  # fmt: skip
            assert len(places) == 1
            found |= places
    assert len(found) > 20
