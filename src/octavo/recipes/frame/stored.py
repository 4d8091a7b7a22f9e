"""Measurements through a file: forms are written as an artifact, its bytes counted, and the weights read back."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from octavo.artifact import Artifact, Contents, Entry, Kept, pack
from octavo.calibration.evidence import Evidence
from octavo.forms import Dense, Form, with_leaves
from octavo.methods.quantize.entropy import Entropy
from octavo.sources.sites import Layout
from octavo.sources.source import from_module
from octavo.system.raw import narrowed


@dataclass(frozen=True)
class Stored:
    """The content read back from a file.

    Parameters
    ----------
    bytes
        Bytes of all files of the artifact.
    tensors
        The state dict of the module, decoded from the file.
    """

    bytes: int
    tensors: dict[str, Tensor]

    def load(self, module: nn.Module) -> nn.Module:
        """The module with these weights, ready to be evaluated."""
        module.load_state_dict(self.tensors)
        return module.eval()


def through_file(
    module: nn.Module,
    forms: Mapping[str, Form] | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    layouts: Mapping[str, Layout] | None = None,
) -> Stored:
    """Write a module as an artifact and read it back.

    Parameters
    ----------
    forms
        Forms of weights by parameter name; every other floating tensor is stored in ``dtype``, and so are the dense
        leaves of the forms.
    layouts
        Layouts of weights whose matrix is not (outputs, everything else).
    """
    source = from_module(module)
    narrow = {name: with_leaves(form, lambda leaf: _narrowed(leaf, dtype)) for name, form in (forms or {}).items()}
    contents = Contents(
        {"title": source.title, "fingerprint": "0" * 64, "bytes": source.original_bytes, "weights": source.weights}
    )
    for name, shape in source.shapes.items():
        original = source.dtypes[name]
        if name in narrow:
            contents.entries[name] = Entry(pack(narrow[name]), shape, original, (layouts or {}).get(name, Layout()))
        else:
            stored = dtype if original.is_floating_point else original
            contents.kept[name] = Kept(lambda name=name: source.read(name), shape, stored, original)  # type: ignore[misc]
    contents.aliases.update(source.aliases)
    with tempfile.TemporaryDirectory(prefix="octavo-") as folder:
        contents.write(Path(folder))
        artifact = Artifact(Path(folder))
        return Stored(artifact.bytes, dict(artifact.state()))


def quantized(form: Form, bits: float) -> Form:
    """Quantize every dense leaf of a form with entropy-constrained quantization, at about ``bits`` per weight."""

    def quantize(leaf: Form) -> Form:
        if not isinstance(leaf, Dense):
            return leaf
        weight, plain = leaf.weight.float(), Evidence(torch.ones(len(leaf.weight)), None)
        (setting,) = Entropy(levels=(bits,)).settings(weight, plain)
        return Entropy().encode(weight, setting, plain)

    return with_leaves(form, quantize)


def _narrowed(leaf: Form, dtype: torch.dtype) -> Form:
    return Dense(narrowed(leaf.weight, dtype)) if isinstance(leaf, Dense) else leaf
