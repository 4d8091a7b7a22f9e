"""Folders of images and sounds: which files count, what is read from them, and what is refused."""

import math
import sys
import wave

import pytest
import torch
from PIL import Image

from octavo.errors import MissingExtraError, RequestError
from octavo.sources.media import SECONDS, image, items_in, sound, texts_of_all


def tone(count, rate, pitch=100.0):
    return torch.sin(2 * math.pi * pitch * torch.arange(count) / rate) / 2


def write_wav(file, samples, rate, width=2):
    """Samples (samples, channels) as a WAV file of integers."""
    half = 1 << (8 * width - 1)
    codes = (samples.double() * half).round().long().clamp(-half, half - 1) + (half if width == 1 else 0)
    content = b"".join(int(code).to_bytes(width, "little", signed=width > 1) for code in codes.flatten())
    with wave.open(str(file), "wb") as opened:
        opened.setnchannels(samples.shape[1]), opened.setsampwidth(width), opened.setframerate(rate)
        opened.writeframes(content)
    return file


def test_images_and_sounds_are_found_in_order_with_their_texts(tmp_path):
    (tmp_path / "deep" / ".hidden").mkdir(parents=True)
    for name in ("b.PNG", "a.jpg", "deep/c.webp", "deep/.hidden/d.png", ".e.png", "f.wav", "notes.md"):
        (tmp_path / name).touch()
    (tmp_path / "a.txt").write_text("a  cat\non a mat\n")
    items = items_in(tmp_path, "image")
    assert [item.file.name for item in items] == ["a.jpg", "b.PNG", "c.webp"]
    assert [item.text for item in items] == ["a cat on a mat", None, None]
    assert [item.file.name for item in items_in(tmp_path, "audio")] == ["f.wav"]
    with pytest.raises(RequestError, match=r"b.PNG: has no text beside it, and 1 other files have one; write b.txt"):
        texts_of_all(items)
    assert texts_of_all(items[1:]) is None and texts_of_all(items[:1]) == ["a cat on a mat"]


def test_a_limit_takes_files_from_the_whole_folder(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.png").touch()
    assert [item.file.stem for item in items_in(tmp_path, "image", most=3)] == ["0", "3", "6"]


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_files_of_every_width_and_several_channels(width, tmp_path):
    one = tone(800, 8000)
    file = write_wav(tmp_path / "tone.wav", torch.stack([one, one / 2], 1), 8000, width)
    torch.testing.assert_close(sound(file, 8000), 0.75 * one, rtol=0, atol=2.0 ** (2 - 8 * width) + 1e-7)


@pytest.mark.parametrize("rate", [16000, 8000, 4000, 11000])
def test_sounds_are_resampled(rate, tmp_path):
    file = write_wav(tmp_path / "tone.wav", tone(800, 8000)[:, None], 8000)
    found = sound(file, rate)
    assert len(found) == rate // 10
    # A whole number of periods has no edges.
    torch.testing.assert_close(found, tone(len(found), rate), rtol=0, atol=1e-3)


def test_long_sounds_are_cut(tmp_path):
    file = write_wav(tmp_path / "long.wav", torch.zeros(100 * (SECONDS + 5), 1), 100)
    assert len(sound(file, 100)) == 100 * SECONDS


def test_images_are_read_in_colour(tmp_path):
    Image.new("L", (5, 4), 7).save(tmp_path / "grey.png")
    found = image(tmp_path / "grey.png")
    assert found.size == (5, 4) and found.getpixel((0, 0)) == (7, 7, 7)


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(RequestError, match=r"bad.png: cannot be read as an image"):
        image(tmp_path / "bad.png")
    with pytest.raises(RequestError, match=r"none.wav: holds no sound; remove it"):
        sound(write_wav(tmp_path / "none.wav", torch.zeros(0, 1), 8000), 8000)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(RequestError, match=r"bad.txt: cannot be read as UTF-8 text"):
        items_in(tmp_path, "image")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    (tmp_path / "song.mp3").write_bytes(b"ID3")
    with pytest.raises(MissingExtraError, match=r"song.mp3.*pip install 'octavo\[media\]'"):
        sound(tmp_path / "song.mp3", 8000)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"bad.png.*pip install 'octavo\[media\]'"):
        image(tmp_path / "bad.png")
