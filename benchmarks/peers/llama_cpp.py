"""llama.cpp: its k-quants, with an importance matrix from the calibration text, and the file that the model came in."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from models import ENCODER, PHOTOS, SPEECH
from torch import Tensor, nn

from peers.base import Compressed, Task

PACKAGES: list[str] = []
#: Comes with the model packages, so it is in the environment of the benchmark itself.
PACKAGE = "llama-cpp-python"

#: Names of matrices in GGUF files and in transformers.
_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def settings(model: str) -> dict[str, dict[str, Any]]:
    """The file as it comes, and the usual mixes. Widths that k-quants do not divide fall back to larger formats."""
    mixes = {"Q8_0": 7, "Q4_K_M": 15, "Q3_K_M": 12, "Q2_K": 10}
    if model in (ENCODER, SPEECH, PHOTOS):
        mixes = {"Q4_K_M": 15}
    found = {f"{name} imatrix": {"kind": kind} for name, kind in mixes.items()}
    # The other files that come are in use as they are.
    return {"GGUF as it comes": {"kind": None}} | found if model in ("smollm2", "gemma") else found


def compress(task: Task, kind: int | None) -> Compressed:
    """Quantize the GGUF file that the float32 model was made from, and read it as transformers reads it."""
    from gguf import GGUFReader
    from models import gguf_file
    from transformers import AutoModelForCausalLM

    source = gguf_file(task.model)
    file = source if kind is None else task.scratch / "model.gguf"
    if kind is not None:
        _quantize(source, file, kind, task)
    made = Compressed(runtime=_runtime(file))
    state = dict(
        AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).named_parameters()
    )
    for tensor in GGUFReader(file).tensors:
        if len(tensor.shape) == 2:
            name = _transformers_name(tensor.name)
            made.add(name, state[name], 8 * int(tensor.n_bytes))
    return made


def _transformers_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    _, block, kind, _ = name.split(".")
    return f"model.layers.{block}.{_NAMES[kind]}.weight"


def _quantize(source: Path, file: Path, kind: int, task: Task) -> None:
    import llama_cpp

    importance = _importance(task)
    # The library takes an array that ends with an entry without a name.
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, squares) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = name.encode(), len(squares)
        entry.data = ctypes.cast(squares.data_ptr(), ctypes.POINTER(ctypes.c_float))
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread, options.allow_requantize = kind, torch.get_num_threads(), True
    options.imatrix = entries
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(options))
    if failed:
        raise RuntimeError(f"llama_model_quantize returned {failed}")


def _importance(task: Task) -> dict[str, Tensor]:
    """Mean square of every input of every matrix, by its name in GGUF: what `llama-imatrix` gathers."""
    model = task.load()
    sums: dict[str, Tensor] = {}
    count = sum(sequence["input_ids"].numel() for sequence in task.sequences())

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + args[0].flatten(0, -2).square().sum(0) / count

        return hook

    for number, layer in enumerate(model.model.layers):
        for short, path in _NAMES.items():
            layer.get_submodule(path).register_forward_pre_hook(watch(f"blk.{number}.{short}.weight"))
    with torch.inference_mode():
        for sequence in task.sequences():
            model(**sequence)
    return {name: squares.contiguous() for name, squares in sums.items()}


def _runtime(file: Path) -> Any:
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=512, n_threads=torch.get_num_threads(), n_threads_batch=torch.get_num_threads(), logits_all=True, verbose=False)  # fmt: skip

    def run(batch: dict[str, Tensor]) -> None:
        model.reset()
        model.eval(batch["input_ids"][0].tolist())

    return run
