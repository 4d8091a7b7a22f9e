"""One model that becomes each of several tuned models in turn, in the memory of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.artifact import Artifact
from octavo.errors import RequestError
from octavo.flows.deltas.tensors import opened
from octavo.sources.modules import own_tensors, unwrapped


class Deltas:
    """Deltas on a model in memory, of which one at a time is active; there is no copy of the base.

    A switch writes the tensors that the last and the next delta change: the base's values are read from its files, and
    the differences from the deltas' files, one tensor at a time. So the base comes back bit for bit, however often
    deltas change. The model must not run meanwhile.

    Parameters
    ----------
    model
        A model with the base's weights, of the tuned class: what the base lacks, such as a head, is filled by deltas
        that store it, and kept once as it is now.
    deltas
        Folders that :func:`octavo.compress` wrote with ``base=``, by the name of each.
    base
        The folder or file of the base, as for :func:`octavo.load`.

    Raises
    ------
    RequestError
        If one is no delta, bases differ, or the model lacks one of their tensors or holds other weights than the base.
    ArtifactError
        If one is damaged, or the base is another model.

    Examples
    --------
    >>> import copy, octavo, torch
    >>> from safetensors.torch import save_file
    >>> base = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
    >>> save_file(base.state_dict(), "net.safetensors")
    >>> for name in ("news", "mails"):
    ...     tuned = copy.deepcopy(base)
    ...     _ = tuned[0].weight.data.add_(0.01 * torch.randn(64, 64))
    ...     _ = octavo.compress(tuned, base=base, ratio=2, preset="data-free", progress=False).save(name)
    >>> served = octavo.Deltas(base, {"news": "news", "mails": "mails"}, base="net.safetensors")
    >>> served.use("mails") is base, served.active
    (True, 'mails')
    >>> served.use(None) is base  # the base again, bit for bit
    True
    """

    def __init__(self, model: nn.Module, deltas: Mapping[str, str | Path], *, base: Any = None) -> None:
        if isinstance(base, nn.Module):
            raise RequestError("base is a module, which would be a second copy in memory; give its folder or file")
        self.model = model
        self._deltas = dict(zip(deltas, opened(list(deltas.values()), base), strict=True))
        self._places = {name: self._placed(artifact, artifact.names()) for name, artifact in self._deltas.items()}
        #: What the model has where the base has nothing.
        self._own: dict[str, Tensor] = {}
        seen, held = set[str](), own_tensors(unwrapped(model))
        for artifact in self._deltas.values():
            for target, stored in self._placed(artifact, [*artifact.names(), *artifact.same]).items():
                if target not in seen or stored in artifact.delta.whole:  # type: ignore[union-attr]
                    self._check(artifact, target, stored, held[target])
                seen.add(target)
        #: The name of the active delta; None while the model is the base.
        self.active: str | None = None

    @torch.no_grad()
    def use(self, name: str | None) -> nn.Module:
        """Make the model one of the tuned models, or the base again (None); it is returned.

        Raises
        ------
        RequestError
            If there is no delta of that name.
        ArtifactError
            If a file is damaged; the model is the base then.
        """
        if name is not None and name not in self._deltas:
            raise RequestError(f"{name!r} is not one of the deltas; choose from {', '.join(map(repr, self._deltas))}")
        if name == self.active:
            return self.model
        held = own_tensors(unwrapped(self.model))
        if name is None:
            self._leave(held, {})
            return self.model
        new = self._places[name]
        try:
            for target, stored in new.items():
                held[target].copy_(self._deltas[name].tensor(stored))
        except BaseException:
            for target in new:
                held[target].copy_(self._before(name, target))
            self._leave(held, {})
            raise
        self._leave(held, new)
        self.active = name
        return self.model

    def _leave(self, held: Mapping[str, Tensor], new: Mapping[str, str]) -> None:
        """Give the base's values back to what the active delta changed and the next one does not."""
        if self.active is not None:
            for target in self._places[self.active]:
                if target not in new:
                    held[target].copy_(self._before(self.active, target))
        self.active = None

    def _before(self, name: str, target: str) -> Tensor:
        """The base's value of a tensor that a delta changes, or what the model had where the base has none."""
        stored = self._places[name][target]
        return self._own[target] if target in self._own else self._deltas[name].base.read(stored)

    def _placed(self, artifact: Artifact, names: Iterable[str]) -> dict[str, str]:
        """The model's names of tensors of a delta, and its own names of them."""
        held, prefix = own_tensors(unwrapped(self.model)), f"{getattr(self.model, 'base_model_prefix', '')}."
        found = {}
        for name in names:
            spelled = [option for option in (name, prefix + name, name.removeprefix(prefix)) if option in held]
            if not spelled:
                raise RequestError(
                    f"{artifact.path}: has the tensor {name!r}, which {type(self.model).__name__} lacks; give a model "
                    "of the class that was tuned"
                )
            found[spelled[0]] = name
        return found

    def _check(self, artifact: Artifact, target: str, stored: str, own: Tensor) -> None:
        """Refuse a model of other weights or shapes, and keep what the base lacks."""
        assert artifact.delta is not None
        if stored in artifact.delta.whole:
            if artifact.tensor(stored).shape != own.shape:
                raise RequestError(
                    f"{artifact.path}: {stored!r} has another shape in the model, {tuple(own.shape)}; give a model of "
                    "the class that was tuned"
                )
            self._own.setdefault(target, own.detach().clone())
        elif not torch.equal(artifact.base.read(stored).to(own), own):
            raise RequestError(
                f"{artifact.path}: the model's {target!r} is not that of the base {artifact.base.source.title!r}; load "
                "the base into the model first"
            )
