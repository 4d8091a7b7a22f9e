"""Influence of training examples on what a model does, by EK-FAC.

If one training example counts a little more, the weights move by ``(F + damping)^-1`` times its gradient. So the loss
of a query falls by the influence

    I(query, example) = grad_query^T (F + damping)^-1 grad_example

with ``F`` the Gauss-Newton matrix. EK-FAC (:mod:`octavo.calibration.curvature`) takes it layer by layer, in the
eigenbasis of the layer's inputs and output gradients. A query then costs a few products of matrices. Gradients of
training examples are streamed: they are made batch by batch, and none is kept.

Sources: Grosse et al. (2023), arXiv 2308.03296; Koh and Liang (2017), arXiv 1703.04730.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from octavo.calibration.curvature import Curvature, kronecker
from octavo.calibration.example_gradients import ExampleGradients, Trace
from octavo.calibration.iterated import GaussNewton, conjugate_gradients, lissa
from octavo.calibration.objective import Loss, Objective
from octavo.calibration.objective import objective as objective_named
from octavo.errors import RequestError
from octavo.sources.batches import Batch, sequences_in
from octavo.sources.source import StepProgress
from octavo.system.matmul import gram

#: Models of the curvature that are solved exactly, and iterations on the whole of it.
MODELS, ITERATIONS = ("ekfac", "kfac", "diagonal"), ("cg", "lissa")


@dataclass(frozen=True)
class Influence:
    """How much training examples lower the losses of queries.

    Parameters
    ----------
    scores
        (queries, examples), the influence in units of the loss, per share of the training data. A positive one lowers
        the loss of the query.
    layers
        Names of the layers that take part.
    left_out
        Names of the parameters that do not: embeddings, normalizations, grouped convolutions.
    seconds
        Time that the solver took, from measuring the curvature to the solved gradients of all queries.
    """

    scores: Tensor
    layers: tuple[str, ...]
    left_out: tuple[str, ...]
    seconds: float


def influence(
    module: nn.Module,
    examples: Sequence[Batch],
    queries: Sequence[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    *,
    objective: str | Objective = "kl",
    damping: float = 0.1,
    solver: str = "ekfac",
    steps: int = 200,
    seed: int = 0,
    progress: StepProgress = lambda done, total: None,
) -> Influence:
    """The influence of training examples on the losses of queries.

    Parameters
    ----------
    module
        The trained module. It is read in evaluation mode, and not changed.
    examples, queries
        Batches of what it was trained on, and of what is asked about. Four passes go over the examples.
    loss
        Takes the module and a batch, and returns one loss per example, shape (examples,).
    objective
        Whose curvature ``F`` is: ``kl`` for the cross-entropy of classes or tokens, ``squared`` for regressions, or an
        :class:`octavo.calibration.objective.Objective`. Labels are drawn from the model's own outputs.
    damping
        Share of a layer's mean eigenvalue that is added to all of its eigenvalues.
    solver
        ``ekfac``. For comparisons ``kfac`` and ``diagonal``, which are simpler models of ``F``. For a check on a few
        queries the iterations ``cg`` and ``lissa``, which take the whole ``F``, and many passes over the examples
        (:mod:`octavo.calibration.iterated`).
    steps
        The most passes of an iteration over the examples.
    seed
        Seed of the labels that are drawn.
    progress
        Called with the number of passes done and their total.

    Returns
    -------
    Influence
        The scores (queries, examples), in the order of the batches.

    Raises
    ------
    RequestError
        If there is no example, query or layer, the outputs depend on no layer, a loss does not have one number per
        example or is not finite, or the solver is not known.

    Examples
    --------
    >>> import torch
    >>> from octavo.calibration import influence
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(64, 8)
    >>> y = (x[:, 0] > 0).long()
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    >>> def losses(module, batch):
    ...     return torch.nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")
    >>> found = influence(net, [(x[:32], y[:32]), (x[32:], y[32:])], [(x[:3], y[:3])], losses)
    >>> found.scores.shape, bool((found.scores[0, 0] > 0))
    (torch.Size([3, 64]), True)
    """
    if solver not in MODELS + ITERATIONS:
        raise RequestError(f"influence: solver is {solver!r}; choose one of {', '.join(MODELS + ITERATIONS)}")
    if not damping > 0:
        raise RequestError(f"influence: damping is {damping}; give a share above 0, such as 0.1")
    for name, batches in (("examples", examples), ("queries", queries)):
        if not sum(map(sequences_in, batches)):
            raise RequestError(f"influence: there are no {name}; give at least one batch")
    wanted, losses, gradients = objective_named(objective), Loss(loss), ExampleGradients(module)
    with gradients.watching():
        asked = _together(gradients, queries, losses)
        progress(1, 3)
        started = time.perf_counter()
        if solver in MODELS:
            curvatures = layer_curvatures(gradients, examples, wanted, seed=seed, kind=solver)
            levels = {name: damping * float(curvature.values.mean()) for name, curvature in curvatures.items()}
            solved = {name: curvatures[name].solve(asked[name], level) for name, level in levels.items() if level > 0}
            if not solved:
                raise RequestError(
                    "influence: the outputs on the examples depend on none of the layers; check the model and the data"
                )
        else:
            matrix = GaussNewton(gradients, examples, wanted)
            solved = _iterated(matrix, asked, damping, solver, steps, seed)
        seconds = time.perf_counter() - started
        progress(2, 3)
        traced = zip(examples, _traced(gradients, examples, losses), strict=True)
        scores = torch.cat([_scores(traces, solved, sequences_in(batch)) for batch, traces in traced], 1)
        progress(3, 3)
    return Influence(scores, tuple(layer.name for layer in gradients.layers), gradients.left_out, seconds)


def layer_curvatures(
    gradients: ExampleGradients, batches: Sequence[Batch], objective: Objective, *, seed: int = 0, kind: str = "ekfac"
) -> dict[str, Curvature]:
    """The curvature of every layer's matrix ``[weight | bias]``, in two passes over the batches.

    Labels are drawn again for the second pass, so that a basis is not evaluated on the samples that defined it. The
    eigenvalues are not damped. This runs inside :meth:`ExampleGradients.watching`.

    Parameters
    ----------
    kind
        ``ekfac``; ``kfac``, which needs the first pass alone; or ``diagonal``, whose basis is that of the weights.
    """
    total = sum(map(sequences_in, batches))
    if kind == "diagonal":
        eyes = {
            layer.name: [torch.eye(size, dtype=torch.float64) for size in layer.shape] for layer in gradients.layers
        }
        found = {name: kronecker(*pair) for name, pair in eyes.items()}
    else:
        found = _kronecker(gradients, batches, objective, seed, total)
    if kind == "kfac":
        return found
    squares = {name: torch.zeros_like(curvature.values) for name, curvature in found.items()}
    for traces in _traced(gradients, batches, objective, seed + 1):
        for name, trace in traces.items():
            for _, matrices in trace.matrices():
                squares[name] += found[name].rotated(matrices).square().sum(0).double()
    return {name: replace(curvature, values=squares[name] / total) for name, curvature in found.items()}


def _kronecker(
    gradients: ExampleGradients, batches: Sequence[Batch], objective: Objective, seed: int, total: int
) -> dict[str, Curvature]:
    """The product of both moments of every layer that is used."""
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    for traces in _traced(gradients, batches, objective, seed):
        for name, trace in traces.items():
            # Positions on which no output depends, such as padding, are left out.
            live = trace.gradients.any(-1)
            inputs, outputs = trace.inputs[live].double(), trace.gradients[live].double()
            left, right, count = sums.get(name, (0.0, 0.0, 0))
            sums[name] = left + gram(outputs), right + gram(inputs), count + len(inputs)
    # A sum over the positions of an example on one side, a mean on the other.
    return {name: kronecker(left / total, right / max(count, 1)) for name, (left, right, count) in sums.items()}


def mean_eigenvalues(
    gradients: ExampleGradients, batches: Sequence[Batch], objective: Objective, *, seed: int = 0
) -> dict[str, float]:
    """The means of the eigenvalues of :func:`layer_curvatures`, in one pass without its bases."""
    sums = dict.fromkeys((layer.name for layer in gradients.layers), 0.0)
    for traces in _traced(gradients, batches, objective, seed + 1):
        for name, trace in traces.items():
            sums[name] += sum(float(matrices.square().sum(dtype=torch.float64)) for _, matrices in trace.matrices())
    total = sum(map(sequences_in, batches))
    return {layer.name: sums[layer.name] / total / math.prod(layer.shape) for layer in gradients.layers}


def _traced(
    gradients: ExampleGradients, batches: Sequence[Batch], objective: Objective, seed: int | None = None
) -> Iterator[dict[str, Trace]]:
    """The traces of every batch: of samples of the curvature if there is a seed, otherwise of the outputs' sum."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for batch in batches:

        def total(batch: Batch = batch) -> Tensor:
            outputs = objective.outputs(gradients.module, batch)
            return outputs.sum() if generator is None else objective.probe(outputs, generator)

        yield gradients.traces(batch, total)


def _together(gradients: ExampleGradients, batches: Sequence[Batch], losses: Loss) -> dict[str, Tensor]:
    """Gradients (examples, rows, columns) of all examples by layer, of zeros where a batch does not use it."""
    found: dict[str, list[Tensor]] = {layer.name: [] for layer in gradients.layers}
    for batch, traces in zip(batches, _traced(gradients, batches, losses), strict=True):
        for layer in gradients.layers:
            empty = layer.parameters[0].new_zeros(sequences_in(batch), *layer.shape)
            trace = traces.get(layer.name)
            found[layer.name].append(empty if trace is None else trace.gradients.mT @ trace.inputs)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _iterated(
    matrix: GaussNewton, asked: Mapping[str, Tensor], damping: float, solver: str, steps: int, seed: int
) -> dict[str, Tensor]:
    gradients = matrix.gradients
    levels = mean_eigenvalues(gradients, matrix.batches, matrix.objective, seed=seed)
    ridge = gradients.flat({n: torch.full_like(part[:1], damping * levels[n]) for n, part in asked.items()})[0]
    if not bool((ridge > 0).all()):
        names = ", ".join(name for name, level in levels.items() if not level > 0)
        raise RequestError(f"influence: the outputs do not depend on {names}; solver {solver} needs all layers")
    vectors = gradients.flat(dict(asked))
    if solver == "cg":
        return gradients.unflat(conjugate_gradients(matrix.times, vectors, ridge, most=steps))
    return gradients.unflat(lissa(matrix, vectors, ridge, most=steps, seed=seed))


def _scores(traces: Mapping[str, Trace], solved: Mapping[str, Tensor], examples: int) -> Tensor:
    """Products (queries, examples) of solved gradients with those of a batch; zeros where it uses no such layer."""
    first = next(iter(solved.values()))
    total = first.new_zeros(len(first), examples)
    for name, ours in solved.items():
        if name in traces:
            total += torch.cat([ours.flatten(1) @ theirs.flatten(1).t() for _, theirs in traces[name].matrices()], 1)
    return total
