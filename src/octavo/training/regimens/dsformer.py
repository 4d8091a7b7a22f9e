"""The straight-through factorizer of DSFormer: weights learn to be dense-sparse while their supports still move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from octavo.errors import RequestError
from octavo.forms import Form
from octavo.methods.factorize.dictionaries import DictionaryFactors, Shape, again, learn, split
from octavo.sources.sites import Layout
from octavo.training.computed import refuse_shared, usual_layouts
from octavo.training.formed import unparametrized
from octavo.training.regimens.base import Regimen, regimen

SOURCE = "DSFormer (Chand, Prabhu & Kumar, 2023, arXiv 2312.13211)"


@regimen("dsformer", source=SOURCE)
@dataclass
class StraightThroughFactorizer(Regimen):
    """Forward with ``What = S D``, backward as if it were ``W``.

    The optimizer updates dense shadow weights ``W``. Before every step one round of dictionary learning
    (:mod:`octavo.methods.factorize.dictionaries`) factorizes them, starting from the dictionaries and codes of the last
    step. The network runs with the product, whose gradient is used for ``W``: ``dL/dW := dL/dWhat``. The atoms of a row
    can change at every step, but change little because of the warm start. :meth:`forms` factorizes a last time and
    drops the shadows. To continue with fixed supports, pass its result to :func:`octavo.training.formed`, which trains
    coefficients and dictionaries.

    Parameters
    ----------
    shapes
        Width, atoms and nonzeros of the blocks of each weight, by parameter name.
    layouts
        Layouts of weights that are to be read as other matrices than usual. Dictionaries cost least if the matrix is
        tall.
    rounds
        Rounds of dictionary learning before the first step and after the last one.
    """

    shapes: Mapping[str, Shape]
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    rounds: int = 8
    _found: dict[str, _Factorized] = field(default_factory=dict, init=False, repr=False)
    _forms: dict[str, Form] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def suited_to(cls, model: nn.Module) -> Self:
        """Linear layers at about a quarter of their weights: blocks of 16 columns, 16 atoms, 2 of them a row."""
        found = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                width = min(16, module.in_features)
                atoms = min(16, max(module.out_features, width))
                found[f"{name}.weight".lstrip(".")] = Shape(width, atoms, min(2, atoms, width))
        if not found:
            raise RequestError(f"dsformer: {type(model).__name__} has no linear layer; give shapes of other weights")
        return cls(found)

    def begin(self, model: nn.Module, steps: int) -> None:
        """Factorize every weight, and run the network with the products."""
        # A weight that two modules share has two names here, so that it is refused by either.
        known = dict(model.named_parameters(remove_duplicate=False))
        usual = usual_layouts(model, self.shapes.keys() & known.keys())
        layouts = {}
        for name, shape in self.shapes.items():
            weight = known.get(name)
            if weight is None:
                raise RequestError(
                    f"{type(model).__name__}: has no parameter {name!r} that can be factorized; name one of its weights"
                )
            layouts[name] = self.layouts.get(name, usual[name])
            rows, columns = layouts[name].matrix_shape(tuple(weight.shape))
            if not (
                0 < shape.nonzeros <= shape.atoms <= max(rows, shape.width) and shape.nonzeros <= shape.width <= columns
            ):
                raise RequestError(
                    f"{name!r}: {shape} does not fit a matrix of {rows} x {columns}; give nonzeros up to atoms and "
                    f"width, atoms up to the {rows} rows, and a width up to the {columns} columns"
                )
        refuse_shared(model, self.shapes)
        for name, shape in self.shapes.items():
            prefix, _, parameter = name.rpartition(".")
            self._found[name] = _Factorized(known[name], layouts[name], shape, self.rounds)
            parametrize.register_parametrization(model.get_submodule(prefix), parameter, self._found[name])

    def before_step(self, step: int) -> None:
        """Run one warm round for the current values of every weight."""
        for factorized in self._found.values():
            factorized.factorize()

    def state(self) -> dict[str, Any]:
        """Dictionaries and codes for the next round."""
        return {name: asdict(factorized.factors) for name, factorized in self._found.items()}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue with the given dictionaries and codes."""
        for name, factorized in self._found.items():
            device = factorized.product.device
            factorized.factors = DictionaryFactors(**{key: part.to(device) for key, part in state[name].items()})

    def forms(self, model: nn.Module) -> dict[str, Form]:
        """Factorize a last time; the model only keeps the products. Later calls return the same forms."""
        for name, factorized in self._found.items():
            for _ in range(self.rounds):
                factorized.factorize()
            self._forms[name] = factorized.form()
            prefix, _, parameter = name.rpartition(".")
            unparametrized(model.get_submodule(prefix), parameter)
        self._found = {}
        return dict(self._forms)


class _Factorized(nn.Module):
    """The parametrization: the shadow weight is its original, and the network sees the product."""

    product: Tensor

    def __init__(self, weight: Tensor, layout: Layout, shape: Shape, rounds: int) -> None:
        super().__init__()
        self.layout, self.width, self.shadow = layout, shape.width, [weight]
        self.factors: DictionaryFactors = learn(self._blocks(), shape, rounds)
        self.register_buffer("product", self._product(), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        # The second term is zero: it only passes the gradient through.
        return self.product + (weight - weight.detach())

    @torch.no_grad()
    def factorize(self) -> None:
        """Run one round."""
        blocks, last = self._blocks(), self.factors
        # The model may have been moved since the last round.
        parts = (part.to(blocks.device) for part in (last.index, last.values, last.dictionary))
        self.factors = again(blocks, DictionaryFactors(*parts))
        self.product = self._product()

    def form(self) -> Form:
        """The factors of the product."""
        return self.factors.form(self.layout.matrix_shape(tuple(self.shadow[0].shape))[1])

    def _blocks(self) -> Tensor:
        return split(self.layout.to_matrix(self.shadow[0].detach()), self.width)

    def _product(self) -> Tensor:
        return self.layout.from_matrix(self.form().dense(), tuple(self.shadow[0].shape))
