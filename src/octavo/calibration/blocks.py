"""Models as a chain of equal blocks: a prelude (embeddings), the blocks in sequence, and a postlude (norm, head).

This code knows no architectures. The blocks are the list of modules of one class that holds most weights. Everything
around them is computed by the model's own forward pass, with every block replaced by a stub. The stubs of the prelude
record the other arguments of a block (masks, rotary tables, which may differ between layers). The stubs of the postlude
return hidden states that were computed block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibration.objective import Objective
from octavo.errors import RequestError
from octavo.sources.batches import Batch
from octavo.sources.conversions import Conversion
from octavo.sources.source import Source

#: The part of a model around its blocks; the blocks are numbered.
AROUND = -1


class _Stop(BaseException):
    """Ends a forward pass early. It is not an Exception, so that no handler reports it."""


@dataclass(frozen=True)
class Call:
    """The arguments of a block besides its hidden states."""

    args: tuple
    kwargs: dict[str, Any]
    #: Name of the hidden states, None if they are the first positional argument.
    name: str | None

    @classmethod
    def split(cls, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
        """The hidden states of a call, and its other arguments."""
        if args and isinstance(args[0], Tensor):
            return args[0], cls(args[1:], dict(kwargs), None)
        if isinstance(kwargs.get("hidden_states"), Tensor):
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            return kwargs["hidden_states"], cls(args, rest, "hidden_states")
        raise RequestError("its blocks take no hidden states, neither first nor by name")

    def of(self, block: Callable[..., Any], states: Tensor) -> Any:
        """Call a block with other hidden states."""
        return block(states, *self.args, **self.kwargs) if self.name is None else block(
            *self.args, **self.kwargs, **{self.name: states}
        )  # fmt: skip


class Blocks:
    """The blocks of a module.

    Parameters
    ----------
    module
        The whole model.
    prefix
        Name of the list of blocks in it.
    """

    def __init__(self, module: nn.Module, prefix: str) -> None:
        self.module, self.prefix = module, prefix
        self.list = list(module.get_submodule(prefix).children())
        #: Number of elements in the tuple that a block returns; 0 if it returns bare hidden states.
        self._returned = 0
        #: Whether :meth:`check` succeeded.
        self.checked = False

    @classmethod
    def find(cls, module: nn.Module) -> Blocks | None:
        """Find the blocks of a module: the list of at least two modules of one class with most weights, or None."""
        best, most = None, 0
        for name, child in module.named_modules():
            members = list(child.children())
            if isinstance(child, nn.ModuleList) and len(members) > 1 and len({type(member) for member in members}) == 1:
                weights = sum(parameter.numel() for parameter in child.parameters())
                if weights > most:
                    best, most = name, weights
        return None if best is None else cls(module, best)

    def part_of(self, name: str) -> int:
        """The number of the block that contains the parameter or module of that name, or :data:`AROUND`."""
        if not name.startswith(f"{self.prefix}."):
            return AROUND
        return int(name[len(self.prefix) + 1 :].partition(".")[0])

    def check(self, objective: Objective, batch: Batch) -> None:
        """Check on one batch that the blocks form a chain; needs the weights of block 0 and around the blocks.

        Raises
        ------
        RequestError
            If a block takes an input that depends on weights, other than the hidden states of the preceding block.
        """
        wanted = {parameter: parameter.requires_grad for parameter in self.module.parameters()}
        own = self.list[0].forward

        def learn(*args: Any, **kwargs: Any) -> Any:
            result = own(*args, **kwargs)
            if isinstance(result, tuple):
                if not isinstance(result[0], Tensor) or any(item is not None for item in result[1:]):
                    raise RequestError("its blocks return more than their hidden states")
                self._returned = len(result)
            elif not isinstance(result, Tensor):
                raise RequestError(f"its blocks return {type(result).__name__}")
            raise _Stop

        def refuse_other_gradients(args: tuple, kwargs: Mapping[str, Any]) -> None:
            _, call = Call.split(args, kwargs)
            others = [*call.args, *call.kwargs.values()]
            others += [item for value in others if isinstance(value, tuple | list) for item in value]
            if any(isinstance(value, Tensor) and value.requires_grad for value in others):
                raise RequestError("its blocks share inputs that depend on weights")

        try:
            with torch.no_grad(), self._stubs([learn] * len(self.list)), suppress(_Stop):
                objective.outputs(self.module, batch)
            self.module.requires_grad_(True)
            with torch.enable_grad():
                self._prelude(objective, batch, refuse_other_gradients)
            self.checked = True
        except RequestError as error:
            raise RequestError(
                f"{type(self.module).__name__}: cannot be run block by block: {error}; allow enough --memory to load "
                "it whole, or compress without data (--preset data-free)"
            ) from error
        finally:
            for parameter, flag in wanted.items():
                parameter.requires_grad_(flag)

    def prelude(self, objective: Objective, batch: Batch) -> tuple[Tensor, list[Call]]:
        """Hidden states before the first block, with gradients if enabled, and the other arguments of every block."""
        calls: list[Call] = []
        shared: dict[int, tuple[Tensor, Tensor]] = {}

        def detached(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(map(detached, value))
            if isinstance(value, Tensor):
                # One mask serves all blocks: it is kept once, with the original, so that its address is not reused.
                return shared.setdefault(id(value), (value, value.detach()))[1]
            return value

        def record(args: tuple, kwargs: Mapping[str, Any]) -> None:
            _, call = Call.split(args, kwargs)
            rest = {key: detached(value) for key, value in call.kwargs.items()}
            calls.append(Call(detached(call.args), rest, call.name))

        return self._prelude(objective, batch, record), calls

    def _prelude(
        self, objective: Objective, batch: Batch, record: Callable[[tuple, Mapping[str, Any]], None]
    ) -> Tensor:
        """Run the model with blocks passing states through; returns the states before the first block."""
        passed: list[Tensor] = []
        seen: list[int] = []

        def stub(number: int) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                states, _ = Call.split(args, kwargs)
                if (passed and states is not passed[0]) or seen != list(range(number)):
                    raise RequestError("its blocks are not run one after another")
                record(args, kwargs)
                passed.append(states)
                seen.append(number)
                if number == len(self.list) - 1:
                    raise _Stop
                return self._returning(states)

            return forward

        with self._stubs([stub(number) for number in range(len(self.list))]), suppress(_Stop):
            objective.outputs(self.module, batch)
        if len(seen) < len(self.list):
            raise RequestError(f"{len(self.list) - len(seen)} of its blocks are not run")
        return passed[0]

    def run(self, number: int, states: Tensor, call: Call) -> Tensor:
        """Hidden states after a block."""
        result = call.of(self.list[number], states)
        return result[0] if isinstance(result, tuple) else result

    def postlude(self, objective: Objective, batch: Batch, states: Tensor) -> Tensor:
        """The outputs that the objective compares, from the hidden states after the last block."""
        with self._stubs([lambda *args, **kwargs: self._returning(states)] * len(self.list)):
            return objective.outputs(self.module, batch)

    def _returning(self, states: Tensor) -> Any:
        return (states, *[None] * (self._returned - 1)) if self._returned else states

    @contextmanager
    def _stubs(self, functions: list[Callable]) -> Iterator[None]:
        """Replace the forward functions of the blocks; models can still read the blocks' attributes."""
        own = [block.__dict__.get("forward") for block in self.list]
        try:
            for block, function in zip(self.list, functions, strict=True):
                block.__dict__["forward"] = function
            with _without_cache(self.module):
                yield
        finally:
            for block, before in zip(self.list, own, strict=True):
                del block.__dict__["forward"]
                if before is not None:
                    block.__dict__["forward"] = before


@contextmanager
def _without_cache(module: nn.Module) -> Iterator[None]:
    """Keep a model of ``transformers`` from giving its blocks a cache, which would grow each time that a block runs."""
    configs = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    before = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    try:
        for config, _ in before:
            config.use_cache = False
        yield
    finally:
        for config, value in before:
            config.use_cache = value


class Loader:
    """Loads the weights of one part of a skeleton at a time, in float32.

    Parameters
    ----------
    source
        The source; the parameters of its module are on the ``meta`` device, without content.

    Raises
    ------
    RequestError
        If a parameter of the module is not in the source.
    """

    def __init__(self, source: Source, blocks: Blocks) -> None:
        assert source.module is not None
        self.source = source
        state = source.module.state_dict(keep_vars=True)
        # Tied parameters are one object under several names; at least one of the names is in the source.
        known: dict[int, str | Conversion] = {id(state[target]): name for name, target in source.direct.items()}
        self._targets: dict[int, str] = {}
        for conversion in source.conversions:
            known.update((id(state[target]), conversion) for target in conversion.targets)
            self._targets.update((id(state[target]), target) for target in conversion.targets)
        self._places: dict[int, dict[str, list[tuple[nn.Module, str]]]] = {}
        self._conversions: dict[int, list[Conversion]] = {}
        for parameter, tensor in state.items():
            found = known.get(id(tensor))
            if found is None:
                if isinstance(tensor, nn.Parameter):
                    raise RequestError(
                        f"{source.title}: the model's {parameter!r} is not in the source's weights; add the missing "
                        "weights, or give a memory limit that fits the whole model"
                    )
                continue
            owner, _, leaf = parameter.rpartition(".")
            part = blocks.part_of(parameter)
            key = found if isinstance(found, str) else self._targets[id(tensor)]
            self._places.setdefault(part, {}).setdefault(key, []).append((source.module.get_submodule(owner), leaf))
            if isinstance(found, Conversion) and found not in self._conversions.setdefault(part, []):
                self._conversions[part].append(found)

    def read(self, part: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a part by name: in the source or, for converted tensors, in the module.

        Parameters
        ----------
        weights
            Tensors that replace the source's.
        """

        def tensor(name: str) -> Tensor:
            stored = self.source.aliases.get(name, name)
            found = self.source.value(stored, weights.get(stored))
            return found.float() if found.is_floating_point() else found

        result: dict[str, Tensor] = {}
        for conversion in self._conversions.get(part, ()):
            result.update(conversion.values([tensor(name) for name in conversion.names]))
        result.update((name, tensor(name)) for name in self._places.get(part, ()) if name not in result)
        return result

    @contextmanager
    def placed(self, part: int, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """A context in which a part of the module has the weights returned by :meth:`read`."""
        before: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for name, places in self._places.get(part, {}).items():
                value = tensors[name]
                filled: Tensor | None = None
                for owner, leaf in places:
                    group: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
                    before.append((group, leaf, group[leaf]))
                    if filled is None:
                        filled = nn.Parameter(value, requires_grad=False) if group is owner._parameters else value
                    group[leaf] = filled
            yield
        finally:
            for group, leaf, old in before:
                group[leaf] = old
