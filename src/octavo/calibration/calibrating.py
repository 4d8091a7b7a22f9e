"""Calibration: evidence from one forward and one backward pass over the data, or without data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibration.evidence import Evidence, combined
from octavo.calibration.objective import Objective
from octavo.calibration.watches import DAMPING, Corrections, Watches
from octavo.errors import RequestError
from octavo.sources.batches import Batch, divided, mask_of, sequences_in
from octavo.sources.sites import Site
from octavo.sources.source import Source
from octavo.system.ahead import in_order
from octavo.system.matmul import coarse_matmul
from octavo.system.modes import evaluating

MINIMUM_SEQUENCES = 8
#: Gradients of weights are averaged over at least this many passes, if there are enough examples.
_PASSES = 64
CURVATURES = ("kfac", "ekfac")


@dataclass
class Calibration:
    """Evidence of all sites, and a description of the data."""

    evidence: Mapping[str, Evidence]
    sequences: int = 0
    tokens: int = 0
    text: str = "none (data-free)"
    warnings: list[str] = field(default_factory=list)


def calibrate(
    source: Source,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    objective: Objective,
    *,
    seed: int = 0,
    text: str = "",
    curvature: str = "kfac",
    coarse: bool = False,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Calibration:
    """Gather the evidence of all sites from a pass over ``batches`` through a module in memory.

    Parameters
    ----------
    batches
        Inputs of ``source.module``. Padding is excluded by ``attention_mask``.
    curvature
        ``kfac``, or ``ekfac`` for a second pass that measures the curvature of each layer
        (:mod:`octavo.calibration.curvature`, which states its memory).
    coarse
        Whether layers may multiply in bfloat16, where that is faster. Moments are summed in float32 either way.
    progress
        Called with the number of batches done and their total.

    Raises
    ------
    RequestError
        If there are fewer than eight sequences, or an output or a gradient is not finite.
    """
    if source.module is None:
        return data_free(source, sites)
    sequences = count_sequences(batches)
    generator, module = torch.Generator().manual_seed(seed), source.module
    passes = 2 if curvature == "ekfac" else 1
    notes: list[str] = []
    device = next((parameter.device.type for parameter in module.parameters()), "cpu")

    def go_through(watches: Watches, some: Sequence[Batch], before: int) -> str:
        """Pass some batches there and back; returns why the first of all gave no gradient, or nothing."""
        said = ""
        with differentiating(module), watches.watching():
            for done, batch in enumerate(some, before):
                watches.begin(batch)
                with coarse_matmul(device, wanted=coarse):
                    outputs = objective.outputs(module, batch)
                check_outputs(outputs, done % len(batches))
                failed = _sampled(objective, outputs, generator, first=not done)
                said = failed if not done else said
                progress(done + 1, passes * len(batches))
        return said

    watches = Watches(sites, source, curvature=passes == 2)
    said = go_through(watches, batches[:1], 0)
    if said:
        notes.append(
            f"{source.title}: no gradient passes through {type(module).__name__} ({said}); a typical importance was "
            "assumed for its weights"
        )
        watches = Watches(sites, source)
    elif watches.gradients.seen():
        # Weights are used outside of layers: each pass gives one gradient of them, so there must be many passes.
        batches = _smaller(batches, sequences)
        generator.manual_seed(seed)
        watches = Watches(sites, source, curvature=passes == 2)
        go_through(watches, batches, 0)
    else:
        go_through(watches, batches[1:], 1)
    positions = watches.positions
    evidence = {name: combined(roles) for name, roles in watches.evidence(sequences).items()}
    if passes == 2 and not notes:
        # Labels are drawn again, so that a basis is not evaluated on the samples that defined it.
        corrections = Corrections(sites, source, evidence)
        go_through(corrections, batches, len(batches))
        evidence |= corrections.corrected(sequences)
    # If no gradient passes through the model, no site has one, and a note already says so.
    judged = [] if notes else sites
    result = described(judged, {name: found.samples for name, found in evidence.items()}, sequences, text, source)
    result.tokens = positions or sequences
    result.warnings = notes + result.warnings
    result.evidence = {**evidence, **typical(source, sites, evidence)}
    return result


def _sampled(objective: Objective, outputs: Tensor, generator: torch.Generator, *, first: bool) -> str:
    """Pass a random sample of the curvature back; returns why the first batch gives no gradient, or nothing."""
    if not outputs.requires_grad:
        return "its outputs carry none, as under torch.no_grad"
    try:
        objective.probe(outputs, generator).backward()
    except RuntimeError as error:
        if not first:
            raise
        return str(error).splitlines()[0]
    return ""


def _smaller(batches: Sequence[Batch], sequences: int) -> list[Batch]:
    """Batches small enough that there are :data:`_PASSES` of them, since each gives one gradient."""
    size = max(1, sequences // _PASSES)
    result = []
    for batch in batches:
        result += divided(batch, size)
    return result


def count_sequences(batches: Sequence[Batch]) -> int:
    """Number of examples in all batches; raises if there are too few."""
    total = sum(sequences_in(batch) for batch in batches)
    if total < MINIMUM_SEQUENCES:
        raise RequestError(
            f"data: {total} sequences for calibration; at least {MINIMUM_SEQUENCES} are needed, so give more"
        )
    return total


def tokens_in(batch: Batch) -> int:
    """Number of tokens without padding in a batch, or of examples if it has no tokens."""
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(tokens, Tensor):
        return sequences_in(batch)
    mask = mask_of(batch)
    return tokens.numel() if mask is None else int(mask.sum())


def check_outputs(outputs: Tensor, number: int) -> None:
    """Raise :class:`RequestError` if an output of the batch is not finite."""
    # Both extremes are NaN if anything is. Unlike ``isfinite``, this makes no copies of the outputs.
    if outputs.numel() and not all(math.isfinite(extreme) for extreme in torch.aminmax(outputs.detach())):
        raise RequestError(
            f"data: the model's outputs on calibration batch {number} are not finite; check the data and the model"
        )


@contextmanager
def differentiating(module: nn.Module) -> Iterator[None]:
    """A context in which a module is in evaluation mode and no parameter requires a gradient."""
    wanted = {parameter: parameter.requires_grad for parameter in module.parameters()}
    module.requires_grad_(False)
    try:
        with evaluating(module):
            yield
    finally:
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


def described(
    sites: Sequence[Site], samples: Mapping[str, int], sequences: int, text: str, source: Source
) -> Calibration:
    """A calibration without its evidence, from the number of positions seen at every site."""
    result = Calibration({}, sequences, max(samples.values(), default=0), text)
    unused = set(source.unused)
    for site in sites:
        seen = samples.get(site.name, 0)
        if site.name in unused:
            result.warnings.append(
                f"{site.name}: {type(source.module).__name__} does not use this weight, so no measurement includes its "
                "loss; a typical importance was assumed"
            )
        elif not seen:
            result.warnings.append(
                f"{site.name}: no output depended on this weight during calibration, or the module uses it under "
                "torch.no_grad; a typical importance was assumed"
            )
        elif seen < site.columns and site.kind != "embedding":
            result.warnings.append(
                f"{site.name}: fewer calibration positions than input columns ({seen} for {site.columns}); the moments "
                f"were damped by {DAMPING:g} of their mean, and more data would help"
            )
    return result


def typical(source: Source, sites: Sequence[Site], seen: Mapping[str, Evidence]) -> dict[str, Evidence]:
    """Evidence for sites that have none: a relative error costs as much as at a typical site."""
    unseen = [site for site in sites if site.name not in seen]
    if not unseen:
        return {}
    levels = [
        seen[site.name].loss(site.layout.to_matrix(source.read(site.name))) for site in sites if site.name in seen
    ]
    level = float(torch.tensor(levels).median()) if levels else 1.0
    powers = {site.name: _power(source, site) for site in unseen}
    return {
        site.name: Evidence(torch.full((site.rows,), 2 * level / max(powers[site.name], 1e-30)), None)
        for site in unseen
    }


def _power(source: Source, site: Site) -> float:
    """Sum of squares of a site's matrix."""
    weight = source.read(site.name)
    weight = weight.float() if not site.layout.exponent else site.layout.to_matrix(weight)
    return float(weight.square().sum())


def data_free(source: Source, sites: Sequence[Site]) -> Calibration:
    """Evidence without data: a relative error of a weight costs the same at every site, per weight.

    Every site's loss is the share of its energy that is lost, times its share of all weights.
    """
    weights = sum(site.parameters for site in sites)
    evidence = {}

    for site, lost in zip(sites, in_order(partial(_power, source), sites), strict=True):
        level = 2 * site.parameters / weights / max(lost, 1e-30)
        evidence[site.name] = Evidence(torch.full((site.rows,), level), None)
    return Calibration(evidence)
