"""Folders of images and of sounds as calibration data: their files, and their content as processors take it."""

from __future__ import annotations

import os
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.errors import MissingExtraError, RequestError
from octavo.system.paths import reason

#: Endings of files by what they hold. WAV files are read by Python itself.
ENDINGS = {
    "image": (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    "audio": (".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff"),
}
#: A longer sound is cut: calibration gains little from one that is longer than what speech models read at once.
SECONDS = 30


@dataclass(frozen=True)
class Item:
    """A file of a folder, and the text of the file beside it with the same name and the ending ``.txt``."""

    file: Path
    text: str | None


def items_in(folder: Path, sense: str, *, most: int | None = None) -> list[Item]:
    """The files of a folder and its sub-folders that hold images or sounds, sorted by name.

    Parameters
    ----------
    sense
        ``image`` or ``audio``.
    most
        Largest number of files; they are then spread evenly over the folder.
    """
    files = [file for file in media_files(folder) if file.suffix.lower() in ENDINGS[sense]]
    if most is not None and len(files) > most:
        files = [files[index * len(files) // most] for index in range(most)]
    return [Item(file, _text(file.with_suffix(".txt"))) for file in files]


def media_files(folder: Path) -> list[Path]:
    """Images, sounds and their texts in a folder and its sub-folders, except hidden ones."""
    known = (*ENDINGS["image"], *ENDINGS["audio"])

    def walk() -> Iterator[Path]:
        for place, folders, names in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            found = [Path(place, name) for name in sorted(names) if not name.startswith(".")]
            media = [file for file in found if file.suffix.lower() in known]
            stems = {file.stem for file in media}
            yield from media
            yield from (file for file in found if file.suffix == ".txt" and file.stem in stems)

    return list(walk())


def image(file: Path) -> Any:
    """An image in RGB.

    Raises
    ------
    MissingExtraError
        If Pillow is not installed.
    RequestError
        If the file cannot be read.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError(f"{file}: reading images needs Pillow: pip install 'octavo[media]'") from error
    try:
        with Image.open(file) as opened:
            return opened.convert("RGB")
    except Exception as error:
        # Pillow's readers may raise any exception for a damaged file.
        raise RequestError(f"{file}: cannot be read as an image: {error}; repair or remove it") from error


def sound(file: Path, rate: int) -> Tensor:
    """A sound as one channel (samples,) of floats from -1 to 1, at most :data:`SECONDS` long.

    Parameters
    ----------
    rate
        Samples per second that are wanted. A sound of another rate is resampled by its spectrum.

    Raises
    ------
    MissingExtraError
        If it is not a WAV file of integers, and soundfile is not installed.
    RequestError
        If the file cannot be read.
    """
    samples, found = _wav(file) or _other(file)
    if not len(samples):
        raise RequestError(f"{file}: holds no sound; remove it")
    samples = samples[: SECONDS * found].mean(1)
    if found == rate:
        return samples
    count = max(1, round(len(samples) * rate / found))
    spectrum = torch.fft.rfft(samples.double())[: count // 2 + 1]
    return (torch.fft.irfft(spectrum, count) * (count / len(samples))).float()


def _wav(file: Path) -> tuple[Tensor, int] | None:
    """Samples (samples, channels) and rate of a WAV file of integers; None for any other."""
    try:
        with wave.open(str(file), "rb") as opened:
            width, channels, rate = opened.getsampwidth(), opened.getnchannels(), opened.getframerate()
            content = opened.readframes(SECONDS * rate)
    except (wave.Error, EOFError, OSError):
        return None
    if channels < 1 or rate < 1 or not 1 <= width <= 4:
        return None
    whole = len(content) // (width * channels) * width * channels
    if not whole:
        return torch.zeros(0, channels), rate
    octets = torch.frombuffer(bytearray(content[:whole]), dtype=torch.uint8).reshape(-1, channels, width).long()
    values = (octets << torch.arange(0, 8 * width, 8)).sum(-1)
    half = 1 << (8 * width - 1)
    # Samples of one byte are unsigned, all others have a sign.
    values = values - half if width == 1 else (values + half) % (2 * half) - half
    return values.float() / half, rate


def _other(file: Path) -> tuple[Tensor, int]:
    """Samples (samples, channels) and rate of a file that the package soundfile reads."""
    try:
        import soundfile
    except ImportError as error:
        raise MissingExtraError(
            f"{file}: is not a WAV file of integers; other sounds need soundfile: pip install 'octavo[media]'"
        ) from error
    try:
        with soundfile.SoundFile(file) as opened:
            rate = int(opened.samplerate)
            return torch.from_numpy(opened.read(SECONDS * rate, dtype="float32", always_2d=True)), rate
    except Exception as error:
        # libsndfile's errors have classes of their own.
        raise RequestError(f"{file}: cannot be read as sound: {error}; repair or remove it") from error


def _text(file: Path) -> str | None:
    """The text of a file in one line; None if it does not exist."""
    try:
        return " ".join(file.read_text(encoding="utf-8-sig").split()) if file.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file}: cannot be read as UTF-8 text: {reason(error)}; save it as UTF-8") from error


def texts_of_all(items: Sequence[Item]) -> list[str] | None:
    """The texts of items; None if none has one.

    Raises
    ------
    RequestError
        If some have a text and others have none.
    """
    lacking = [item.file for item in items if item.text is None]
    if len(lacking) == len(items):
        return None
    if lacking:
        raise RequestError(
            f"{lacking[0]}: has no text beside it, and {len(items) - len(lacking)} other files have one; write "
            f"{lacking[0].with_suffix('.txt').name}, or remove the other texts"
        )
    return [item.text or "" for item in items]
