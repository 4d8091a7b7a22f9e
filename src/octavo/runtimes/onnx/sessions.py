"""``onnx`` and ``onnxruntime``: opening exported files and running them like modules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from octavo.errors import ArtifactError, MissingExtraError, RequestError

#: The metadata key of a file for the kernel of every site.
NOTE = "octavo"


def require() -> tuple[Any, Any]:
    """The modules ``onnx`` and ``onnxruntime``.

    Raises
    ------
    MissingExtraError
        If one of them, or ``onnxscript`` (needed for torch's export), is not installed.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"this needs onnx, onnxruntime and onnxscript, and {error.name} is not installed: "
            "pip install 'octavo[onnx]'"
        ) from error
    return onnx, onnxruntime


class Session(nn.Module):
    """An ONNX file run by onnxruntime on the CPU, called like the original module.

    Parameters
    ----------
    model
        A file, or a serialized model.
    threads
        Threads that one operation may use; those of torch by default.

    Raises
    ------
    ArtifactError
        If onnxruntime cannot load it.
    """

    def __init__(self, model: str | Path | bytes, *, threads: int | None = None) -> None:
        super().__init__()
        _, runtime = require()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        # Warnings of its optimizer only concern authors of the graph.
        options.log_severity_level = 3
        # Without VNNI, products of unsigned inputs and signed weights overflow 16 bits; weights are made unsigned then.
        options.add_session_config_entry("session.x64quantprecision", "1")
        try:
            self.session = runtime.InferenceSession(
                model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            # Its exceptions have no common base class.
            name = "the model" if isinstance(model, bytes) else model
            raise ArtifactError(f"{name}: onnxruntime cannot load it: {error}; export the model again") from error
        self.inputs = [item.name for item in self.session.get_inputs()]
        self.names = [item.name for item in self.session.get_outputs()]

    @property
    def kernels(self) -> dict[str, str]:
        """Maps site names to kernels, as recorded in the file."""
        note = self.session.get_modelmeta().custom_metadata_map.get(NOTE)
        try:
            return dict(json.loads(note or "")["kernels"])
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"the model does not record its kernels: {error}; export it again") from error

    def feed(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The graph's inputs from a batch, as arrays; without a mask there is no padding."""
        given = dict(batch)
        if "attention_mask" in self.inputs and "input_ids" in given:
            given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
        missing = [name for name in self.inputs if name not in given]
        if missing:
            raise RequestError(
                f"the exported model takes {', '.join(self.inputs)}, but the batch lacks {', '.join(missing)}; add it"
            )
        return {name: given[name].numpy() for name in self.inputs}

    def forward(self, *values: Tensor, **batch: Tensor) -> Any:
        """Outputs under the names of the source, ``last_hidden_state`` or ``logits``."""
        from transformers.utils import ModelOutput

        arrays = self.session.run(None, self.feed({**dict(zip(self.inputs, values, strict=False)), **batch}))
        return ModelOutput({name: torch.from_numpy(array) for name, array in zip(self.names, arrays, strict=True)})
