"""Verifying artifacts: sizes, checksums, decoded weights and outputs."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.artifact import Artifact, dtype_name
from octavo.artifact.deltas import on_base
from octavo.errors import ArtifactError
from octavo.integrations.transformers import load_as_users_do
from octavo.runtimes.packed import held_bytes
from octavo.sources.encoders import is_installed, load_encoder
from octavo.sources.sentences import members, transformer_folder
from octavo.sources.source import StepProgress
from octavo.system.ahead import in_order
from octavo.system.raw import raw_bytes
from octavo.verification.foreign import is_foreign, verify_foreign
from octavo.verification.loading import load
from octavo.verification.probes import TOLERANCE as OUTPUTS_TOLERANCE
from octavo.verification.probes import Outputs, first_output, probe
from octavo.verification.recorded import Digests, recorded_beside
from octavo.verification.verified import PackedRun, Verified

#: Packed weights may change outputs by this many times the effect of rounding them to bfloat16.
_TOLERANCE = 2.0


def digest_of(artifact: Artifact, progress: StepProgress = lambda done, total: None) -> str:
    """SHA-256 over the decoded content of every tensor: codes, scales, factors and their meaning.

    A few tensors are in memory at a time. The digest is equal on all machines, unlike one of products, whose rounding
    depends on the machine's library.
    """
    digest = hashlib.sha256()
    names = sorted(artifact.names())

    def given(name: str) -> str:
        """How a site's parts are interpreted; other tensors need no such entry."""
        if name not in artifact.sites:
            return ""
        layout = artifact.layout(name)
        kind = f"{layout.kind} {layout.groups} {layout.exponent}"
        return f" {artifact.sites[name]['shape']} {dtype_name(artifact.dtype(name))} {kind}"

    def decoded(name: str) -> dict[str, Tensor]:
        return artifact.form(name).tensors() if name in artifact.sites else {"": artifact.stored(name)}

    for done, (name, parts) in enumerate(zip(names, in_order(decoded, names), strict=True)):
        digest.update(f"{name}{given(name)}\n".encode())
        for part, tensor in sorted(parts.items()):
            digest.update(f"{name} {part} {dtype_name(tensor.dtype)} {tuple(tensor.shape)}\n".encode())
            if tensor.numel():
                digest.update(raw_bytes(tensor))
        progress(done + 1, len(names))
    return digest.hexdigest()


def packed_run(artifact: Artifact, seed: int = 0) -> PackedRun:
    """Run an artifact made for memory: its memory, and the difference of its outputs from decoded weights."""
    packed = load(artifact.path, packed=True)
    found = PackedRun(artifact.resident, held_bytes(packed))
    if not isinstance(packed, nn.Module):
        return found
    dense = load(artifact.path)
    exact = first_output(dense, seed)
    if exact is None:
        return found
    return replace(
        found,
        error=_relative(first_output(packed, seed), exact),
        allowed=_TOLERANCE * _relative(first_output(dense.to(torch.bfloat16), seed), exact),
    )


def _relative(outputs: Tensor | None, exact: Tensor) -> float:
    assert outputs is not None
    return float((outputs.float() - exact).norm() / exact.norm())


def verify(path: str | Path, *, base: Any = None) -> Verified:
    """Read an artifact from disk and check everything that can be checked without the source.

    Parameters
    ----------
    path
        The folder.
    base
        The model that a delta was made from, as for :func:`octavo.load`.

    Returns
    -------
    Verified
        What was found; where nothing was recorded, None stands for what could not be compared.

    Raises
    ------
    ArtifactError
        At the first thing that is wrong: damage, a configuration that was changed, weights or outputs other than
        recorded, a model that the artifact does not fill.

    Examples
    --------
    >>> import octavo
    >>> octavo.verify("folded").weights_match
    True
    """
    with on_base(base):
        return _verified(path)


def _verified(path: str | Path) -> Verified:
    if is_foreign(path):
        return verify_foreign(path)
    artifact = Artifact(path)
    changed = artifact.changed()
    if changed:
        raise ArtifactError(
            f"{path}: {', '.join(changed)} since the artifact was written, so this is a different model; copy the "
            "artifact again, or compress the source with the new configuration"
        )
    recorded = recorded_beside(artifact.path)
    digests = recorded.digests or Digests()
    digest = digest_of(artifact)
    if digests.weights not in (None, digest):
        raise ArtifactError(
            f"{path}: the restored weights differ from those recorded when it was written; copy the artifact again"
        )
    loader = difference = None
    if digests.outputs is not None:
        loader, difference = _outputs_of(artifact.path, digests.outputs)
        if not difference <= OUTPUTS_TOLERANCE:
            raise ArtifactError(
                f"{path}: the loaded model's outputs differ from those recorded by {difference:.3g} "
                f"of the largest, while rounding explains {OUTPUTS_TOLERANCE:g}; the configuration was changed, or "
                "this machine or version of transformers computes something else"
            )
    return Verified(
        path=str(path),
        bytes=artifact.bytes,
        ratio=artifact.manifest["source"]["bytes"] / artifact.bytes,
        tensors=len(artifact.names()) + len(artifact.aliases),
        weights_sha256=digest,
        weights_match=None if digests.weights is None else True,
        outputs_match=None if difference is None else True,
        outputs_difference=difference,
        loader=loader,
        quality=recorded.quality,
        packed=None if artifact.resident is None else _checked_run(path, artifact, artifact.resident),
    )


def _checked_run(path: str | Path, artifact: Artifact, resident: int) -> PackedRun:
    """How an artifact made for memory runs, refused if it takes more memory or loses more than it states."""
    packed = packed_run(artifact)
    if packed.held > resident:
        raise ArtifactError(
            f"{path}: takes {packed.held} bytes in memory while it runs packed, but its manifest says "
            f"{resident}; this version of transformers creates other tensors"
        )
    if packed.error is not None and packed.allowed is not None and packed.error > packed.allowed:
        raise ArtifactError(
            f"{path}: running from packed codes changes outputs by {packed.error:.3g} of their size, more than "
            f"the {packed.allowed:.3g} that bfloat16 explains; this machine computes something else"
        )
    return packed


def _outputs_of(path: Path, wanted: Outputs) -> tuple[str, float]:
    """How the model was loaded, and the distance of its outputs from those recorded."""
    loaded = load_as_users_do(transformer_folder(path), {"dtype": torch.float32})
    found = probe(loaded.model)
    difference = float("inf") if found is None else wanted.differ(found)
    if members(path) and is_installed():
        load_encoder(path)
        return "SentenceTransformer(path)", difference
    return f"{type(loaded.model).__name__}.from_pretrained(path)", difference
