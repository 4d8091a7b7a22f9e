"""Running as factors: where a product of decoded factors is measured to be cheaper than the dense one, it is taken."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.forms import Dense, Folded, Form, GroupedLowRank, LowRank, Scaled, Separable, Sum
from octavo.objective import Batch, run
from octavo.running.kernels import Geometry, Plain
from octavo.running.speed import interleaved
from octavo.running.weight import PackedWeight
from octavo.sites import Layout

#: Forms, by the name that stands in manifests, whose parts can be applied one after another.
FACTORIZATIONS = frozenset({"lowrank", "grouped-lowrank", "tensor-train", "separable", "row-blocks"})
#: Factors must take this share of the dense time at most: less is within the noise, and not worth other rounding.
_WORTH = 0.95
#: Turns of a measurement, and the seconds that each lasts at least.
_ROUNDS, _TURN = 12, 1e-3
_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_CHOICES = "_octavo_factored"
#: What was measured in this process, so that layers of one shape and form are measured once.
_MEASURED: dict[Hashable, dict[str, float]] = {}


@dataclass(frozen=True)
class Choice:
    """How a factored site runs.

    Parameters
    ----------
    as_factors
        Whether from its factors; otherwise they were multiplied out.
    seconds
        What one pass through all modules that use it takes, as ``factors`` and as ``dense``; None if not measured.
    reason
        Why.
    """

    as_factors: bool
    seconds: dict[str, float] | None
    reason: str


@dataclass(frozen=True)
class _Stage:
    """A convolution that is a part of one.

    Parameters
    ----------
    weight
        (outputs, inputs / groups, *kernel).
    along
        The axes along which the whole kernel's stride, padding and dilation are this one's.
    """

    weight: Tensor
    groups: int
    along: tuple[bool, ...]

    def __call__(self, x: Tensor, bias: Tensor | None, moves: Sequence[tuple[int, ...]]) -> Tensor:
        """Convolve with the stride, padding and dilation of ``moves`` where they are this one's."""
        own = [
            tuple(value if mine else still for value, mine in zip(values, self.along, strict=True))
            for values, still in zip(moves, (1, 0, 1), strict=True)
        ]
        return _CONVOLUTIONS[len(self.along)](x, self.weight, bias, *own, self.groups)


class Factors(Plain):
    """A form with all its parts decoded to float32, once.

    Inputs of another dtype are cast to float32 and outputs back.

    Parameters
    ----------
    form
        Any form.
    shape
        Of the weight that it stands for.
    """

    name = "factors (float32)"

    def __init__(self, form: Form, shape: tuple[int, ...]) -> None:
        super().__init__(_decoded(form))
        self.chains = _chains(self.form, shape) if len(shape) > 2 else None

    @property
    def convolves(self) -> bool:  # noqa: D102
        return self.chains is not None

    def tensors(self) -> list[Tensor]:  # noqa: D102
        return self.form.held() + [stage.weight for chain in self.chains or [] for stage in chain]

    def matmul(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.form.apply(x.float()).to(x.dtype)

    def convolve(self, x: Tensor, shape: tuple[int, ...], bias: Tensor | None, geometry: Geometry) -> Tensor | None:
        """Stage after stage, chains of stages added."""
        if self.chains is None:
            return None
        kernel = shape[2:]
        inputs, moves = _padded(x.float(), kernel, geometry)
        total: Tensor | None = None
        for chain in self.chains:
            out = inputs
            for stage in chain:
                # The bias is that of the last stage of one chain.
                last = stage is chain[-1] and total is None and bias is not None
                out = stage(out, bias.float() if last and bias is not None else None, moves)
            total = out if total is None else total + out
        return None if total is None else total.to(x.dtype)


def _decoded(form: Form) -> Form:
    """The form with everything in it that is no factorization, nor holds one, as a float32 matrix."""
    if not is_factorization(form.meta()):
        return Dense(form.dense())
    changes: dict[str, Any] = {}
    for field in fields(form):  # type: ignore[arg-type]
        value = getattr(form, field.name)
        if isinstance(value, Form):
            changes[field.name] = _decoded(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], Form):
            changes[field.name] = tuple(map(_decoded, value))
    return replace(form, **changes)  # type: ignore[type-var]


def _padded(x: Tensor, kernel: Sequence[int], geometry: Geometry) -> tuple[Tensor, list[tuple[int, ...]]]:
    """The input, and stride, padding and dilation by axis; what ``"same"`` asks for is padded here."""
    stride, dilation = (_by_axis(value, len(kernel)) for value in (geometry.stride, geometry.dilation))
    if not isinstance(geometry.padding, str):
        return x, [stride, _by_axis(geometry.padding, len(kernel)), dilation]
    if geometry.padding == "same":
        spare = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        x = functional.pad(x, [side for width in reversed(spare) for side in (width // 2, width - width // 2)])
    return x, [stride, (0,) * len(kernel), dilation]


def _by_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _chains(form: Form, shape: tuple[int, ...]) -> list[list[_Stage]] | None:
    """Convolutions one after another that give what one with the form's weight gives, in chains to be added."""
    rows, channels, *kernel = shape
    here, nowhere = (True,) * len(kernel), (False,) * len(kernel)
    if isinstance(form, LowRank):
        form = GroupedLowRank(form.left, form.right, 1)
    if isinstance(form, GroupedLowRank) and channels % form.groups == 0:
        right = form.right.dense().reshape(-1, channels // form.groups, *kernel)
        left = form.left.dense().reshape(rows, -1, *(1 for _ in kernel))
        return [[_Stage(right, form.groups, here), _Stage(left, 1, nowhere)]]
    if isinstance(form, Folded) and form.fold == "spatial" and list(form.kernel) == [channels, *kernel]:
        return _spatial(form.inner, shape)
    if isinstance(form, Separable) and len(kernel) == 2:
        return _separable(form, shape)
    if isinstance(form, Sum):
        parts = [_chains(part, shape) for part in (form.base, form.correction)]
        return None if parts[0] is None or parts[1] is None else parts[0] + parts[1]
    if isinstance(form, Scaled):
        gains, chains = form.factors.reshape(-1, *(1 for _ in shape[1:])), _chains(form.base, shape)
        return chains and [[*chain[:-1], replace(chain[-1], weight=chain[-1].weight * gains)] for chain in chains]
    if isinstance(form, Dense):
        return [[_Stage(form.weight.reshape(shape), 1, here)]]
    return None


def _spatial(form: Form, shape: tuple[int, ...]) -> list[list[_Stage]] | None:
    """``(c h) x (n w)``: h x 1 filters over all channels, then 1 x w, every group of filters over its own."""
    if isinstance(form, LowRank):
        form = GroupedLowRank(form.left, form.right, 1)
    rows, channels, height, width = shape
    if not isinstance(form, GroupedLowRank) or rows % form.groups:
        return None
    down = form.left.dense().t().reshape(-1, channels, height, 1).contiguous()
    across = form.right.dense().reshape(form.groups, -1, rows // form.groups, width)
    across = across.transpose(1, 2).reshape(rows, -1, 1, width).contiguous()
    return [[_Stage(down, 1, (True, False)), _Stage(across, form.groups, (False, True))]]


def _separable(form: Separable, shape: tuple[int, ...]) -> list[list[_Stage]] | None:
    """1 x 1 over the channels, then down, then across; the last adds up the terms of every filter."""
    rows, channels, height, width = shape
    parts = [part.dense() for part in (form.channel, form.vertical, form.horizontal)]
    if [part.shape[1] for part in parts] != [channels, height, width]:
        return None
    # From term by term to filter by filter, so that the terms of a filter are one group.
    channel, down, across = (part.unflatten(0, (form.terms, rows)).transpose(0, 1).contiguous() for part in parts)
    each = rows * form.terms
    return [[
        _Stage(channel.reshape(each, channels, 1, 1), 1, (False, False)),
        _Stage(down.reshape(each, 1, height, 1), each, (True, False)),
        _Stage(across.reshape(rows, form.terms, 1, width), rows, (False, True)),
    ]]  # fmt: skip


def is_factorization(meta: Mapping[str, Any]) -> bool:
    """Whether a form of this description is made of factors, or one inside it is."""
    inner = (value for value in meta.values() if isinstance(value, Mapping))
    return meta.get("form") in FACTORIZATIONS or any(map(is_factorization, inner))


def run_as_factors(
    module: nn.Module, sites: Iterable[tuple[str, Sequence[str], Form, Layout]], batch: Batch = None
) -> None:
    """Give a module that holds dense weights the factors of those sites where they are measured to be cheaper.

    Parameters
    ----------
    sites
        Name, the parameters of the module that have its weight, form and layout.
    batch
        What the module is called with. Every site is measured at the inputs that it then gets; without one layers are
        measured at a single row, tables at a single index, and convolutions, whose images are not known, stay dense.
    """
    shown = None if batch is None else _inputs(module, batch)
    choices: dict[str, Choice] = {}
    for name, parameters, form, layout in sites:
        users = _users(module, parameters)
        choices[name] = _choose(users, form, layout, shown)
        if choices[name].as_factors:
            dense = users[0][0]._parameters[users[0][1]]
            assert dense is not None
            weight = _parameter(Factors(form, tuple(dense.shape)), layout, dense)
            for owner, attribute in users:
                owner._parameters[attribute] = weight
    module.__dict__[_CHOICES] = choices


def factored(module: nn.Module) -> dict[str, Choice]:
    """How every factored site of a module runs that was loaded with ``factors=True``, by its name in the artifact."""
    return dict(module.__dict__.get(_CHOICES, {}))


def _users(module: nn.Module, parameters: Iterable[str]) -> list[tuple[nn.Module, str]]:
    """The modules that hold any of these parameters, with the attribute."""
    wanted = {id(module.get_parameter(name)) for name in parameters}
    return [
        (owner, attribute)
        for owner in module.modules()
        for attribute, parameter in owner._parameters.items()
        if id(parameter) in wanted
    ]


def _inputs(module: nn.Module, batch: Batch) -> dict[nn.Module, Tensor]:
    """Shape and dtype, as a tensor without content, of what flows into every layer first."""
    found: dict[nn.Module, Tensor] = {}

    def note(owner: nn.Module, args: tuple) -> None:
        if args and isinstance(args[0], Tensor):
            found.setdefault(owner, args[0].detach().to("meta"))

    handles = [owner.register_forward_pre_hook(note) for owner in module.modules() if _supported(owner)]
    training = {owner: owner.training for owner in module.modules()}
    try:
        with torch.inference_mode():
            run(module.eval(), batch)
    finally:
        for handle in handles:
            handle.remove()
        for owner, flag in training.items():
            owner.training = flag
    return found


def _supported(owner: nn.Module) -> bool:
    layer = isinstance(owner, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return layer or type(owner).__name__ == "Conv1D"


def _choose(
    users: Sequence[tuple[nn.Module, str]], form: Form, layout: Layout, shown: Mapping[nn.Module, Tensor] | None
) -> Choice:
    if not users:
        return Choice(False, None, "no module holds its weight")
    if not all(_supported(owner) for owner, _ in users):
        names = " and ".join(sorted({type(owner).__name__ for owner, _ in users}))
        return Choice(False, None, f"held by {names}: only linear layers, convolutions and embeddings run as factors")
    dense = users[0][0]._parameters[users[0][1]]
    assert dense is not None
    if dense.device.type != "cpu":
        return Choice(False, None, f"on {dense.device}: factors run on a CPU")
    if any(getattr(owner, "groups", 1) != 1 for owner, _ in users):
        return Choice(False, None, "a convolution in groups")
    kernel = Factors(form, tuple(dense.shape))
    if dense.ndim > 2 and not kernel.convolves:
        return Choice(False, None, "its factors are no convolutions of their own")
    weight, seconds = _parameter(kernel, layout, dense), {"factors": 0.0, "dense": 0.0}
    for owner, attribute in users:
        like = shown.get(owner) if shown is not None else _smallest(owner, dense, layout)
        if like is None:
            missing = "the batch does not run it" if shown is not None else "no batch was given to measure it at"
            return Choice(False, None, missing)
        parts = sorted((part, tuple(tensor.shape)) for part, tensor in kernel.form.tensors().items())
        key = (
            type(owner), repr(owner), tuple(like.shape), like.dtype, tuple(dense.shape), dense.dtype,
            json.dumps(kernel.form.meta(), sort_keys=True), tuple(parts), torch.get_num_threads(),
        )  # fmt: skip
        if key not in _MEASURED:
            _MEASURED[key] = _measure(owner, attribute, weight, _drawn(owner, like))
        for way, value in _MEASURED[key].items():
            seconds[way] += value
    if seconds["factors"] <= _WORTH * seconds["dense"]:
        return Choice(True, seconds, "measured to be cheaper than dense")
    return Choice(False, seconds, "measured not to be cheaper than dense")


def _parameter(kernel: Factors, layout: Layout, dense: Tensor) -> nn.Parameter:
    return nn.Parameter(PackedWeight(kernel, layout, tuple(dense.shape), dense.dtype), requires_grad=False)


def _smallest(owner: nn.Module, dense: Tensor, layout: Layout) -> Tensor | None:
    """One row of inputs, or one index; None for a convolution."""
    if isinstance(owner, nn.Embedding):
        return torch.empty(1, dtype=torch.long, device="meta")
    columns = layout.matrix_shape(tuple(dense.shape))[1]
    return torch.empty(1, columns, dtype=dense.dtype, device="meta") if dense.ndim == 2 else None


def _drawn(owner: nn.Module, like: Tensor) -> Tensor:
    """Inputs of that shape and dtype."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(owner, nn.Embedding):
        return torch.randint(0, owner.num_embeddings, like.shape, dtype=like.dtype, generator=generator)
    return torch.randn(like.shape, generator=generator).to(like.dtype)


def _measure(owner: nn.Module, attribute: str, weight: nn.Parameter, x: Tensor) -> dict[str, float]:
    """Seconds of the module's own forward with its dense weight and with the other, in turns: the least of each."""
    dense, repeats = owner._parameters[attribute], 1

    def call(candidate: nn.Parameter | None) -> Any:
        def turn() -> None:
            owner._parameters[attribute] = candidate
            for _ in range(repeats):
                owner.forward(x)

        return turn

    try:
        once = interleaved({"dense": call(dense)}, rounds=2, of=min)["dense"]
        repeats = max(1, math.ceil(_TURN / once))
        seconds = interleaved({"factors": call(weight), "dense": call(dense)}, _ROUNDS, of=min)
    finally:
        owner._parameters[attribute] = dense
    return {way: value / repeats for way, value in seconds.items()}
