"""What training may change in an encoded plan besides the forms of its sites, and the plan with other content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from octavo.allocation.encoded import as_weights
from octavo.allocation.opened import Opened, Run
from octavo.artifact import Kept, Packed
from octavo.encoding.finish import Built
from octavo.sources.modules import own_tensors
from octavo.sources.narrowing import FLOATS
from octavo.system.raw import Lazily


class Given:
    """A tensor that takes the place of one read from the source."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __call__(self) -> Tensor:
        """The tensor."""
        return self.tensor


class Changes:
    """Trainable changes of tensors, relative to each as a whole, since single biases may be zero; initially none.

    Parameters
    ----------
    start
        The tensors in float32, by name.
    """

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        self.start, self.units = start, {name: tensor.square().mean().sqrt() for name, tensor in start.items()}
        self.relative = {name: torch.zeros_like(tensor) for name, tensor in start.items()}

    def now(self) -> dict[str, Tensor]:
        """The current values of the tensors."""
        return {name: tensor + self.units[name] * self.relative[name] for name, tensor in self.start.items()}

    def kept(self, old: Mapping[str, Kept]) -> dict[str, Kept]:
        """The contents of an artifact beside its sites, with the current values."""
        changed = self.now()
        return {
            name: replace(kept, read=Given(changed[name])) if name in changed else kept for name, kept in old.items()
        }


def learnable(opened: Opened, built: Built) -> dict[str, Tensor]:
    """Tensors that are stored as floats anyway, such as norms and biases, in float32 by name.

    Tensors that the user ignores are not among them, but after a cut alone, which leaves no sites, all are.
    """
    assert opened.source.module is not None
    state, parameters = own_tensors(opened.source.module), opened.source.direct
    found: dict[str, Tensor] = {}
    for name, kept in built.contents.kept.items():
        # Changing a tensor that is coded as bits would take unplanned bytes.
        ignored = opened.left[name].startswith("ignored") and bool(opened.sites)
        if kept.dtype not in FLOATS or kept.coded or ignored:
            continue
        if name in parameters and isinstance(state[parameters[name]], nn.Parameter):
            weight = kept.tensor().float()
            if weight.any() and weight.isfinite().all():
                found[name] = weight
    return found


def rebuilt(run: Run, old: Built, packed: Mapping[str, Packed], kept: Mapping[str, Kept]) -> Built:
    """A built plan with other content of its sites and of other tensors, measured on held-out data."""
    opened, target = run.opened, run.opened.target
    # A weight that is a form is an entry of its parts.
    entries = {
        name: replace(entry, packed=packed[name]) if name in packed else entry
        for name, entry in old.contents.entries.items()
    }
    contents = replace(old.contents, entries=entries, kept=dict(kept))
    points = {name: replace(point, bytes=target.bytes(packed[name])) for name, point in old.plan.points.items()}
    total = target.total(contents)
    plan = replace(old.plan, points=points, fixed_bytes=total - sum(map(target.bytes, packed.values())))
    stored = {name: item.given for name, item in kept.items()}
    losses = run.measure(Lazily({**as_weights(opened, packed).made, **stored})).double()
    quality, p95 = float(losses.mean()), float(losses.quantile(0.95))
    return Built(plan, dict(packed), contents, contents.bytes, total, quality, p95)
