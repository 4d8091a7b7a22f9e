"""Several tuned models as one: their differences to a common base, added or agreed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.artifact import Artifact
from octavo.errors import RequestError
from octavo.flows.deltas.tensors import differing, opened
from octavo.flows.schema import all_finite
from octavo.sources.differences import added
from octavo.sources.filling import fill
from octavo.sources.modules import unwrapped
from octavo.verification.restoring import materialise, unless_refused

#: How differences become one.
HOW = ("sum", "ties")
#: The share of changes that ``ties`` keeps, as in the source.
KEEP = 0.2


def merge(
    deltas: Sequence[str | Path],
    into: nn.Module | None = None,
    *,
    base: Any = None,
    how: str = "ties",
    scale: float = 1.0,
    keep: float | None = None,
) -> Any:
    """Merge tuned models that are deltas of one base.

    Tensors that are stored whole, such as a task's head, are those of the first delta that has them: tasks that need
    their own heads keep them apart.

    Parameters
    ----------
    deltas
        Folders that :func:`octavo.compress` wrote with ``base=``.
    into
        A module of the tuned class to load the result into; without it the result is a dictionary of tensors, under
        the names in the first delta.
    base
        As for :func:`octavo.load`.
    how
        ``sum`` adds ``scale`` times the sum of all differences to the base (task arithmetic; Ilharco et al., 2023,
        arXiv 2212.04089). ``ties`` keeps the share ``keep`` of largest changes of every delta, elects the sign of each
        weight's summed change, and adds ``scale`` times the mean of the changes of that sign (TIES; Yadav et al., 2023,
        arXiv 2306.01708).
    scale
        The factor of the merged difference.
    keep
        For ``ties``: the share of changes that stays in every delta, above 0 and at most 1; 0.2 if not given.

    Raises
    ------
    RequestError
        If one is no delta, bases differ, tensors have different shapes, a choice is not known, or the merged difference
        is not finite.
    ArtifactError
        If one is damaged, the base is another model, or the result does not fit ``into``.

    Examples
    --------
    >>> import copy, octavo, torch
    >>> base = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
    >>> for name in ("first", "second"):
    ...     tuned = copy.deepcopy(base)
    ...     _ = tuned[0].weight.data.add_(0.01 * torch.randn(64, 64))
    ...     _ = octavo.compress(tuned, base=base, ratio=2, preset="data-free", progress=False).save(name)
    >>> state = octavo.merge(["first", "second"], base=base, how="sum", scale=0.5)
    >>> sorted(state)
    ['0.bias', '0.weight', '2.bias', '2.weight']
    """
    if how not in HOW:
        raise RequestError(f"how is {how!r}; choose from {', '.join(HOW)}")
    if keep is not None and how != "ties":
        raise RequestError(f"keep is {keep!r}, and how={how!r} keeps all changes; leave keep out, or choose how='ties'")
    if not isinstance(scale, int | float):
        raise RequestError(f"scale is {scale!r}; give a number, such as 1.0")
    share = KEEP if keep is None else keep
    if not (isinstance(share, int | float) and 0 < share <= 1):
        raise RequestError(f"keep is {keep!r}; give a share above 0 and at most 1, such as {KEEP}")
    artifacts = opened(deltas, base)
    thresholds = [_threshold(artifact, share) if how == "ties" else 0.0 for artifact in artifacts]

    def combined(changes: list[Tensor]) -> Tensor:
        merged = scale * (_elected(changes, thresholds) if how == "ties" else torch.stack(changes).sum(0))
        if not all_finite(merged):
            raise RequestError(f"scale is {scale!r}, with which differences are not finite; give a factor such as 1.0")
        return merged

    state = _merged(artifacts, combined)
    if into is None:
        return state
    module = unwrapped(into)
    with unless_refused(module, values=True):
        materialise(module)
        fill(module, state, artifacts[0].extra, assign=False)
    return into


def _merged(artifacts: Sequence[Artifact], combined: Callable[[list[Tensor]], Tensor]) -> dict[str, Tensor]:
    """The tensors of the merged model."""
    first, theirs = artifacts[0], [differing(artifact) for artifact in artifacts]
    names: dict[str, str] = {}
    for artifact, mine in zip(reversed(artifacts), reversed(theirs), strict=True):
        same = {own: name for name in artifact.same if (own := artifact.base.stored(name)) is not None}
        names |= {**same, **mine}
    state: dict[str, Tensor] = {}
    for own, name in names.items():
        before = first.base.source.read(own).detach()
        zero = torch.zeros(before.shape)
        changes = [
            a.stored(mine[own]).float() if own in mine else zero for a, mine in zip(artifacts, theirs, strict=True)
        ]
        assert first.delta is not None
        changed = any(own in mine for mine in theirs)
        state[name] = added(before, combined(changes), first.delta.dtype) if changed else before.clone()
    for artifact in artifacts:
        assert artifact.delta is not None
        for name in artifact.delta.whole:
            state.setdefault(name, artifact.stored(name))
    return {**state, **{alias: state[name] for alias, name in first.aliases.items() if name in state}}


def _threshold(artifact: Artifact, keep: float) -> float:
    """The size of the smallest change that is among the share of largest ones of a whole delta."""
    sizes = torch.cat([artifact.stored(name).float().abs().flatten() for name in differing(artifact).values()])
    kept = max(1, round(keep * sizes.numel()))
    return float(sizes.kthvalue(sizes.numel() - kept + 1).values)


def _elected(changes: Sequence[Tensor], thresholds: Sequence[float]) -> Tensor:
    """The mean of the changes that have the sign of their sum, of those that are large enough."""
    pairs = zip(changes, thresholds, strict=True)
    trimmed = torch.stack([change * (change.abs() >= threshold) for change, threshold in pairs])
    agree = (trimmed != 0) & (trimmed.sign() == trimmed.sum(0).sign())
    return (trimmed * agree).sum(0) / agree.sum(0).clamp_min(1)
