"""Forms whose codes gradients can move: rounded in the forward pass, with the gradient of the identity."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from octavo.forms import (
    Dense,
    Folded,
    Form,
    Frequency,
    Grid,
    LowRank,
    Scaled,
    Sparse,
    Sum,
    TensorTrain,
    Trimmed,
    with_leaves,
)  # fmt: skip

#: How far a latent may begin from its code, where error feedback chose another code than rounding would.
_WITHIN = 0.49
#: The smallest mean magnitude of codes for which a code length is predicted: 1/32 of a step.
_SMALLEST = 1 / 32
#: Magnitudes above it are counted together.
_LEVELS = 255
#: Forms that compute only with the matrices of the forms that they hold.
_OF_MATRICES = (Folded, Frequency, LowRank, Scaled, Sparse, Sum, TensorTrain, Trimmed)


class StraightThrough:
    """A form with a latent float for every code, and parameters in place of its floats.

    The forward pass rounds latents to codes; their gradient is that of the codes (the straight-through estimator of
    Bengio et al., 2013, arXiv 1308.3432). Steps stay as they are.

    Parameters
    ----------
    form
        What is stored now.
    target
        (rows, columns) the matrix that the form approximates, in which latents begin, as far as they round to the
        form's codes. Without it they begin at the codes.

    Attributes
    ----------
    moved
        Number of weights whose codes or values can change; 0 for forms without grids or floats.
    """

    def __init__(self, form: Form, target: Tensor | None = None) -> None:
        self.form = form
        self._leaves: list[_Codes | _Floats | None] = []

        able = _is_plain(form)

        def opened(leaf: Form) -> Form:
            own = target if target is not None and leaf.shape == form.shape and _is_alone(form) else None
            self._leaves.append(_learned(leaf, own) if able else None)
            return leaf

        with_leaves(form, opened)
        self.moved = sum(leaf.latent.numel() for leaf in self._leaves if leaf is not None)

    def parameters(self) -> Iterator[Tensor]:
        """The latent tensors, in units of steps for codes."""
        return (leaf.latent for leaf in self._leaves if leaf is not None)

    def codes(self) -> Iterator[_Codes]:
        """The leaves whose latents are rounded."""
        return (leaf for leaf in self._leaves if isinstance(leaf, _Codes))

    @torch.no_grad()
    def shrink(self, amount: float) -> None:
        """Move latents towards zero, each by its price in bits times an amount in steps, after the optimizer's step.

        Apart from the optimizer, as weight decay is in AdamW, its effect does not depend on the gradients' scale. Rows
        without a gradient, such as tokens that a batch does not hold, stay: what is rarely seen would fall to zero.
        """
        for leaf in self.codes():
            if (gradient := leaf.latent.grad) is not None and amount:
                seen = gradient.abs().amax(1, keepdim=True) > 0
                pull = (leaf.prices * seen).mul_(amount)
                leaf.latent.sub_(torch.minimum(pull, leaf.latent.abs()).copysign_(leaf.latent))

    @torch.no_grad()
    def settle(self, share: float) -> None:
        """Move latents by a share of the way to their codes.

        Otherwise many oscillate around thresholds, and their last codes are drawn by lot (the dampening of Nagel et
        al., 2022, arXiv 2203.11086).
        """
        for leaf in self.codes():
            leaf.latent.lerp_(leaf.latent.round(), share)

    def priced(self) -> float:
        """Take the prices of codes from the codes of now; returns their entropy in bits."""
        return sum(leaf.priced() for leaf in self.codes())

    def dense(self) -> Tensor:
        """The float32 matrix, with gradients to the latents."""
        coming = iter(self._leaves)
        return with_leaves(self.form, lambda leaf: leaf if (own := next(coming)) is None else _Computed(own())).dense()

    def stored(self, deadzone: float = 0.0) -> Form:
        """The form to store.

        Parameters
        ----------
        deadzone
            What is added on average to the threshold of rounding up, in steps: more gives smaller codes and fewer
            bytes. Thresholds are spread evenly up to twice as much, so that bytes change by little where many latents
            are equal.
        """
        coming = iter(self._leaves)
        return with_leaves(self.form, lambda leaf: leaf if (own := next(coming)) is None else own.stored(deadzone))


def _is_plain(form: Form) -> bool:
    """Whether a form computes only with the matrices of the forms that it holds; others read their parts."""
    inner = [value for field in fields(form) for value in _listed(getattr(form, field.name))]  # type: ignore[arg-type]
    return all(map(_is_plain, inner)) and (not inner or isinstance(form, _OF_MATRICES))


def _listed(value: Any) -> list[Form]:
    return [part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, Form)]


def _is_alone(form: Form) -> bool:
    """Whether a form holds a single matrix, so that a target of the whole is one of its leaf."""
    found: list[Form] = []

    def seen(leaf: Form) -> Form:
        found.append(leaf)
        return leaf

    with_leaves(form, seen)
    return len(found) == 1


def _learned(leaf: Form, target: Tensor | None) -> _Codes | _Floats | None:
    if isinstance(leaf, Grid):
        return _Codes(leaf, target)
    return _Floats(leaf) if isinstance(leaf, Dense) else None


class _Codes:
    """A grid with latent codes (rows, columns) in units of its steps."""

    def __init__(self, grid: Grid, target: Tensor | None) -> None:
        self.grid, latent = grid, grid.codes.float()
        if target is not None:
            aimed = _over_steps(grid, target) if grid.zero is None else None
            latent = latent if aimed is None else latent + (aimed - latent).clamp_(-_WITHIN, _WITHIN)
        self.latent = latent.requires_grad_(True)
        self.prices = torch.zeros(())

    def __call__(self) -> Tensor:
        codes: Any = _Rounded.apply(self.latent)
        return replace(self.grid, codes=codes).dense()

    def stored(self, deadzone: float) -> Form:
        with torch.no_grad():
            size = self.latent.abs().add_(0.5)
            if deadzone:
                spread = torch.rand(size.shape, generator=torch.Generator().manual_seed(0))
                size.sub_(spread.to(size.device), alpha=2 * deadzone)
            codes = size.floor_().clamp_min_(0).copysign_(self.latent)
        return replace(self.grid, codes=_narrowest(codes))

    @torch.no_grad()
    def priced(self) -> float:
        """Take the prices of codes from the codes of now; returns their entropy in bits.

        Magnitudes are taken to be geometric, with the mean that their row and their column predict: a code's length
        grows by as many bits with each level.
        """
        size = self.latent.round().abs_()
        mean = size.mean().clamp_min(_SMALLEST)
        rows, columns = (size.mean(dim, keepdim=True).clamp_min(_SMALLEST) for dim in (1, 0))
        self.prices = torch.log2(1 + mean / (rows * columns))
        shares = torch.bincount(size.clamp_max_(_LEVELS).flatten().int()).double() / max(size.numel(), 1)
        # A code that is not zero has a sign.
        return size.numel() * float(torch.special.entr(shares).sum() / math.log(2) + 1 - shares[:1].sum())


class _Floats:
    """A leaf of floats, which are trained as they are."""

    def __init__(self, leaf: Dense) -> None:
        self.dtype = leaf.weight.dtype
        self.latent = leaf.weight.detach().float().clone().requires_grad_(True)

    def __call__(self) -> Tensor:
        return self.latent

    def stored(self, deadzone: float) -> Form:
        return Dense(self.latent.detach().to(self.dtype))


class _Rounded(torch.autograd.Function):
    """Rounding with the gradient of the identity."""

    @staticmethod
    def forward(context: Any, latent: Tensor) -> Tensor:
        return latent.round()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


@dataclass(frozen=True)
class _Computed(Dense):
    """A leaf that keeps gradients."""

    def dense(self) -> Tensor:
        return self.weight


def _over_steps(grid: Grid, target: Tensor) -> Tensor:
    """A matrix in units of a grid's steps."""
    steps = replace(grid, codes=torch.ones_like(grid.codes)).dense()
    return target.float() / steps.clamp_min(1e-38)


def _narrowest(codes: Tensor) -> Tensor:
    """Codes in the narrowest type that holds them."""
    largest = int(codes.abs().max()) if codes.numel() else 0
    return codes.to(torch.int8 if largest < 128 else torch.int16 if largest < 32768 else torch.int32)
