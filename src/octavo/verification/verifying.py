"""Loading artifacts and verifying them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.artifact import MANIFEST, Artifact, dtype_name
from octavo.artifact.deltas import on_base
from octavo.errors import ArtifactError, RequestError
from octavo.integrations.transformers import load_as_users_do, load_model
from octavo.integrations.trust import trusted
from octavo.runtimes.packed import held_bytes, packed_weight
from octavo.runtimes.packed.factors import dense_again, is_factorization, run_as_factors
from octavo.sources.batches import Batch
from octavo.sources.encoders import is_installed, load_encoder
from octavo.sources.filling import fill
from octavo.sources.model_classes import is_known
from octavo.sources.modules import unwrapped
from octavo.sources.sentences import members, transformer_folder
from octavo.sources.sites import Progress
from octavo.system.ahead import in_order
from octavo.system.raw import raw_bytes
from octavo.verification.foreign import is_foreign, verify_foreign
from octavo.verification.probes import TOLERANCE as OUTPUTS_TOLERANCE
from octavo.verification.probes import Outputs, first_output, probe
from octavo.verification.recorded import Digests, recorded_beside
from octavo.verification.restoring import fits_plainly, materialise, unless_refused
from octavo.verification.verified import PackedRun, Verified

#: Packed weights may change outputs by this many times the effect of rounding them to bfloat16.
_TOLERANCE = 2.0


def load(
    path: str | Path,
    into: nn.Module | None = None,
    *,
    base: Any = None,
    packed: bool = False,
    factors: bool = False,
    batch: Batch = None,
) -> Any:
    """Load an artifact.

    Parameters
    ----------
    path
        The artifact folder.
    into
        A module to load the weights into; weights loaded earlier as packed or factors become dense first. Without it,
        the result is a ``transformers`` model if the architecture is known, and otherwise a dictionary of tensors. If
        the artifact is refused, the module is unchanged. Parameters on the ``meta`` device are allocated on the CPU.
    base
        For a delta, the model that it is the difference to: a folder, a file, or a module. Without it the base is
        looked for under its title in the folders of the environment variable ``OCTAVO_BASE``, and beside the artifact.
        A base of other content is refused.
    packed
        Whether weights stay packed in memory and run from their codes with inputs rounded to bfloat16, instead of being
        decoded. A ``transformers`` model then runs in bfloat16 as a whole; ``into`` keeps its other dtypes.
    factors
        Whether low-rank and other factored weights run as float32 factors if that is measured to be faster than dense
        on this machine. :func:`octavo.runtimes.packed.factored` lists them with the times.
    batch
        An input of the module for those measurements: a tensor, a tuple or a mapping. Without one, layers are measured
        with a single row, and convolutions run dense.

    Raises
    ------
    ArtifactError
        If the artifact is damaged, or does not fit ``into``.
    RequestError
        If factors are combined with ``packed``, no module is loaded, or the module fails on the batch. If a base is
        given for what is no delta, or a delta is to run packed or as factors. If ``into`` is not on the CPU, where
        packed weights run.

    Examples
    --------
    >>> import octavo
    >>> model = octavo.load("folded")  # an artifact of a transformers model
    >>> type(model).__name__
    'BertModel'
    """
    path = Path(path)
    if base is not None:
        if Artifact(path).delta is None:
            raise RequestError(f"{path}: holds a whole model and is no delta; leave base out")
        with on_base(base):
            return load(path, into, packed=packed, factors=factors, batch=batch)
    if factors:
        return _with_factors(path, into, packed, batch)
    if packed and into is not None:
        _require_cpu(into)
    as_weight = packed_weight if packed else None
    if into is None and (path / MANIFEST).exists() and (path / "config.json").exists():
        # The transformers loader opens the files and trusts them, so they are checked first.
        artifact = trusted(path)
        if is_known(path):
            return load_model(artifact, as_weight)
    else:
        artifact = Artifact(path)
    state = artifact.state(as_weight=as_weight)
    if into is None:
        return {**state, **artifact.extra}
    module = unwrapped(into)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    plainly = not artifact.extra and fits_plainly(module, shapes)
    try:
        with unless_refused(module, values=not plainly):
            # Factors of another artifact cannot be written to.
            dense_again(module)
            materialise(module)
            fill(module, state, artifact.extra, assign=packed)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    return into


def _require_cpu(module: nn.Module) -> None:
    """Refuse a module that is on another device than the one where packed weights run."""
    elsewhere = {str(tensor.device) for tensor in module.parameters()} - {"cpu", "meta"}
    if elsewhere:
        raise RequestError(
            f"into: packed weights run on a CPU, and the module is on {', '.join(sorted(elsewhere))}; move it to the "
            "CPU first, or leave packed out"
        )


def _with_factors(path: Path, into: nn.Module | None, packed: bool, batch: Batch) -> nn.Module:
    """Replace dense weights of a module by factors where these are faster."""
    if packed:
        raise RequestError(
            "weights run either packed (bfloat16) or as factors (float32); choose one of packed= and factors="
        )
    if Artifact(path).delta is not None:
        raise RequestError(f"{path}: is a delta, which has no factors of the model; leave factors out")
    if into is not None:
        # Whether the module fails on the batch is only known once the weights are loaded.
        with unless_refused(unwrapped(into), values=True):
            return _as_factors(path, load(path, into), batch)
    module = load(path)
    if not isinstance(module, nn.Module):
        raise RequestError(f"{path}: has no model to run; give a module with into= to run the weights as factors")
    return _as_factors(path, module, batch)


def _as_factors(path: Path, module: nn.Module, batch: Batch) -> nn.Module:
    artifact, inner = Artifact(path), unwrapped(module)
    held = dict(inner.named_parameters(remove_duplicate=False))
    prefix = f"{getattr(inner, 'base_model_prefix', '')}."

    def parameters(name: str) -> list[str]:
        names = [name, *(alias for alias, other in artifact.aliases.items() if other == name)]
        # Names in a transformers file may have an additional or missing base model prefix.
        spelled = (option for n in names for option in (n, prefix + n, n.removeprefix(prefix)))
        return [option for option in dict.fromkeys(spelled) if option in held]

    # The factors of a scaled matrix are not the weight's.
    every = artifact.sites.items()
    names = [name for name, entry in every if is_factorization(entry["form"]) and not artifact.layout(name).exponent]
    sites = ((name, parameters(name), artifact.form(name), artifact.layout(name)) for name in names)
    run_as_factors(inner, sites, batch)
    return module


def digest_of(artifact: Artifact, progress: Progress = lambda done, total: None) -> str:
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
