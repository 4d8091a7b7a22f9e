"""A compressed model that can be trained in the forms in which it is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from octavo.allocation.encoded import as_weights, form_of
from octavo.allocation.opened import Run
from octavo.artifact import Kept, Packed, pack
from octavo.calibration.blocks import Blocks
from octavo.calibration.inmemory import replaced
from octavo.encoding.finish import Built
from octavo.encoding.learnable import Changes, learnable
from octavo.sources.batches import Batch, mask_of
from octavo.sources.modules import own_tensors
from octavo.system.matmul import fast_matmul
from octavo.training.straight_through import StraightThrough
from octavo.training.teaching.hidden import hidden_error
from octavo.training.teaching.internals import outputs_within

#: Weight of the distance between hidden states beside the divergence of outputs (docs/decisions.md).
_HIDDEN = 0.3
#: Below this loss training would learn the noise of bfloat16 (near 6e-4 in KL).
_COARSE = 0.01


class Student:
    """The trainable state of a built plan: latents of forms, and relative changes of norms and biases.

    Parameters
    ----------
    run
        The run; its source's module is the teacher, and the student too, with other tensors.
    built
        The plan, encoded.
    """

    def __init__(self, run: Run, built: Built) -> None:
        opened = run.opened
        assert opened.source.module is not None
        self.opened, self.built = opened, built
        self.module, self.teacher = opened.source.module, opened.source.original.module or opened.source.module
        self.forms: dict[str, StraightThrough] = {}
        for name, packed in built.packed.items():
            # What the user chose for a site stays as it is.
            if name not in opened.pinned and name in opened.source.direct:
                site = opened.site(name)
                form = StraightThrough(form_of(site, packed), opened.matrix(site))
                if form.moved:
                    self.forms[name] = form
        fixed = {name: packed for name, packed in built.packed.items() if name not in self.forms}
        self.fixed = {**opened.source.folded, **as_weights(opened, fixed)}
        self.changes = Changes(learnable(opened, built))
        for change in self.changes.relative.values():
            change.requires_grad_(True)
        state = own_tensors(self.module)
        self._owners = {name: state[opened.source.direct[name]] for name in (*self.forms, *self.changes.start)}
        self._blocks = _blocks_of(self.teacher, self.module)

    @property
    def moved(self) -> int:
        """The number of weights that training can change; norms and biases count only after a cut alone."""
        if not self.built.packed:
            return sum(weight.numel() for weight in self.changes.start.values())
        return sum(form.moved for form in self.forms.values())

    def latents(self) -> list[Tensor]:
        """The latents of all forms, in units of steps for codes."""
        return [latent for form in self.forms.values() for latent in form.parameters()]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is trained, by a name of its own, for checkpoints."""
        found = {f"change.{name}": change for name, change in self.changes.relative.items()}
        for name, form in self.forms.items():
            found |= {f"latent.{number}.{name}": latent for number, latent in enumerate(form.parameters())}
        return found

    @fast_matmul()
    def gradients(self, batch: Batch) -> float:
        """Add the gradients of one batch; returns its mean divergence from the teacher."""
        device = next(self.module.parameters()).device.type
        made, owners = self._made(), list(self._owners.values())
        # Products in bfloat16 are faster, and exact enough where much is lost.
        coarse = self.built.quality > _COARSE
        # Its cache would give the student the teacher's weights, since both are the same parameters.
        fast = torch.autocast(device, torch.bfloat16, enabled=coarse, cache_enabled=False)
        with fast, self.opened.attending([batch]), _learning(self.module, owners):
            objective = self.opened.objective
            with (
                torch.no_grad(),
                replaced(self.teacher, {}),
                outputs_within(self.teacher, [old for old, _ in self._blocks]) as taught,
            ):
                reference = objective.outputs(self.teacher, batch)
            now = {name: weight.detach() for name, weight in made.items()}
            with replaced(self.module, self.opened.source.placed({**self.fixed, **now})):
                with outputs_within(self.module, [new for _, new in self._blocks]) as learned:
                    outputs = objective.outputs(self.module, batch)
                lost = objective.divergence(reference, outputs).mean()
                total = lost.float() + _HIDDEN * _apart(taught, learned, mask_of(batch))
                gradients = torch.autograd.grad(total, owners, allow_unused=True)
        pairs = zip(made.values(), gradients, strict=True)
        moved = [(weight, gradient.to(weight)) for weight, gradient in pairs if gradient is not None]
        torch.autograd.backward([weight for weight, _ in moved], [gradient for _, gradient in moved])
        return float(lost.detach())

    def shrink(self, amount: float) -> None:
        """Move latents towards shorter codes (:meth:`octavo.training.StraightThrough.shrink`)."""
        for form in self.forms.values():
            form.shrink(amount)

    def settle(self, share: float) -> None:
        """Move latents towards their codes (:meth:`octavo.training.StraightThrough.settle`)."""
        for form in self.forms.values():
            form.settle(share)

    def priced(self) -> float:
        """Take the prices of codes from the codes of now; returns their entropy in bits."""
        return sum(form.priced() for form in self.forms.values())

    def _made(self) -> dict[str, Tensor]:
        """The current weights with gradients, in the order of what owns them."""
        sites = ((self.opened.site(name), form) for name, form in self.forms.items())
        weights = {site.name: site.layout.from_matrix(form.dense(), site.shape) for site, form in sites}
        return {**weights, **self.changes.now()}

    @torch.no_grad()
    def packed(self, deadzone: float = 0.0) -> dict[str, Packed]:
        """All sites as they would be stored now (:meth:`octavo.training.StraightThrough.stored`)."""
        resident = self.opened.target.resident
        return {
            name: pack(self.forms[name].stored(deadzone), resident) if name in self.forms else old
            for name, old in self.built.packed.items()
        }

    @torch.no_grad()
    def kept(self) -> dict[str, Kept]:
        """All other tensors as they would be stored now."""
        return self.changes.kept(self.built.contents.kept)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from the result of :meth:`tensors`."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])


def _blocks_of(teacher: nn.Module, student: nn.Module) -> list[tuple[str, str]]:
    """Names of the blocks of both whose hidden states are compared; none if they have not as many."""
    found = [Blocks.find(module) for module in (teacher, student)]
    old, new = ([] if blocks is None else [f"{blocks.prefix}.{name}" for name in _children(blocks)] for blocks in found)
    return list(zip(old, new, strict=True)) if len(old) == len(new) else []


def _children(blocks: Blocks) -> list[str]:
    return [name for name, _ in blocks.module.get_submodule(blocks.prefix).named_children()]


def _apart(taught: Mapping[str, Tensor], learned: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
    """Squared distance of hidden states relative to their energy, averaged over blocks; padding does not count."""
    pairs = [(old.float(), new.float()) for old, new in zip(taught.values(), learned.values(), strict=True)]
    parts = [
        hidden_error(old, new, mask) / hidden_error(old, torch.zeros_like(old), mask).clamp_min(1e-30)
        for old, new in pairs
        if old.shape == new.shape
    ]
    return torch.stack(parts).mean() if parts else torch.zeros(())


@contextmanager
def _learning(module: nn.Module, owners: Sequence[Tensor]) -> Iterator[None]:
    """A context in which only some parameters of a module require gradients; afterwards each is restored."""
    wanted = {parameter: parameter.requires_grad for parameter in module.parameters()}
    module.requires_grad_(False)
    for owner in owners:
        owner.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
