"""Parts of docs/results.md about large models, memory, speed, sources that were quantized, and executors."""

from __future__ import annotations

from typing import Any

Results = dict[str, Any]
Table = Any


def source_of(results: Results) -> str:
    """Command, date and machine of a file of results."""
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    return f"Command: `{results['command']}`, {results['created']}. {machine}.\n"


def large(results: Results, table: Table) -> str:
    """Models larger than memory, without data."""
    rows = [
        [
            str(row["layers"]), f"{row['weights'] / 1e9:.2f}", f"{row['source_bytes'] / 1e9:.2f} GB",
            row.get("asked", "--ratio 4").removeprefix("--"), f"{row['artifact_bytes'] / 1e9:.3f} GB", f"{row['ratio']:.3f}",
            f"{row['peak_memory'] / 1e9:.2f} GB", f"{row['seconds_per_billion_weights']:.0f}", f"{row['processor_seconds_per_billion_weights']:.0f}",
        ]
        for row in results["rows"]
    ]  # fmt: skip
    head = [
        "blocks",
        "10⁹ weights",
        "source",
        "asked",
        "artifact",
        "ratio",
        "peak memory",
        "s per 10⁹",
        "processor s per 10⁹",
    ]
    return f"""## Llama-7B's shape, without data

{results["note"]}. A killed and resumed run gave the same bytes: {"yes" if results["resumed"]["same_bytes"] else "no"}.

{table(head, rows)}

{source_of(results)}"""


def large_calibrated(results: Results, table: Table) -> str:
    """Models run block by block, with data."""
    rows = [
        [
            str(row["layers"]), f"{row['weights'] / 1e9:.2f}", f"{row['peak_memory'] / 1e9:.2f} GB",
            f"{row['seconds_per_billion_weights']:.0f}", f"{row['cpu_seconds_per_billion_weights']:.0f}",
        ]
        for row in results["rows"]
    ]  # fmt: skip
    head = ["blocks", "10⁹ weights", "peak memory", "s per 10⁹", "processor s per 10⁹"]
    return f"""## 1.1 billion weights with calibration, in {results["memory_limit"]}

Random weights with the shape of TinyLlama, processed block by block, {results["setting"]}.

{table(head, rows)}

{source_of(results)}"""


def memory(results: Results, table: Table) -> str:
    """Running from packed codes."""
    rows = []
    for row in results["rows"]:
        speed = {threads: values["written"] for threads, values in row["speed"].items()}
        ratios = ", ".join(f"{v['packed'] / v['bfloat16']:.2f}" for v in speed.values())
        rows.append([
            f"{row['ratio']:g}", f"{row['stated'] / 1e6:.2f} MB", f"{row['memory']['held'] / 1e6:.2f} MB", f"{row['artifact_bytes'] / 1e6:.2f} MB",
            f"{row['kl']['packed']:.3g}", f"{row['kl']['decoded_float32']:.3g}", ratios,
        ])  # fmt: skip
    threads = " and ".join(results["rows"][0]["speed"])
    head = ["ratio", "stated", "held while running", "on disk", "KL packed", "KL decoded", "speed against bfloat16"]
    return f"""## For memory: {results["model"]}

Made with `--for memory`, and run from packed codes (`octavo.load(path, packed=True)`). Speed is that of writing tokens one by one at batch 1, compared with dense
bfloat16 in the same run, {threads}.

{table(head, rows)}

{source_of(results)}"""


def speed(results: Results, table: Table) -> str:
    """MiniLM on onnxruntime."""
    rows = [
        [
            name, f"{row['bytes'] / 1e6:.1f} MB" if "bytes" in row else "-", f"{row['loss']:.2g}" if "loss" in row else "-",
            f"{row['speedup_batch_1']:.2f}", f"{row['speedup_batch_16']:.2f}",
        ]
        for name, row in results["rows"].items()
    ]  # fmt: skip
    return f"""## For speed: all-MiniLM-L6-v2 on onnxruntime

Speed is a factor over PyTorch in float32 in the same run, with {results["tokens"]} tokens per sentence. 1 − cosine is measured on the 512 test sentences.

{table(["runtime", "file", "1 − cosine", "batch 1", "batch 16"], rows)}

{source_of(results)}"""


def lossless(results: Results, table: Table) -> str:
    """Sources that were already quantized."""
    rows = [
        [
            f"{name}, {kind}", f"{model['file_bytes'] / 1e6:.2f} MB", f"{row['bytes'] / 1e6:.2f} MB", f"{1 - row['bytes'] / model['file_bytes']:.1%}",
            f"{row['recovered']} of {row['sites']}", f"{row['kl']:g}", "yes" if row["logits_equal"] else "no",
        ]
        for name, model in results["models"].items()
        for kind, row in (("from its GGUF", model["gguf"]), ("from floats", model["floats"]))
    ]  # fmt: skip
    head = ["source", "GGUF file", "artifact", "smaller by", "grids recovered", "KL", "logits identical"]
    return f"""## Sources that were already quantized

{table(head, rows)}

{source_of(results)}"""


def loading(results: Results, table: Table) -> str:
    """Decoding a language model."""
    rows = [
        [
            f"{row['bytes'] / 1e6:.2f} MB", ", ".join(f"{n} {form}" for form, n in row["forms"].items()), f"{row['seconds']['artifact']:.2f} s",
            f"{row['weights_per_second']['artifact'] / 1e6:.0f}", f"{row['weights_per_second']['original'] / 1e6:.0f}",
        ]
        for row in results["rows"]
    ]  # fmt: skip
    head = ["artifact", "forms", "read and decoded", "million weights/s", "original, million weights/s"]
    return f"""## Loading {results["model"]}

{table(head, rows)}

{source_of(results)}"""


def executors(results: Results, table: Table) -> str:
    """Threads and Ray workers."""
    rows = [
        [row["executor"], f"{row['profile']:.1f} s", f"{row['encode']:.1f} s", f"{row['speedup']:.2f}"]
        for row in results["rows"]
    ]
    return f"""## Executors: MiniLM to an eighth

All executors gave the same bytes: {"yes" if results["same_bytes"] else "no"}.

{table(["executor", "profile", "encode", "speed-up"], rows)}

{source_of(results)}"""


#: By the name of the results, in the order of the page.
PARTS = {
    "lossless": lossless, "loading": loading, "memory": memory, "speed": speed, "large": large,
    "large-calibrated": large_calibrated, "executors": executors,
}  # fmt: skip
