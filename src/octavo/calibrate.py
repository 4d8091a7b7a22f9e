"""Evidence: what calibration saw at each site.

One forward and one backward pass over the calibration data give, for every site, what it takes to tell how much an
error ``E`` in its matrix costs the whole model, to second order:

    expected loss = 1/2 * sum_i rows[i] * E[i] @ columns @ E[i].T

For a layer ``columns`` is the second moment of its inputs and ``rows`` that of the gradients at its outputs; for an
embedding ``columns`` is the second moment of the gradients at its output and ``rows`` says how often a token is met.
This is the Gauss-Newton matrix of the model's own divergence, with the usual independence of inputs and output
gradients (K-FAC; Martens & Grosse, 2015), so all sites and all families of methods are told apart in one currency.

A tensor that plays two roles, such as an embedding that is also the head, has such a term for each; their sum is the
expected loss (:func:`combined`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from octavo.ahead import in_order
from octavo.errors import RequestError
from octavo.objective import Batch, Objective, mask_of, sequences_in
from octavo.raw import raw_bytes
from octavo.sites import Site, Source

#: Calibration moments overfit: a share of their mean is added to every direction. Measured on MiniLM with 256
#: sentences, 0.1 was the best of 0.01, 0.03, 0.1, 0.3 and 1 on held-out text, from 2 to 4 bits (docs/decisions.md).
DAMPING = 0.1
#: Token frequencies are raised to this power. The quadratic model overrates how little a rare token's error matters:
#: one garbled word ruins its sentence. 1/2 beat 0 and 1 on held-out text (docs/decisions.md).
FREQUENCY_POWER = 0.5
#: Positions of a convolution that are read per batch; more of them are neighbours that say the same.
_PATCHES = 8192
MINIMUM_SEQUENCES = 8


@dataclass
class Evidence:
    """What is known about the inputs and outputs of one site.

    Parameters
    ----------
    rows
        (rows,) weights of the rows in units of loss, damped.
    columns
        (columns, columns) second moment, damped; None for the identity.
    samples
        Number of positions seen (0: data-free).
    terms
        Rows and columns of every role of a tensor that has several; ``rows`` and ``columns`` are then the one pair that
        stands for all of them.
    """

    rows: Tensor
    columns: Tensor | None
    samples: int = 0
    #: Results that depend on the moments alone and are needed more than once.
    cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    terms: tuple[tuple[Tensor, Tensor], ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        # Whoever works on a copy of it elsewhere makes what it needs faster than it is sent.
        return {**self.__dict__, "cache": {}}

    def loss(self, error: Tensor) -> float:
        """Expected increase of the whole model's loss for ``error`` (rows, columns)."""
        error = error.float()
        terms = self.terms or ((self.rows, self.columns),)
        return sum(_quadratic(error, rows, columns) for rows, columns in terms) / 2

    def moment(self, columns: int) -> Tensor:
        """The column moment as a dense (columns, columns) float32 matrix."""
        return torch.eye(columns) if self.columns is None else self.columns


def _quadratic(error: Tensor, rows: Tensor, columns: Tensor | None) -> float:
    squared = error.square() if columns is None else (error @ columns) * error
    return float(rows @ squared.sum(1))


def combined(roles: Sequence[Evidence]) -> Evidence:
    """Evidence of a tensor from that of each of its roles.

    The loss is the sum over roles of ``rows[i] * columns[j, k]``. Methods need one product: the one with the same
    marginals, ``rows = sum_t trace(C_t) r_t`` and ``columns = sum_t sum(r_t) C_t / sum_t sum(r_t) trace(C_t)``, which
    of all products is nearest to the sum in relative entropy.
    """
    if len(roles) == 1:
        return roles[0]
    terms = tuple((role.rows, role.columns) for role in roles if role.columns is not None)
    traces = [float(columns.double().trace()) for _, columns in terms]
    sums = [float(rows.double().sum()) for rows, _ in terms]
    total = sum(a * b for a, b in zip(sums, traces, strict=True))
    rows = sum((rows * trace for (rows, _), trace in zip(terms, traces, strict=True)), torch.zeros(()))
    columns = sum((columns * (share / total) for (_, columns), share in zip(terms, sums, strict=True)), torch.zeros(()))
    return Evidence(rows, columns, max(role.samples for role in roles), terms=terms)


@dataclass
class Calibration:
    """Evidence of all sites and what it was gathered from."""

    evidence: Mapping[str, Evidence]
    sequences: int = 0
    tokens: int = 0
    text: str = "none (data-free)"
    warnings: list[str] = field(default_factory=list)


class _Watch:
    """Accumulates the moments of one site while batches go through the model."""

    def __init__(self, site: Site, module: nn.Module, shared: dict[Any, Any]) -> None:
        self.site, self.module, self.shared = site, module, shared
        self.embedding = isinstance(module, nn.Embedding)
        self.rows = torch.zeros(site.rows, dtype=torch.float64)
        self.columns: Tensor | None = None
        self.samples = 0

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Tensor | None:
        mask = self.shared["mask"]
        inputs = args[0] if args else None
        if not isinstance(inputs, Tensor) or not isinstance(output, Tensor):
            return None
        if self.embedding:
            return self._embedding(inputs, output, mask)
        convolution = self.site.kind == "convolution"
        # Attention, recurrent and other modules hold matrices that are not what turns their input into their output.
        if not output.requires_grad or not (convolution or self._turns(inputs, output)):
            return None
        keep = None if convolution else _live(inputs, mask)
        moment, count = self._input_moment(inputs, keep)
        self._add(moment)
        if self.site.layout.kind == "transposed":
            # An element of the kernel meets every input once: the mean is one over outputs, of which there are more.
            count = output.numel() // self.site.rows * self.site.layout.groups
        self.samples += count
        axis = (
            1 if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or self.site.layout.kind == "transposed" else -1
        )

        def backward(gradient: Tensor) -> None:
            flat = gradient.movedim(axis, -1) if keep is None else gradient[keep]
            self.rows += flat.reshape(-1, self.site.rows).float().square().sum(0).double().cpu()

        # Hooks of a view are lost when models go on in place, as with ReLU(inplace=True); those of a copy are not.
        output = output.clone() if output._is_view() else output
        output.register_hook(backward)
        return output

    def _add(self, moment: Tensor) -> None:
        # In place, since the moments of wide layers are large; the first is a copy, since sites share moments.
        if self.columns is None:
            self.columns = moment.clone()
        else:
            self.columns += moment

    def _turns(self, inputs: Tensor, output: Tensor) -> bool:
        """Whether inputs have the columns of the matrix, and outputs its rows."""
        return inputs.ndim > 0 and inputs.shape[-1] == self.site.columns and output.shape[-1] == self.site.rows

    def _embedding(self, tokens: Tensor, output: Tensor, mask: Tensor | None) -> Tensor:
        live = mask.bool() if mask is not None and mask.numel() % tokens.numel() == 0 else None
        shown = tokens if live is None else tokens.expand(live.shape)[live]
        self.rows += torch.bincount(shown.flatten().cpu(), minlength=self.site.rows).double()
        self.samples += shown.numel()

        def backward(gradient: Tensor) -> None:
            flat = gradient[live] if live is not None and live.shape == gradient.shape[:-1] else gradient.flatten(0, -2)
            self._add((flat.float().t() @ flat.float()).double().cpu())

        if output.is_leaf:
            # A copy, since models may go on in place, which a leaf does not allow.
            output = output.detach().requires_grad_(True).clone()
        output.register_hook(backward)
        return output

    def _input_moment(self, inputs: Tensor, keep: Tensor | None) -> tuple[Tensor, int]:
        # Query, key and value read the same tensor: its moment is taken once. Keyed by identity while it is alive.
        key = (id(inputs), inputs._version, self.site.columns, _geometry(self.module))
        if key not in self.shared:
            flat = _columns_of(self.module, self.site, inputs.detach() if keep is None else inputs.detach()[keep])
            if len(flat) > _PATCHES and keep is None:
                flat = flat[:: -(-len(flat) // _PATCHES)]
            moment = (flat.t() @ flat).double().cpu()
            if self.site.layout.kind == "transposed":
                kernel = self.site.columns // len(moment)
                moment = torch.kron(moment, torch.eye(kernel, dtype=torch.float64))
            self.shared[key] = (inputs, moment, len(flat))
        _, moment, count = self.shared[key]
        return moment, count

    @property
    def seen(self) -> bool:
        """Whether any output was seen to depend on the site."""
        return self.columns is not None and self.samples > 0 and bool(self.columns.any()) and bool(self.rows.any())

    def evidence(self, sequences: int, moments: dict[tuple, tuple[Tensor, dict[str, Any]]]) -> Evidence:
        """The moments, damped; equal ones of other sites are shared through ``moments``."""
        assert self.columns is not None
        columns = self.columns / self.samples
        self.columns = None
        # Of an embedding, the mean squared gradient over tokens times their number in a sequence is loss a sequence.
        rows = _frequencies(self.rows) * self.samples if self.embedding else self.rows
        rows = rows / sequences
        rows = rows + DAMPING * rows.mean()
        # Sites that read the same inputs have equal moments: one copy serves them all, and one factorisation.
        key = (self.embedding, columns.shape, hashlib.sha256(raw_bytes(columns)).digest())
        if key not in moments:
            columns.diagonal().add_(DAMPING * columns.diagonal().mean())
            moments[key] = (columns.float(), {})
        moment, cache = moments[key]
        return Evidence(rows.float(), moment, self.samples, cache=cache)


def _live(inputs: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask as bools if it fits the leading dimensions of the inputs."""
    return mask.bool() if mask is not None and inputs.ndim == 3 and inputs.shape[:2] == mask.shape else None


def _geometry(module: nn.Module) -> str:
    """What else than its input decides which patches a convolution sees; nothing for other layers."""
    parts = ("kernel_size", "stride", "padding", "dilation", "padding_mode", "groups")
    return " ".join(str(getattr(module, part, "")) for part in parts)


def _columns_of(module: nn.Module, site: Site, inputs: Tensor) -> Tensor:
    """Input vectors of a site as (samples, columns); of grouped layers, those of all groups, one after another."""
    inputs = inputs.float()
    if site.layout.kind == "transposed":
        channels = inputs.movedim(1, -1).reshape(-1, inputs.shape[1] // site.layout.groups)
        return channels
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        patches = nn.functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
        windows = zip(module.kernel_size, module.stride, module.dilation, strict=True)
        for axis, (kernel, stride, dilation) in enumerate(windows, 2):
            patches = patches.unfold(axis, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
        # (examples, channels, *positions, *kernel)
        positions = math.prod(patches.shape[2 : 2 + len(module.kernel_size)])
        split = patches.reshape(len(patches), module.groups, site.shape[1], positions, -1)
        return split.movedim(2, 3).reshape(-1, site.columns)
    return inputs.reshape(-1, site.columns)


class Watches:
    """The watches of some sites: one for every module that holds a site's tensor.

    Parameters
    ----------
    holders
        Site name to the modules that hold it (:meth:`octavo.sites.Source.holders`).
    """

    def __init__(self, sites: Sequence[Site], holders: Mapping[str, Sequence[nn.Module]]) -> None:
        self._shared: dict[Any, Any] = {"mask": None}
        self.watches = {
            site.name: [_Watch(site, module, self._shared) for module in holders.get(site.name, ())] for site in sites
        }

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context in which the modules are watched."""
        handles = []
        try:
            for watch in (watch for watches in self.watches.values() for watch in watches):
                handles.append(watch.module.register_forward_pre_hook(_require_gradient))
                handles.append(watch.module.register_forward_hook(watch))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, batch: Batch) -> None:
        """Say which batch comes next, and let go of what the last one left."""
        self._shared.clear()
        self._shared["mask"] = mask_of(batch)

    def evidence(self, sequences: int) -> dict[str, list[Evidence]]:
        """What every site's watches have seen, without those that saw nothing; the moments are given up for it."""
        self._shared.clear()
        moments: dict[tuple, tuple[Tensor, dict[str, Any]]] = {}
        found = {
            name: [watch.evidence(sequences, moments) for watch in watches if watch.seen]
            for name, watches in self.watches.items()
        }
        return {name: roles for name, roles in found.items() if roles}


def calibrate(
    source: Source,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    objective: Objective,
    *,
    seed: int = 0,
    text: str = "",
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Calibration:
    """Gather the evidence of all sites from one pass over ``batches`` through a module in memory.

    Parameters
    ----------
    batches
        What ``source.module`` takes. Padding is left out by ``attention_mask``.
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
    watches = Watches(sites, source.holders())
    generator = torch.Generator().manual_seed(seed)
    with _differentiating(source.module), watches.watching():
        for done, batch in enumerate(batches):
            watches.begin(batch)
            outputs = objective.outputs(source.module, batch)
            check_outputs(outputs, done)
            if outputs.requires_grad:
                objective.probe(outputs, generator).backward()
            progress(done + 1, len(batches))
    evidence = {name: combined(roles) for name, roles in watches.evidence(sequences).items()}
    result = described(sites, {name: found.samples for name, found in evidence.items()}, sequences, text)
    result.evidence = {**evidence, **typical(source, sites, evidence)}
    return result


def count_sequences(batches: Sequence[Batch]) -> int:
    """Number of examples in all batches; too few are refused."""
    total = sum(sequences_in(batch) for batch in batches)
    if total < MINIMUM_SEQUENCES:
        raise RequestError(
            f"calibration has {total} sequences, at least {MINIMUM_SEQUENCES} are needed; give more data"
        )
    return total


def check_outputs(outputs: Tensor, number: int) -> None:
    """Raise :class:`RequestError` if a batch has outputs that are not finite."""
    if not bool(torch.isfinite(outputs).all()):
        raise RequestError(f"the model's outputs on calibration batch {number} are not finite; check the data")


@contextmanager
def _differentiating(module: nn.Module) -> Iterator[None]:
    """A context in which a module is in evaluation mode and no parameter asks for a gradient."""
    training = {submodule: submodule.training for submodule in module.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in module.parameters()}
    module.eval().requires_grad_(False)
    try:
        yield
    finally:
        for submodule, flag in training.items():
            submodule.training = flag
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


def _require_gradient(module: nn.Module, args: tuple) -> tuple | None:
    """Let gradients begin at the first site, since no parameter asks for one."""
    first = args[0] if args else None
    if isinstance(first, Tensor) and first.is_floating_point() and not first.requires_grad:
        return (first.detach().requires_grad_(True), *args[1:])
    return None


def described(sites: Sequence[Site], samples: Mapping[str, int], sequences: int, text: str) -> Calibration:
    """A calibration without its evidence: what was seen, given the positions seen at every site."""
    result = Calibration({}, sequences, max(samples.values(), default=0), text)
    for site in sites:
        seen = samples.get(site.name, 0)
        if not seen:
            result.warnings.append(
                f"{site.name}: calibration saw no output depend on it; it was weighed as a typical site"
            )
        elif seen < site.columns and site.kind != "embedding":
            result.warnings.append(
                f"{site.name}: {seen} calibration positions for {site.columns} input columns; "
                f"the moments were damped by {DAMPING:g} of their mean, more data would serve better"
            )
    return result


def _frequencies(counts: Tensor) -> Tensor:
    """Smoothed token frequencies that sum to one.

    Tokens never seen share the Good-Turing mass (the share of tokens seen once), spread evenly.
    """
    total, unseen = counts.sum(), counts == 0
    missing = (counts == 1).sum().clamp_min(1) / total if bool(unseen.any()) else torch.zeros((), dtype=counts.dtype)
    frequencies = counts / total * (1 - missing)
    frequencies[unseen] = missing / unseen.sum().clamp_min(1)
    powered = frequencies.clamp_min(1e-12) ** FREQUENCY_POWER
    return powered / powered.sum()


def typical(source: Source, sites: Sequence[Site], seen: Mapping[str, Evidence]) -> dict[str, Evidence]:
    """Evidence of sites without any, so that a given relative error costs what it costs at a typical site."""
    unseen = [site for site in sites if site.name not in seen]
    if not unseen:
        return {}
    levels = [
        seen[site.name].loss(site.layout.to_matrix(source.read(site.name))) for site in sites if site.name in seen
    ]
    level = float(torch.tensor(levels).median()) if levels else 1.0
    powers = {site.name: float(source.read(site.name).float().square().sum()) for site in unseen}
    return {
        site.name: Evidence(torch.full((site.rows,), 2 * level / max(powers[site.name], 1e-30)), None)
        for site in unseen
    }


def data_free(source: Source, sites: Sequence[Site]) -> Calibration:
    """Evidence without data: a relative error of a weight costs the same at every site, per weight.

    Every site's loss is the share of its energy that is lost, times its share of all weights.
    """
    weights = sum(site.parameters for site in sites)
    evidence = {}

    def power(site: Site) -> float:
        return float(source.read(site.name).float().square().sum())

    for site, lost in zip(sites, in_order(power, sites), strict=True):
        level = 2 * site.parameters / weights / max(lost, 1e-30)
        evidence[site.name] = Evidence(torch.full((site.rows,), level), None)
    return Calibration(evidence)
