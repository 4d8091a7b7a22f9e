"""Reconstruction: correcting the effect of rounding on a model's outputs with parameters that cost almost no bytes.

Codes are not changed. Gradient descent on the calibration data fits the source's outputs with tensors that are stored
as floats anyway (norms, biases) and one small factor per row of every linear layer, or one per scale where a format
stores several scales a row. This is the learned part of norm tweaking (Li et al., 2023, arXiv 2309.02784) and of scale
tuning (Egiazarian et al., 2024, arXiv 2401.06118, section 3.3). It optimizes the measured objective and not single
blocks. The result is kept only if it is better on held-out data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from octavo.allocation.encoded import as_weights, form_of
from octavo.allocation.opened import Opened, Run
from octavo.artifact import Packed, pack
from octavo.calibration.inmemory import replaced
from octavo.calibration.objective import Loss
from octavo.encoding.batching import pieces, repeated
from octavo.encoding.finish import Built
from octavo.encoding.learnable import Changes, learnable, rebuilt
from octavo.sources.batches import Batch, sequences_in
from octavo.sources.differences import Difference
from octavo.sources.modules import own_tensors
from octavo.system.modes import evaluating
from octavo.system.raw import Lazily

#: Positions of the calibration data to learn from, including repeats: tokens, or as much work for other models.
POSITIONS = {"default": 1 << 14, "best": 1 << 17}
#: Positions in one step, within these numbers of examples.
_STEP, _FEWEST, _MOST = 512, 4, 32
#: Relative change per step (docs/decisions.md), for losses from :data:`_COARSE` on.
_RATE = 3e-3
#: After this part of the steps the loss on held-out data must be lower.
_TRIED = 3
#: Below this loss the fit would learn bfloat16 noise (near 6e-4 in KL).
_COARSE = 0.01
#: The source's outputs are kept up to this size.
_REFERENCE_BYTES = 1 << 28
#: Largest overhead of gains: bytes per row, and bytes per site (manifest entry and coded head).
_ROW_BYTES, _SITE_BYTES = 0.5, 120
#: Gains that take more than this share of the budget are not used.
_LARGEST_SHARE = 0.006


def reserve(opened: Opened, budget: int) -> int:
    """Bytes to leave free for gains, 0 if there will be none."""
    if opened.target.free_gains or opened.request.preset not in POSITIONS or not _possible(opened):
        return 0
    sites = [opened.site(name) for name in _linear(opened)]
    wanted = math.ceil(sum(_ROW_BYTES * site.rows + _SITE_BYTES for site in sites))
    return wanted if wanted <= _LARGEST_SHARE * budget else 0


def reconstruct(run: Run, built: Built, budget: int) -> Built:
    """A built plan with fitted norms, biases and row gains; the original plan if that is not better.

    Parameters
    ----------
    budget
        Largest size of the artifact in bytes. Gains are left out if they do not fit.
    """
    preset = run.opened.request.preset
    if preset not in POSITIONS or not _possible(run.opened) or not built.quality > 0:
        return built
    fit = _Fit(run, built)
    for gains in (True, False) if fit.learn(POSITIONS[preset]) else ():
        found = fit.built(gains=gains)
        if found.counted <= budget and found.quality < built.quality:
            return found
    run.opened.notes.append(
        "reconstruction of norms, biases and row gains did not lower the loss on held-out data and was skipped"
    )
    return built


def _possible(opened: Opened) -> bool:
    # A loss with labels is not a distance from the source: lowering it further would be training. A model that does not
    # fit in memory has no end-to-end gradients. A kernel that runs packed codes cannot apply gains.
    whole = opened.measurable and not opened.source.is_skeleton and opened.target.tunable
    return whole and bool(opened.calibration_data) and not isinstance(opened.objective, Loss)


def _linear(opened: Opened) -> dict[str, nn.Module]:
    """Sites whose rows are outputs of a linear layer, with their modules."""
    found: dict[str, nn.Module] = {}
    for site in opened.sites:
        owner = opened.source.owner(site.name)
        turns = isinstance(owner, nn.Linear) or type(owner).__name__ == "Conv1D"
        if owner is not None and turns and site.kind == "linear" and site.name not in opened.pinned:
            found[site.name] = owner
    return found


class _Fit:
    """The fitted parameters: relative changes of kept tensors and of rows, initially zero."""

    def __init__(self, run: Run, built: Built) -> None:
        opened = run.opened
        self.run, self.opened, self.old = run, opened, built
        assert opened.source.module is not None
        self.module, self.original = opened.source.module, opened.source.original.module or opened.source.module
        self.parameters = opened.source.direct
        self.weights = {**opened.source.folded, **as_weights(opened, built.packed)}
        self.examples = max(sum(map(sequences_in, opened.calibration_data)), 1)
        self.positions = max(_positions(run, self.original), 1.0)
        self.changes = Changes(learnable(opened, built))
        owners = {name: owner for name, owner in _linear(opened).items() if name in built.packed}
        counts = {name: opened.target.gains(form_of(opened.site(name), built.packed[name])) for name in owners}
        self.gains = {name: torch.zeros(opened.site(name).rows, count) for name, count in counts.items()}
        # One factor a row scales an output, so that no gradient of the weight is needed. Of a difference it does not.
        whole = not isinstance(opened.source, Difference)
        self.owners = {name: owner for name, owner in owners.items() if counts[name] == 1 and whole}
        self.grouped = {name: self._matrix(name, self.weights[name]) for name in owners if name not in self.owners}

    def _matrix(self, name: str, weight: Tensor) -> Tensor:
        """A weight, or its gradient, as (rows, groups, columns of a group)."""
        groups = self.gains[name].shape[1]
        return self.opened.site(name).layout.to_matrix(weight.float()).unflatten(1, (groups, -1))

    def _grown(self) -> dict[str, Tensor]:
        """Weights with several factors a row, with their current values."""
        sites = ((self.opened.site(name), matrix) for name, matrix in self.grouped.items())
        return {
            site.name: site.layout.from_matrix((matrix * (1 + self.gains[site.name])[..., None]).flatten(1), site.shape)
            for site, matrix in sites
        }

    def learn(self, positions: int) -> bool:
        """Adam with a cosine schedule over that many positions, repeating the data as needed.

        Returns False if a part of the steps did not lower the loss on held-out data; the rest are then not made.
        """
        size = max(_FEWEST, min(_MOST, round(_STEP / self.positions)))
        batches = [piece for batch in self.opened.calibration_data for piece in pieces(batch, size)]
        steps = max(1, round(positions / self.positions / self.examples * len(batches)))
        learned = [*self.changes.relative.values(), *self.gains.values()]
        # Factors are about as large as errors of rounding, and the loss is about their square.
        rate = _RATE * min(1.0, math.sqrt(self.old.quality / _COARSE))
        optimizer = torch.optim.Adam(learned, lr=rate, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 4) * (1 + math.cos(math.pi * step / steps)) / 2
        )
        references = _References()
        for step, number in enumerate(repeated(len(batches), steps, self.opened.request.seed)):
            with self.opened.attending([batches[number]]):
                self._gradients(batches[number], number, references)
            optimizer.step()
            schedule.step()
            self.run.progress("reconstruct", step + 1, steps)
            if step + 1 == steps // _TRIED and not self._loss() < self.old.quality:
                return False
        return True

    def _loss(self) -> float:
        """Mean divergence on held-out data with the current values."""
        sites = {name: self.opened.site(name) for name in self.gains}

        def scaled(name: str) -> Tensor:
            matrix = self._matrix(name, self.weights[name]) * (1 + self.gains[name])[..., None]
            return sites[name].layout.from_matrix(matrix.flatten(1), sites[name].shape)

        rest = {name: partial(self.weights.__getitem__, name) for name in self.weights if name not in sites}
        kept = {name: partial(tensor.clone) for name, tensor in self.changes.now().items()}
        return float(
            self.run.measure(Lazily({**rest, **{name: partial(scaled, name) for name in sites}, **kept})).mean()
        )

    def _gradients(self, batch: Batch, number: int, references: _References) -> None:
        """Set the gradient of every change to that of the mean divergence of a batch, which has this number."""
        objective, kept = self.opened.objective, self.changes.now()
        device = next(self.module.parameters()).device.type
        coarse = self.old.quality > _COARSE
        state = own_tensors(self.module)
        with torch.autocast(device, torch.bfloat16, enabled=coarse), _frozen(self.module):
            with torch.no_grad(), replaced(self.original, {}):
                reference = references.of(number, lambda: objective.outputs(self.original, batch))
            new = self.opened.source.placed({**self.weights, **self._grown(), **kept})
            learned = {name: state[self.parameters[name]].requires_grad_(True) for name in kept}
            weights = {name: state[self.parameters[name]].requires_grad_(True) for name in self.grouped}
            rows = {name: self.gains[name].requires_grad_(True) for name in self.owners}
            hooks = [weight.register_hook(self._summed(name)) for name, weight in weights.items()]
            with replaced(self.module, new), _scaled(self.owners, rows):
                loss = objective.divergence(reference, objective.outputs(self.module, batch)).mean()
                wanted = [*learned.values(), *rows.values(), *weights.values()]
                gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        for hook in hooks:
            hook.remove()
        for change in rows.values():
            change.requires_grad_(False)
        # Those of weights were summed as they came.
        targets = {**{name: self.changes.relative[name] for name in learned}, **rows}
        for (name, change), gradient in zip(targets.items(), gradients, strict=False):
            unit = self.changes.units.get(name, 1.0)
            change.grad = None if gradient is None else (gradient.float() * unit).to(change.device)

    def _summed(self, name: str) -> Callable[[Tensor], Tensor]:
        """Turns the gradient of a weight into that of its factors, so that those of all weights never exist at once."""

        def turn(gradient: Tensor) -> Tensor:
            self.gains[name].grad = (self._matrix(name, gradient) * self.grouped[name]).sum(2)
            return gradient.new_zeros(()).expand_as(gradient)

        return turn

    def built(self, *, gains: bool) -> Built:
        """The plan with the fitted values as stored, measured on held-out data."""
        packed = {**self.old.packed, **(self._scaled_forms() if gains else {})}
        return rebuilt(self.run, self.old, packed, self.changes.kept(self.old.contents.kept))

    def _scaled_forms(self) -> dict[str, Packed]:
        result = {}
        for name, change in self.gains.items():
            base = form_of(self.opened.site(name), self.old.packed[name])
            form = self.opened.target.scaled(base, 1 + change)
            if form is not base:
                result[name] = pack(form, self.opened.target.resident)
        return result


def _positions(run: Run, module: nn.Module) -> float:
    """Positions of an example: its tokens; without tokens, the number of times that it uses a weight, on average.

    An image uses a weight of a convolution at many places, so that a pass costs as much as one over many tokens.
    """
    opened, calibration = run.opened, run.calibration
    batch = next(pieces(opened.calibration_data[0], 1))
    if isinstance(batch, Mapping) and "input_ids" in batch:
        return calibration.tokens / max(calibration.sequences, 1)
    # In training mode a pass would change the statistics of batch norms.
    with evaluating(module), FlopCounterMode(display=False) as counter, torch.no_grad():
        opened.objective.outputs(module, batch)
    weights = sum(site.rows * site.columns for site in opened.sites)
    return counter.get_total_flops() / 2 / max(weights, 1) / max(sequences_in(batch), 1)


class _References:
    """The source's outputs on batches that return, as far as they are small enough to be kept."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}
        self._bytes = 0

    def of(self, number: int, made: Callable[[], Tensor]) -> Tensor:
        if number in self._kept:
            return self._kept[number]
        outputs = made()
        if self._bytes + outputs.nbytes <= _REFERENCE_BYTES:
            self._kept[number] = outputs
            self._bytes += outputs.nbytes
        return outputs


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """A context in which no parameter requires gradients; afterwards each is restored."""
    wanted = {parameter: parameter.requires_grad for parameter in module.parameters()}
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


@contextmanager
def _scaled(owners: Mapping[str, nn.Module], changes: Mapping[str, Tensor]) -> Iterator[None]:
    """Linear layers whose outputs, before their bias, are multiplied by ``1 + change`` (rows, 1)."""

    def hook(change: Tensor) -> Any:
        def scale(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            bias = getattr(module, "bias", None)
            factor = change.squeeze(1).to(output)
            return output + factor * (output if bias is None else output - bias.to(output))

        return scale

    handles = [owner.register_forward_hook(hook(changes[name])) for name, owner in owners.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
