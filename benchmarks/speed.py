"""Speed against loss on MiniLM: files that Octavo compressed for speed, next to PyTorch and onnxruntime's own int8.

Writes docs/results/speed.json. All files run in one process and take turns, one thread each, on sentences of 32 tokens;
quality is that of the files, on 512 Brown sentences that calibration never saw.
"""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import CACHE, brown, minilm, save_results
from transformers import AutoModel, AutoTokenizer

import octavo
from octavo.calibration.objective import Cosine
from octavo.runtimes.onnx.latency import compare, machine
from octavo.runtimes.onnx.sessions import Session
from octavo.sources.tokens import text_batches
from octavo.system.atomic import write_file

SPEEDUPS = (2.8, 4.0, 5.0)
BATCHES = (1, 16)
REPEATS = 3


def sentences(texts: list[str]) -> dict[str, torch.Tensor]:
    """16 test sentences cut to exactly 32 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    long = [text for text in texts if len(tokenizer(text)["input_ids"]) >= 32][:16]
    return dict(tokenizer(long, truncation=True, max_length=32, return_tensors="pt"))


class Encoder(torch.nn.Module):
    """MiniLM as torch.onnx.export takes it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def own_int8(model: torch.nn.Module, work: Path) -> dict[str, Path]:
    """onnxruntime's own dynamic quantization, per channel and per tensor, of what torch.onnx.export writes by default."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    names = ["input_ids", "attention_mask"]
    # Two tensors: one that is given twice becomes one input.
    examples = (torch.ones(2, 16, dtype=torch.int64), torch.ones(2, 16, dtype=torch.int64))
    shapes = {name: {0: "batch", 1: "tokens"} for name in names}
    plain = work / "plain.onnx"
    torch.onnx.export(
        Encoder(model).eval(), examples, plain, dynamo=True, input_names=names, external_data=False,
        output_names=["last_hidden_state"], dynamic_shapes=shapes,
    )  # fmt: skip
    files = {"onnxruntime float32, default export": plain}
    for name, per_channel in (("per channel", True), ("per tensor", False)):
        file = work / f"own-{per_channel}.onnx"
        quantize_dynamic(plain, file, per_channel=per_channel, weight_type=QuantType.QInt8)
        files[f"onnxruntime dynamic int8, {name}"] = file
    return files


def row(work: Path, calibration: list[str], speedup: float) -> dict[str, Any]:
    """One file compressed for speed, written and measured, or why it cannot be made."""
    asked = octavo.Request(
        minilm(), target="speed", speedup=speedup, data=calibration, workspace=work / "work", resume=True
    )
    try:
        report = octavo.compress(asked).save(work / f"speedup-{speedup:g}", overwrite=True)
    except octavo.BudgetError as error:
        return {"asked": speedup, "error": str(error)}
    found = report["speed"]
    return {
        "asked": speedup,
        **{key: found[key] for key in ("speedup", "seconds", "kernels", "met")},
        "divergence": found["divergence"]["mean"],
        "bytes": report["artifact"]["bytes"],
    }


def built(work: Path, calibration: list[str]) -> list[dict[str, Any]]:
    """The files compressed for speed; those of an earlier run are measured again, not made again."""
    done = work / "rows.json"
    if not done.exists():
        rows = [row(work, calibration, speedup) for speedup in SPEEDUPS]
        write_file(done, json.dumps(rows).encode())
    return list(json.loads(done.read_text()))


def main() -> None:
    torch.set_num_threads(1)
    calibration, test = brown()
    work = CACHE / "speed"
    work.mkdir(parents=True, exist_ok=True)
    model = AutoModel.from_pretrained(minilm()).eval()
    rows = built(work / "frontier", calibration)
    octavo.export(minilm(), work / "float.onnx", data=calibration, overwrite=True)
    files = {"octavo export, uncompressed": work / "float.onnx", **own_int8(model, work)}
    for row in rows:
        if "error" not in row:
            files[f"octavo, speedup {row['asked']:g} asked"] = (
                work / "frontier" / f"speedup-{row['asked']:g}" / "model.onnx"
            )
    objective, batches = Cosine(), text_batches(minilm(), test)
    reference = objective.reference(model, batches)
    alone = [
        {key: value[k : k + 1] for key, value in batch.items()}
        for batch in batches
        for k in range(len(batch["input_ids"]))
    ]
    alone_reference = [part[k : k + 1] for part in reference for k in range(len(part))]
    table: dict[str, dict[str, Any]] = {"torch float32": {}, "torch bfloat16": {}}
    sessions = {name: Session(file) for name, file in files.items()}
    for name, session in sessions.items():
        table[name] = {
            "bytes": files[name].stat().st_size,
            "loss": float(objective.measure(session, batches, reference).mean()),
            "loss_one_by_one": float(objective.measure(session, alone, alone_reference).mean()),
        }
    tokens, half, load = sentences(test), AutoModel.from_pretrained(minilm()).eval().bfloat16(), []
    for repeat in range(REPEATS):
        load.append(os.getloadavg()[0])
        for size in BATCHES:
            batch = {key: value[:size] for key, value in tokens.items()}
            calls: dict[str, Any] = {"torch float32": partial(model, **batch), "torch bfloat16": partial(half, **batch)}
            calls |= {name: partial(s.session.run, None, s.feed(batch)) for name, s in sessions.items()}
            for name, taken in compare(calls, "torch float32", rounds=21 if size == 1 else 9, seconds=5).items():
                table[name].setdefault(f"speedups_batch_{size}", []).append(taken["speedup"])
                table[name].setdefault(f"seconds_batch_{size}", []).append(taken["seconds"])
        print(f"repeat {repeat + 1} of {REPEATS}, load {load[-1]:.1f}", flush=True)
    for name, row in table.items():
        for size in BATCHES:
            for key in ("speedup", "seconds"):
                row[f"{key}_batch_{size}"] = statistics.median(
                    row[f"{key}s_batch_{size}" if key == "speedup" else f"{key}_batch_{size}"]
                )
        print(
            name, json.dumps({key: value for key, value in row.items() if not key.startswith("speedups")}), flush=True
        )
    save_results("speed", {"rows": table, "frontier": rows, "load": load, "tokens": 32, "runtime": asdict(machine(1))})


if __name__ == "__main__":
    main()
