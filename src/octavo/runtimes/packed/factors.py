"""Running as factors: a product of decoded factors is used if it is measured to be faster than the dense one."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import OctavoError, RequestError
from octavo.forms import Dense, Form
from octavo.forms.base import MAX_DEPTH, form_class
from octavo.runtimes.packed.kernels import DenseKernel, Geometry
from octavo.runtimes.packed.speed import interleaved
from octavo.runtimes.packed.staged import chains, staged
from octavo.runtimes.packed.weight import PackedWeight, decode_in_state, without_packed
from octavo.sources.batches import Batch, run
from octavo.sources.sites import Layout

#: Factors may take at most this share of the dense time: a smaller gain is within the noise and does not justify
#: different rounding.
_WORTH = 0.95
#: Rounds of a measurement, minimal seconds per round, and seconds after which no other round starts.
_ROUNDS, _TURN, _PATIENCE = 12, 1e-3, 2.0
#: Factors that first take this many times the dense time are not measured further.
_HOPELESS = 3.0
_CHOICES = "_octavo_factored"
_FORWARDS = {layer.forward for layer in (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)}
#: Measurements of this process, so that layers of one shape and form are measured once.
_MEASURED: dict[Hashable, dict[str, float]] = {}


@dataclass(frozen=True)
class RunChoice:
    """How a factored site runs.

    Parameters
    ----------
    as_factors
        Whether it runs from its factors; otherwise they were multiplied out.
    seconds
        Time of one pass through all modules that use it, as ``factors`` and as ``dense``; None if not measured.
    reason
        The reason.
    """

    as_factors: bool
    seconds: dict[str, float] | None
    reason: str


class FactorKernel(DenseKernel):
    """A form with all parts decoded once to float32.

    Inputs of other dtypes are cast to float32, and outputs back.

    Parameters
    ----------
    form
        Any form.
    shape
        Shape of the weight that it represents.
    """

    name = "factors (float32)"

    def __init__(self, form: Form, shape: tuple[int, ...]) -> None:
        super().__init__(_decoded(form))
        self.chains = chains(self.form, shape) if len(shape) > 2 else None

    @property
    def convolves(self) -> bool:  # noqa: D102
        return self.chains is not None

    def tensors(self) -> list[Tensor]:  # noqa: D102
        return self.form.held() + [stage.weight for chain in self.chains or [] for stage in chain]

    def matmul(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.form.apply(x.float()).to(x.dtype)

    def convolve(self, x: Tensor, shape: tuple[int, ...], bias: Tensor | None, geometry: Geometry) -> Tensor | None:
        """Apply all stages in sequence."""
        if self.chains is None:
            return None
        return staged(x.float(), self.chains, shape[2:], None if bias is None else bias.float(), geometry).to(x.dtype)


def _decoded(form: Form) -> Form:
    """The form with every part that is not and does not contain a factorization as a float32 matrix."""
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


def is_factorization(meta: Mapping[str, Any], depth: int = 0) -> bool:
    """Whether a form with this manifest entry, or a form nested in it, consists of factors."""
    inner = (value for value in meta.values() if isinstance(value, Mapping) and depth < MAX_DEPTH)
    kind = form_class(meta.get("form"))
    return (kind is not None and kind.factored) or any(is_factorization(value, depth + 1) for value in inner)


def run_as_factors(
    module: nn.Module, sites: Iterable[tuple[str, Sequence[str], Form, Layout]], batch: Batch = None
) -> None:
    """Replace dense weights of a module by factors for sites where these are measured to be faster.

    Parameters
    ----------
    sites
        Name, parameters of the module with its weight, form and layout.
    batch
        An input of the module. Every site is measured with its inputs for this batch. Without one, layers are measured
        with a single row, tables with a single index, and convolutions stay dense, since image sizes are unknown.
    """
    shown = None if batch is None else _inputs(module, batch)
    choices: dict[str, RunChoice] = {}
    for name, parameters, form, layout in sites:
        users = _users(module, parameters)
        choices[name], weight = _choose(users, form, layout, shown)
        if choices[name].as_factors:
            for owner, attribute in users:
                owner._parameters[attribute] = weight
                if decode_in_state not in owner._state_dict_hooks.values():
                    owner.register_state_dict_post_hook(decode_in_state)
    module.__dict__[_CHOICES] = choices


def factored(module: nn.Module) -> dict[str, RunChoice]:
    """How every factored site runs in a module loaded with ``factors=True``, by name in the artifact."""
    return dict(module.__dict__.get(_CHOICES, {}))


def dense_again(module: nn.Module) -> None:
    """Replace weights loaded packed or with ``factors=True`` by dense parameters with the same content."""
    without_packed(module)
    module.__dict__.pop(_CHOICES, None)


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
    """Shape and dtype of the first input of every layer, as a tensor without content."""
    found: dict[nn.Module, Tensor] = {}

    def note(owner: nn.Module, args: tuple, keywords: dict[str, Any]) -> None:
        x = next(iter((*args, *keywords.values())), None)
        if isinstance(x, Tensor):
            found.setdefault(owner, x.detach().to("meta"))

    supported = [owner for owner in module.modules() if _supported(owner)]
    handles = [owner.register_forward_pre_hook(note, with_kwargs=True) for owner in supported]
    training = {owner: owner.training for owner in module.modules()}
    try:
        # Not in inference mode: tensors that a module keeps from this call must allow training.
        with torch.no_grad():
            run(module.eval(), batch)
    except OctavoError:
        raise
    except Exception as error:
        raise RequestError(
            f"{type(module).__name__}: fails on the batch for measuring factors: {type(error).__name__}: {error}; give "
            "batch= the module's inputs, as a tensor, a tuple of arguments or a mapping"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for owner, flag in training.items():
            owner.training = flag
    return found


def _supported(owner: nn.Module) -> bool:
    """Whether it runs like a known layer; a subclass with its own forward may do anything."""
    return type(owner).forward in _FORWARDS or type(owner).__name__ == "Conv1D"


def _choose(
    users: Sequence[tuple[nn.Module, str]], form: Form, layout: Layout, shown: Mapping[nn.Module, Tensor] | None
) -> tuple[RunChoice, nn.Parameter | None]:
    """How a site runs, and its weight as factors if they could be made."""

    def stays(reason: str) -> tuple[RunChoice, None]:
        return RunChoice(False, None, reason), None

    if not users:
        return stays("no module holds its weight")
    if not all(_supported(owner) for owner, _ in users):
        names = " and ".join(sorted({type(owner).__name__ for owner, _ in users}))
        return stays(
            f"held by {names}: only linear layers, convolutions and embeddings with the standard forward run as factors"
        )
    dense = users[0][0]._parameters[users[0][1]]
    assert dense is not None
    if dense.device.type != "cpu":
        return stays(f"on {dense.device}: factors run on a CPU")
    if any(getattr(owner, "groups", 1) != 1 for owner, _ in users):
        return stays("a convolution in groups")
    kernel = FactorKernel(form, tuple(dense.shape))
    if dense.ndim > 2 and not kernel.convolves:
        return stays("its factors are not convolutions")
    weight = nn.Parameter(PackedWeight(kernel, layout, tuple(dense.shape), dense.dtype), requires_grad=False)
    seconds = {"factors": 0.0, "dense": 0.0}
    parts = sorted((part, tuple(tensor.shape)) for part, tensor in kernel.form.tensors().items())
    described = (json.dumps(kernel.form.meta(), sort_keys=True), tuple(parts), torch.get_num_threads())
    for owner, attribute in users:
        like = shown.get(owner) if shown is not None else _smallest(owner, dense, layout)
        if like is None:
            return stays("the batch does not run it" if shown is not None else "no batch was given to measure it")
        key = (type(owner), repr(owner), tuple(like.shape), like.dtype, tuple(dense.shape), dense.dtype, described)
        if key not in _MEASURED:
            _MEASURED[key] = _measure(owner, attribute, weight, _drawn(owner, like))
        for way, value in _MEASURED[key].items():
            seconds[way] += value
    if seconds["factors"] <= _WORTH * seconds["dense"]:
        return RunChoice(True, seconds, "measured to be faster than dense"), weight
    return RunChoice(False, seconds, "measured not to be faster than dense"), weight


def _smallest(owner: nn.Module, dense: Tensor, layout: Layout) -> Tensor | None:
    """One row of inputs, or one index; None for a convolution."""
    if isinstance(owner, nn.Embedding):
        return torch.empty(1, dtype=torch.long, device="meta")
    columns = layout.matrix_shape(tuple(dense.shape))[1]
    return torch.empty(1, columns, dtype=dense.dtype, device="meta") if dense.ndim == 2 else None


def _drawn(owner: nn.Module, like: Tensor) -> Tensor:
    """Random inputs of the given shape and dtype."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(owner, nn.Embedding):
        return torch.randint(0, owner.num_embeddings, like.shape, dtype=like.dtype, generator=generator)
    return torch.randn(like.shape, generator=generator).to(like.dtype)


def _measure(owner: nn.Module, attribute: str, weight: nn.Parameter, x: Tensor) -> dict[str, float]:
    """Least seconds of the module's forward with its dense weight and with the other, measured alternately."""
    dense, repeats = owner._parameters[attribute], 1

    def call(candidate: nn.Parameter | None) -> Any:
        def turn() -> None:
            owner._parameters[attribute] = candidate
            for _ in range(repeats):
                owner.forward(x)

        return turn

    try:
        ways = {"factors": call(weight), "dense": call(dense)}
        seconds = interleaved(ways, rounds=2, of=min, patience=_PATIENCE)
        if seconds["factors"] > _HOPELESS * seconds["dense"]:
            return seconds
        repeats = max(1, math.ceil(_TURN / seconds["dense"]))
        seconds = interleaved(ways, _ROUNDS, _PATIENCE, min)
    finally:
        owner._parameters[attribute] = dense
    return {way: value / repeats for way, value in seconds.items()}
