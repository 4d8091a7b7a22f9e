"""How long llama.cpp takes for a weight of every type, as it generates: the times in octavo/coding/ggml.py.

`python benchmarks/llama_times.py --tools BUILD/bin` writes docs/results/gguf-times.json. A Llama of 103 million random
weights, which are more than any cache holds, gets one type at a time; files are measured in turn, on one thread.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from common import save_results
from llama_files import Tools

import octavo
from octavo.coding.ggml import TYPES

#: Names of llama-quantize, where they are not those of the types.
_MIXES = {"q5_k": "Q5_K_S", "q4_k": "Q4_K_S", "q3_k": "Q3_K_S"}
_ROUNDS = 5


def source(folder: Path) -> Path:
    """The float16 file of the random Llama."""
    from decoder import tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=2048, intermediate_size=5632, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=16, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(folder / "source")
    tokenizer(Path(__file__).read_text(encoding="utf-8"), config.vocab_size).save_pretrained(folder / "source")
    done = octavo.compress(folder / "source", target="gguf", bits=16.5, methods=["keep"], preset="data-free")
    done.save(folder / "plain")
    return folder / "plain" / "model.gguf"


def main() -> None:
    """Measure all types and save their times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tools", type=Path, required=True, help="folder of llama.cpp's programs")
    tools = Tools(parser.parse_args().tools, threads=1, context=512)
    with tempfile.TemporaryDirectory(prefix="octavo-") as aside:
        plain = source(Path(aside))
        files = {"float16": plain}
        for name in TYPES:
            files[name] = Path(aside) / f"{name}.gguf"
            tools.call("quantize", "--pure", plain, files[name], _MIXES.get(name, name.upper()), 1)
        speeds = dict(zip(files, tools.speeds(list(files.values()), _ROUNDS), strict=True))
    times = {name: round(speeds["q4_0"] / speed, 2) for name, speed in speeds.items()}
    for name, time in sorted(times.items(), key=lambda item: item[1]):
        used = TYPES[name].time if name in TYPES else None
        print(f"{name:8} {time:.2f}", "" if used is None else f"(in use: {used:.2f})", flush=True)
    save_results("gguf-times", {"times": times, "tokens_per_second": speeds}, "--tools BUILD/bin")


if __name__ == "__main__":
    main()
