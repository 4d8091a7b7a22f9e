"""Loading artifacts, as the model of `transformers`, the module or the tensors that they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from octavo.artifact import MANIFEST, Artifact
from octavo.artifact.deltas import on_base
from octavo.errors import ArtifactError, RequestError
from octavo.integrations.transformers import load_model
from octavo.integrations.trust import trusted
from octavo.runtimes.packed import packed_weight
from octavo.runtimes.packed.factors import dense_again, is_factorization, run_as_factors
from octavo.sources.batches import Batch
from octavo.sources.filling import fill
from octavo.sources.model_classes import is_known
from octavo.sources.modules import unwrapped
from octavo.verification.restoring import fits_plainly, materialise, unless_refused


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
