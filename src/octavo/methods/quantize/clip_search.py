"""Clip ratios of weights and of inputs, searched together for the layers of a block."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibration.blocks import Call
from octavo.calibration.entropy_blocks import layer_of
from octavo.errors import RequestError
from octavo.forms import Grid
from octavo.methods.quantize.grids import fit, nearest
from octavo.sources.batches import Batch, run
from octavo.system.matmul import fast_matmul

SOURCE = "Q-VLM (Wang et al., 2024, arXiv 2410.08119)"


@dataclass(frozen=True)
class Clip:
    """Shares of the range that grids span: of the rows of weights, and of input vectors."""

    weights: float
    inputs: float


@dataclass
class Clipped:
    """What a search chose.

    Parameters
    ----------
    bits
        Bits of what linear layers read.
    clips
        Ratios by layer.
    forms
        Forms of the layers' matrices by parameter name, as :func:`octavo.save` takes them.
    errors
        Error of every block's outputs.
    runs
        How often a layer was run on all batches.
    """

    bits: int
    clips: dict[str, Clip] = field(default_factory=dict)
    forms: dict[str, Grid] = field(default_factory=dict)
    errors: list[float] = field(default_factory=list)
    runs: int = 0

    @contextmanager
    def rounding_inputs(self, model: nn.Module) -> Iterator[None]:
        """A context in which the linear layers of the model, or of a copy of it, round what they read."""
        with ExitStack() as stack:
            for name, clip in self.clips.items():
                stack.enter_context(_rounding(layer_of(model, name), self.bits, clip.inputs))
            yield


@dataclass(frozen=True)
class ClipSearch:
    """All combinations of the ratios of a block's layers are tried; those of least error at its output are kept.

    All linear layers of a layer share its two ratios. The error is the mean of ``|y - z|^power``, where ``y`` is what
    the block returns in the original model, and ``z`` what it returns rounded, behind all blocks that were searched
    before it. A block of ``n`` layers runs ``c + c^2 + ... + c^n`` layers, for ``c = len(ratios)^2``.

    Parameters
    ----------
    weights, inputs
        Bits, 2 to 8. Every row of a weight and every input vector has a grid of its own, with a zero point.
    ratios
        Shares of the range to try, for weights and for inputs. Q-VLM has 1.0, 0.9, ... 0.4.
    power
        Of the error; below 1 outliers count less.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model, batch = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(32, 8)
    >>> found = ClipSearch(ratios=(1.0, 0.8)).search(model, [("0", "1")], [batch])
    >>> found.runs, sorted(found.forms)
    (20, ['0.weight', '1.weight'])
    """

    weights: int = 4
    inputs: int = 4
    ratios: tuple[float, ...] = (1.0, 0.8, 0.6)
    power: float = 0.5

    def __post_init__(self) -> None:
        if not self.ratios or not all(0 < ratio <= 1 for ratio in self.ratios):
            raise RequestError(f"ratios: {self.ratios} are not shares of a range; give some above 0 and up to 1")
        if not self.power > 0:
            raise RequestError(f"power: {self.power} does not grow with the error; choose one above 0")
        if not all(2 <= bits <= 8 for bits in (self.weights, self.inputs)):
            raise RequestError(f"bits: {self.weights} of weights, {self.inputs} of inputs; choose 2 to 8")

    @fast_matmul()
    @torch.no_grad()
    def search(self, model: nn.Module, blocks: Sequence[Sequence[str]], batches: Sequence[Batch]) -> Clipped:
        """Search the blocks in their order; the model stays as it is.

        Parameters
        ----------
        blocks
            Names of layers, each of which reads what the one before it in its block returns
            (:func:`octavo.calibration.entropy_blocks.entropy_blocks`). Blocks are in the order in which they run.
        batches
            Calibration inputs. Layers must not keep a cache: give ``use_cache=False`` to a decoder.

        Raises
        ------
        RequestError
            If a name is not that of a layer with linear layers or has two places, or layers are not in sequence.
        """
        names = [name for block in blocks for name in block]
        if not batches or len({*names}) < len(names) or not all(blocks):
            raise RequestError("clip search: needs batches, and blocks that have layers, each layer once")
        found, rounded = Clipped(self.inputs), copy.deepcopy(model).eval()
        wanted = [_recorded(model.eval(), names, batch) for batch in batches]
        with ExitStack() as stack:
            for block in blocks:
                layers = [_Layer(name, layer_of(rounded, name), self) for name in block]
                given = [_recorded(rounded, block, batch) for batch in batches]
                _check_chain(block, given)
                targets = [seen[block[-1]].outputs for seen in wanted]
                begun = [seen[block[0]].states for seen in given]
                calls = [[seen[name].call for seen in given] for name in block]
                error, chosen, runs = self._best(layers, calls, begun, targets)
                found.runs += runs
                found.errors.append(error)
                for layer, clip in zip(layers, chosen, strict=True):
                    found.clips[layer.name] = clip
                    found.forms.update(layer.forms(clip.weights))
                    layer.settle(clip.weights)
                    stack.enter_context(_rounding(layer.module, self.inputs, clip.inputs))
        return found

    def _best(
        self, layers: Sequence[_Layer], calls: Sequence[Sequence[Call]], states: Sequence[Tensor], targets: list[Tensor]
    ) -> tuple[float, tuple[Clip, ...], int]:
        """Least error of the layers, the ratios that have it, and how many layers were run."""
        best, chosen, runs = float("inf"), tuple[Clip, ...](), 0
        for pair in product(self.ratios, repeat=2):
            clip, runs = Clip(*pair), runs + 1
            after = [layers[0].run(state, call, clip) for state, call in zip(states, calls[0], strict=True)]
            rest: tuple[Clip, ...] = ()
            if len(layers) > 1:
                error, rest, more = self._best(layers[1:], calls[1:], after, targets)
                runs += more
            else:
                parts = [(y - z).abs().pow(self.power).mean() for y, z in zip(targets, after, strict=True)]
                error = float(torch.stack(parts).mean())
            if error < best:
                best, chosen = error, (clip, *rest)
        if not chosen:
            raise RequestError(f"layer {layers[0].name!r}: its outputs are not finite; choose other batches")
        return best, chosen, runs


@dataclass(frozen=True)
class _Seen:
    """What a layer read and returned in one pass of the model."""

    states: Tensor
    call: Call
    outputs: Tensor


class _Layer:
    """A layer with the versions of its matrices by ratio."""

    def __init__(self, name: str, module: nn.Module, search: ClipSearch) -> None:
        self.name, self.module, self.search = name, module, search
        self.linears = {
            f"{part}.weight" if part else "weight": child for part, child in module.named_modules() if _is_linear(child)
        }
        if not self.linears:
            raise RequestError(f"layer {name!r}: has no linear layers; leave it out")
        weights = {key: linear.weight.detach() for key, linear in self.linears.items()}
        self._forms = {
            ratio: {key: _grid(weight.float(), search.weights, ratio) for key, weight in weights.items()}
            for ratio in search.ratios
        }
        self._values = {
            ratio: {key: forms[key].dense().to(weight) for key, weight in weights.items()}
            for ratio, forms in self._forms.items()
        }

    def forms(self, ratio: float) -> dict[str, Grid]:
        """The forms by their names in the model."""
        return {f"{self.name}.{key}": form for key, form in self._forms[ratio].items()}

    def settle(self, ratio: float) -> None:
        """Give the module these weights."""
        for key, linear in self.linears.items():
            linear.weight.copy_(self._values[ratio][key])

    def run(self, states: Tensor, call: Call, clip: Clip) -> Tensor:
        """What the layer returns with these ratios."""
        weights = self._values[clip.weights]
        with _rounding(self.module, self.search.inputs, clip.inputs):
            result = call.of(
                lambda *args, **keywords: torch.func.functional_call(self.module, weights, args, keywords), states
            )
        return result[0] if isinstance(result, tuple) else result


def _grid(matrix: Tensor, bits: int, ratio: float) -> Grid:
    """A matrix rounded to nearest, on grids that span a share of the range of each row."""
    low, high = matrix.amin(1, keepdim=True), matrix.amax(1, keepdim=True)
    fitted = fit("clip search", matrix.clamp(low * ratio, high * ratio), {"bits": bits, "group": "row"}, False)
    return fitted.grid(nearest(matrix, fitted))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


@contextmanager
def _rounding(module: nn.Module, bits: int, ratio: float) -> Iterator[None]:
    """A context in which the linear layers of a module round their input vectors."""

    @torch.no_grad()
    def rounded(linear: nn.Module, args: tuple) -> tuple:
        flat = _grid(args[0].flatten(0, -2).float(), bits, ratio).dense()
        return (flat.view_as(args[0]).to(args[0]), *args[1:])

    handles = [child.register_forward_pre_hook(rounded) for child in module.modules() if _is_linear(child)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _recorded(model: nn.Module, names: Sequence[str], batch: Batch) -> dict[str, _Seen]:
    """What layers read and return while the model runs on a batch."""
    seen: dict[str, _Seen] = {}

    def add(name: str, module: nn.Module, args: tuple, keywords: Mapping[str, Any], result: Any) -> None:
        outputs = result[0] if isinstance(result, tuple) else result
        states, call = Call.split(args, keywords)
        if name in seen:
            raise RequestError(f"layer {name!r}: runs twice in a pass; search layers that run once")
        seen[name] = _Seen(states, call, outputs)

    with ExitStack() as stack:
        for name in names:
            handle = layer_of(model, name).register_forward_hook(partial(add, name), with_kwargs=True)
            stack.callback(handle.remove)
        run(model, batch)
    if missing := [name for name in names if name not in seen]:
        raise RequestError(f"layers {missing} did not run on a batch; leave them out")
    return seen


def _check_chain(block: Sequence[str], given: Sequence[Mapping[str, _Seen]]) -> None:
    for seen in given:
        for before, after in pairwise(block):
            if seen[before].outputs is not seen[after].states:
                raise RequestError(f"block {tuple(block)}: {after!r} does not read what {before!r} returns; split it")
