"""Inner widths of factorized layers: which there are, how they are chosen, and what a net needs after it was cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.forms import Dense, Form, LowRank
from octavo.methods.factorize.factors import whitened
from octavo.sources.batches import run
from octavo.system.modes import evaluating


def factorizable(model: nn.Module) -> tuple[str, ...]:
    """Weights of all linear layers, and of all convolutions without groups."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return tuple(
        f"{name}.weight".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, kinds) and getattr(module, "groups", 1) == 1
    )


def ladder(rank: int, growth: float) -> list[int]:
    """Widths from 1 to ``rank``, each about ``growth`` times the last and at least one larger."""
    widths = [1]
    while widths[-1] < rank:
        widths.append(min(rank, max(widths[-1] + 1, round(widths[-1] * growth))))
    return widths


def truncated(forms: Mapping[str, LowRank], widths: Mapping[str, int]) -> dict[str, LowRank]:
    """The given number of first columns of the factors, without retraining.

    Raises
    ------
    RequestError
        If a layer has fewer columns.
    """
    cut = {}
    for name, width in widths.items():
        left, right = forms[name].left.dense(), forms[name].right.dense()
        if not 1 <= width <= left.shape[1]:
            raise RequestError(
                f"{name!r}: has {left.shape[1]} columns and cannot be cut to {width}; choose at most as many"
            )
        cut[name] = LowRank(Dense(left[:, :width].contiguous()), Dense(right[:width].contiguous()))
    return cut


def components(model: nn.Module) -> dict[str, LowRank]:
    """All singular components of the weights that can be factorized, by name."""
    found = {}
    for name in factorizable(model):
        parts = whitened(model.get_parameter(name).detach().flatten(1))
        found[name] = LowRank(Dense(parts.left), Dense(parts.right))
    return found


def with_weights(model: nn.Module, forms: Mapping[str, Form]) -> nn.Module:
    """A copy of the model with the given weights."""
    made, state = copy.deepcopy(model), model.state_dict()
    made.load_state_dict({**state, **{name: form.dense().view_as(state[name]) for name, form in forms.items()}})
    return made


def costs(
    model: nn.Module, forms: Mapping[str, LowRank], loss: Callable[[nn.Module], float], growth: float = 2.0
) -> dict[str, dict[int, float]]:
    """The loss when only one layer is cut to a width, for every layer and some of its widths.

    Parameters
    ----------
    loss
        Returns the loss of a model on development data.
    growth
        Ratio of successive widths.
    """
    return {
        name: {
            width: loss(with_weights(model, truncated(forms, {name: width})))
            for width in ladder(form.left.shape[1], growth)
        }
        for name, form in forms.items()
    }


def within_share(
    forms: Mapping[str, LowRank], curves: Mapping[str, Mapping[int, float]], share: float
) -> dict[str, LowRank]:
    """Factors of least loss that have a share of the weights of all matrices, without retraining.

    Layers whose factors would not be smaller than the matrix are left out: they stay dense.

    Parameters
    ----------
    curves
        What :func:`costs` returned.
    """
    shapes = {name: form.shape for name, form in forms.items()}
    widths = allocated(curves, shapes, round(share * sum(rows * columns for rows, columns in shapes.values())))
    return truncated(
        forms, {name: k for name, k in widths.items() if k * sum(shapes[name]) < shapes[name][0] * shapes[name][1]}
    )


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Recompute the statistics of batch normalization, since layers of another rank change means and variances.

    They become the averages over these inputs; everything else is unchanged. All other layers run in evaluation mode,
    as they will where the statistics are used. A normalization that does not run keeps its statistics.

    Raises
    ------
    RequestError
        If there are no batches, or the model fails on one; then all statistics are as they were.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    before = [{name: tensor.clone() for name, tensor in norm.named_buffers()} for norm in norms]
    count = 0
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        try:
            for inputs in batches:
                run(model, inputs)
                count += 1
        except BaseException:
            count = 0
            raise
        finally:
            for norm, momentum, old in zip(norms, momenta, before, strict=True):
                norm.momentum = momentum
                if not count or not norm.num_batches_tracked:
                    for name, tensor in old.items():
                        norm.get_buffer(name).copy_(tensor)
    if not count:
        raise RequestError("recalibrate: there are no batches to take statistics from; give at least one")
    return model


def allocated(
    curves: Mapping[str, Mapping[int, float]], shapes: Mapping[str, tuple[int, int]], budget: int
) -> dict[str, int]:
    """Widths of least loss whose weights fit a budget, chosen greedily by loss per weight.

    Parameters
    ----------
    curves
        For each layer, the loss on development data when only it is cut to a width. It is linear between measured
        widths, and only the lower convex hull counts.
    shapes
        Rows and columns of each layer. A width whose factors have at least as many weights as the matrix costs as much
        as the matrix.
    budget
        Total number of weights of all layers.

    Raises
    ------
    RequestError
        If a width of 1 everywhere does not fit.
    """

    def size(name: str, width: int) -> int:
        rows, columns = shapes[name]
        return min(width * (rows + columns), rows * columns)

    chosen = dict.fromkeys(curves, 1)
    total = sum(size(name, 1) for name in curves)
    if total > budget:
        raise RequestError(
            f"budget: {budget} weights are too few, as a width of 1 in all layers takes {total}; give at least that"
        )
    gains = []
    for name, curve in curves.items():
        hull = _hull([(size(name, width), loss, width) for width, loss in sorted(curve.items())])
        for (small, high, _), (large, low, width) in pairwise(hull):
            gains.append(((high - low) / (large - small), name, width))
        # Whatever remains is spent too, even if it no longer lowers the loss.
        gains.append((0.0, name, max(curve)))
    for _, name, wide in sorted(gains, reverse=True):
        # As wide as fits: the rest of the budget goes to the next best.
        for width in range(wide, chosen[name], -1):
            more = size(name, width) - size(name, chosen[name])
            if total + more <= budget:
                total, chosen[name] = total + more, width
                break
    return chosen


def _hull(points: list[tuple[int, float, int]]) -> list[tuple[int, float, int]]:
    """The falling part of the lower convex hull of (size, loss), with its widths."""
    hull: list[tuple[int, float, int]] = []
    for point in points:
        if hull and (point[0] <= hull[-1][0] or point[1] >= hull[-1][1]):
            continue
        while len(hull) > 1 and (hull[-1][1] - point[1]) * (hull[-1][0] - hull[-2][0]) >= (
            hull[-2][1] - hull[-1][1]
        ) * (point[0] - hull[-1][0]):
            hull.pop()
        hull.append(point)
    return hull
