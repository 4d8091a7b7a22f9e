"""Masks of weights that train: what is masked stays zero, and masks shrink or move while the others learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.forms import Dense, Form, Sparse
from octavo.methods.prune.masks import largest, largest_by_group
from octavo.training.computed import usual_layouts

#: n of every m neighbours in a row.
Pattern = tuple[int, int]


class WeightMasks:
    """Which weights of a model are kept; the others are zero, and so is what the optimizer remembers of them.

    Parameters
    ----------
    model
        The model that trains. Its parameters are changed in place.
    names
        Globs of parameter names. By default all weights of two dimensions or more that a layer calls ``weight``: those
        of linear layers, convolutions and embeddings.

    Attributes
    ----------
    weights
        The parameters, by name.
    kept
        Bools of their shapes, True where a weight is kept.
    optimizer
        What trains the weights, whose state :meth:`hold` sets to zero too; None until it is set.

    Raises
    ------
    RequestError
        If a glob matches no weight, or the model has none.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] | None = None) -> None:
        self.weights = maskable(model, names)
        self.kept = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}
        self._layouts = usual_layouts(model, self.weights)
        self.optimizer: torch.optim.Optimizer | None = None

    def follow(self, model: nn.Module) -> None:
        """Hold the weights of this model from now on; its optimizer is not known yet."""
        self.weights = {name: model.get_parameter(name) for name in self.weights}
        self.kept = {name: kept.to(self.weights[name].device) for name, kept in self.kept.items()}
        self.optimizer = None

    @property
    def density(self) -> float:
        """Share of the weights that are kept."""
        total = sum(kept.numel() for kept in self.kept.values())
        return sum(int(kept.sum()) for kept in self.kept.values()) / total

    @torch.no_grad()
    def hold(self) -> None:
        """Set masked weights to zero, and what the optimizer remembers of them, such as momentum."""
        for name, weight in self.weights.items():
            masked = ~self.kept[name]
            weight.masked_fill_(masked, 0.0)
            remembered = self.optimizer.state.get(weight, {}) if self.optimizer else {}
            for value in remembered.values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.masked_fill_(masked, 0.0)

    @torch.no_grad()
    def hold_gradients(self) -> None:
        """Set the gradients of masked weights to zero, so that they do not count when gradients are clipped."""
        for name, weight in self.weights.items():
            if weight.grad is not None:
                weight.grad.masked_fill_(~self.kept[name], 0.0)

    @torch.no_grad()
    def prune(self, zeros: float, *, across: bool = False, pattern: Pattern | None = None) -> None:
        """Mask the smallest magnitudes until a share of the weights is masked. Masked weights stay masked.

        Parameters
        ----------
        zeros
            Share of the weights that are masked then: of each weight's elements, or of all together.
        across
            Whether the elements of all weights are ranked together; then some weights keep more of theirs.
        pattern
            ``(n, m)``: only elements that are not among the n largest of m neighbours in a row are masked.

        Raises
        ------
        RequestError
            If a pattern does not divide the columns of a weight.
        """
        scores = {name: self._scores(name, pattern).flatten() for name in self.weights}
        for names in self._rankings(across):
            together = torch.cat([scores[name] for name in names])
            chosen = largest(together[None], len(together) - round(zeros * len(together)))[0].to(together.device)
            self._set(names, chosen & (together >= 0))
        self.hold()

    def _scores(self, name: str, pattern: Pattern | None) -> Tensor:
        size, kept = self.weights[name].detach().abs(), self.kept[name]
        if pattern is not None:
            layout = self._layouts[name]
            matrix = layout.to_matrix(size)
            if matrix.shape[1] % pattern[1]:
                raise RequestError(
                    f"{name}: pattern {pattern[0]}:{pattern[1]} does not divide its {matrix.shape[1]} columns; leave "
                    "it out of the names, or choose another pattern"
                )
            among = layout.from_matrix(largest_by_group(matrix.cpu(), pattern), tuple(size.shape)).to(size.device)
            size = size.masked_fill(among, torch.inf)
        # Below every magnitude, so that masks only shrink.
        return size.masked_fill(~kept, -1.0)

    @torch.no_grad()
    def scatter(self, density: float, generator: torch.Generator) -> None:
        """Keep random elements: the same share of every weight."""
        for name, weight in self.weights.items():
            order = torch.rand(weight.numel(), generator=generator)
            chosen = largest(order[None], round(density * weight.numel()))
            self._set([name], chosen[0].to(weight.device))
        self.hold()

    @torch.no_grad()
    def exchange(self, share: float, wanted: Mapping[str, Tensor], *, across: bool = False) -> int:
        """Drop the smallest kept weights, and grow as many masked ones, at zero; a dropped one does not grow at once.

        Parameters
        ----------
        share
            Of the kept weights, dropped.
        wanted
            By name, of the shapes of the weights: where it is largest a masked weight grows.
        across
            Whether the elements of all weights are ranked together, so that rows can end with different numbers of
            elements.

        Returns
        -------
        int
            How many were exchanged.
        """
        exchanged = 0
        for names in self._rankings(across):
            size = torch.cat([self.weights[name].detach().abs().flatten() for name in names])
            kept = torch.cat([self.kept[name].flatten() for name in names])
            worth = torch.cat([wanted[name].flatten() for name in names])
            count = min(round(share * int(kept.sum())), int((~kept).sum()))
            if not count:
                continue
            dropped = size.masked_fill(~kept, torch.inf).topk(count, largest=False).indices
            grown = worth.masked_fill(kept, -torch.inf).topk(count).indices
            self._set(names, kept.index_fill(0, dropped, False).index_fill(0, grown, True))
            exchanged += count
        self.hold()
        return exchanged

    def _rankings(self, across: bool) -> list[list[str]]:
        """Names of the weights whose elements are ranked together."""
        return [list(self.weights)] if across else [[name] for name in self.weights]

    def _set(self, names: Iterable[str], chosen: Tensor) -> None:
        """Masks of some weights from one, of all their elements in turn."""
        parts = chosen.split([self.weights[name].numel() for name in names])
        for name, part in zip(names, parts, strict=True):
            self.kept[name] = part.view(self.weights[name].shape)

    def forms(self, model: nn.Module, pattern: Pattern | None = None) -> dict[str, Form]:
        """Masks and kept weights, as the forms to store.

        Parameters
        ----------
        pattern
            ``(n, m)`` if every m neighbours keep exactly n, which takes fewer bytes.
        """
        found: dict[str, Form] = {}
        for name, kept in self.kept.items():
            layout = self._layouts[name]
            mask = layout.to_matrix(kept.cpu())
            matrix = layout.to_matrix(model.get_parameter(name).detach().cpu())
            found[name] = Sparse(mask, Dense(matrix[mask][None]), pattern)
        return found


def cubic(done: float, first: float, last: float) -> float:
    """The sparsity ``last + (first - last) (1 - done)^3`` when a share ``done`` of the pruning is over.

    It rises fast while many weights do not matter, and reaches ``last`` exactly at 1 (Zhu and Gupta, 2017).

    Examples
    --------
    >>> [cubic(done, 0.0, 0.8) for done in (0.0, 0.5, 1.0)]
    [0.0, 0.7000000000000001, 0.8]
    """
    return last + (first - last) * (1 - done) ** 3


def maskable(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Parameters of two dimensions or more by name: those that match a glob, or all that a layer calls ``weight``.

    Raises
    ------
    RequestError
        If a glob matches no such parameter, or the model has none.
    """
    # A parameter that is tied appears once.
    matrices = {name: weight for name, weight in model.named_parameters() if weight.ndim > 1}
    if names is None:
        found = {name: weight for name, weight in matrices.items() if name.rpartition(".")[2] == "weight"}
        if not found:
            raise RequestError(
                f"{type(model).__name__}: has no weight to change; name parameters of two dimensions or more, or "
                "give a model whose weights no other regimen computes"
            )
        return found
    for pattern in names:
        if not any(fnmatchcase(name, pattern) for name in matrices):
            known = ", ".join(list(matrices)[:5]) or "none"
            raise RequestError(
                f"{type(model).__name__}: has no weight {pattern!r} of two dimensions or more; choose from {known}"
            )
    return {name: weight for name, weight in matrices.items() if any(fnmatchcase(name, glob) for glob in names)}
