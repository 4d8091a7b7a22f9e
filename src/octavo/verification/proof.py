"""Loads a written artifact as its users do, checks that it loads completely, and measures its distance from the source.

The quality of an artifact is measured on this model only. If it cannot be loaded or measured, the proof says why and
has no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from octavo.allocation.opened import Run
from octavo.artifact import Artifact, dtype_name
from octavo.calibration.inmemory import scratch
from octavo.errors import ArtifactError, MissingExtraError
from octavo.integrations.transformers import load_as_users_do
from octavo.sources.encoders import load_encoder
from octavo.sources.memory import fits
from octavo.sources.model_classes import is_known, read_config, require_transformers
from octavo.sources.names import names_of
from octavo.sources.sentences import members, transformer_folder
from octavo.sources.skeletons import skeleton
from octavo.system.raw import Lazily
from octavo.verification.loading import load
from octavo.verification.probes import Outputs, probe

#: Verification compares in float32, whatever the dtype of the model.
_WIDE = {"dtype": torch.float32}
_UNCOMPARED = "no data were given, so only the weights could be compared"
#: Number of keys that an error shows.
_SHOWN = 3


@dataclass(frozen=True)
class Proof:
    """Findings on the loaded model.

    Parameters
    ----------
    loader
        The call that loaded it, as a user writes it; empty if it was not loaded.
    losses
        Divergence of every held-out example from the source, or None.
    why
        Why nothing was measured; empty if it was.
    outputs
        Outputs on a fixed input, for :func:`octavo.verification.verifying`; None if the model takes no such input.
    """

    loader: str = ""
    losses: Tensor | None = None
    why: str = ""
    outputs: Outputs | None = None


def prove(run: Run, artifact: Artifact) -> Proof:
    """Load an artifact as its users do, and measure it on the held-out data.

    Raises
    ------
    ArtifactError
        If the artifact leaves a part of the model unfilled, or has a tensor that the model does not use, unlike the
        source.
    """
    source = run.opened.source
    if source.is_transformers and source.folder is not None:
        try:
            return _of_folder(run, artifact, source.folder)
        except MissingExtraError as error:
            return Proof(why=str(error))
    if source.is_encoder:
        encoder = load_encoder(artifact.path)
        return (
            Proof("SentenceTransformer(path)", run.judge(encoder)) if run.opened.measurable else Proof(why=_UNCOMPARED)
        )
    if source.module is None:
        return Proof(why="no data were given" if source.path is None else "bare tensors have no model to run")
    if not run.opened.held_data:
        return Proof(why="no data were given")
    module = source.module
    with scratch(module) as old:
        load(artifact.path, into=module)
        losses = run.judge(module, old)
        return Proof("octavo.load(path, into=module)", losses)


def _of_folder(run: Run, artifact: Artifact, folder: Path) -> Proof:
    source = run.opened.source
    require_transformers()
    inner = transformer_folder(folder)
    if not is_known(inner):
        return Proof(why="transformers does not know the architecture; its code is copied but never run here")
    if source.is_skeleton or (source.module is None and not fits(source, run.opened.memory)):
        return _block_by_block(run, artifact)
    # A folder's model runs in float32; a module given in memory runs unchanged, and where it is.
    own = next((p for p in source.module.parameters() if p.is_floating_point()), None) if source.module else None
    options = {"dtype": own.dtype} if own is not None else {}
    loaded = load_as_users_do(artifact.path / inner.relative_to(folder), options)
    if own is not None:
        loaded.model.to(own.device)
    _check_keys(artifact.path, loaded.missing, loaded.unexpected, source.unfilled, source.unused)
    if members(folder):
        encoder = load_encoder(artifact.path)
        outputs = probe(load_as_users_do(artifact.path / inner.relative_to(folder), _WIDE).model)
        if run.opened.measurable:
            whole = encoder if source.is_encoder else loaded.model
            return Proof("SentenceTransformer(path)", run.judge(whole), outputs=outputs)
        return Proof("SentenceTransformer(path)", why=_UNCOMPARED, outputs=outputs)
    said = "" if own is None else _dtype_said(artifact.path / inner.relative_to(folder), own.dtype)
    loader = f"{type(loaded.model).__name__}.from_pretrained(path{said})"
    losses = run.judge(loaded.model) if run.opened.measurable else None
    # The outputs that are recorded are those on the CPU.
    loaded.model.to("cpu")
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in loaded.model.parameters()):
        loaded = load_as_users_do(artifact.path / inner.relative_to(folder), _WIDE)
    return Proof(loader, losses, "" if run.opened.measurable else _UNCOMPARED, probe(loaded.model))


def _dtype_said(folder: Path, dtype: torch.dtype) -> str:
    """The argument that a user must give to load a folder in this dtype; empty if its config names it."""
    config = read_config(folder)
    stated = str(config.get("dtype") or config.get("torch_dtype") or dtype_name(dtype)).removeprefix("torch.")
    return "" if stated == dtype_name(dtype) else f", dtype=torch.{dtype_name(dtype)}"


def _block_by_block(run: Run, artifact: Artifact) -> Proof:
    """Prove a model that does not fit in memory: names are matched on a skeleton, and blocks run one by one."""
    model = skeleton(transformer_folder(artifact.path))
    found = names_of(model, artifact.loadable_shapes())
    _check_keys(artifact.path, found.missing, found.unused, run.opened.source.unfilled, run.opened.source.unused)
    loader = f"{type(model).__name__}, block by block"
    if not run.opened.measurable:
        return Proof(loader, why=_UNCOMPARED)
    losses = run.measure(Lazily({name: partial(artifact.stored, name) for name in artifact.names()}))
    return Proof(loader, losses)


def _check_keys(
    path: Path, missing: Sequence[str], unexpected: Sequence[str], unfilled: Sequence[str], unused: Sequence[str]
) -> None:
    lacking = sorted(set(missing) - set(unfilled))
    if lacking:
        raise ArtifactError(
            f"{path}: the artifact does not fill {len(lacking)} tensors of the model: {', '.join(lacking[:_SHOWN])}; "
            "this is a bug in Octavo, please report it with the model's config.json"
        )
    if len(unexpected) > len(unused):
        raise ArtifactError(
            f"{path}: the model does not use {len(unexpected)} tensors of the artifact, but {len(unused)} of the "
            f"source: {', '.join(sorted(unexpected)[:_SHOWN])}; this is a bug in Octavo, please report it"
        )
