"""Convolutions with one-way filters from the start: over the channels, then vertical, then horizontal.

Source: Boukraichi et al. (2023), arXiv 2304.04964; several terms a filter are an addition.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.forms import Dense, Separable
from octavo.sources.sites import Layout
from octavo.training.formed import formed, forms_of

_KINDS: tuple[Any, ...] = (nn.Conv2d, nn.ConvTranspose2d)


def one_way(module: nn.Module, terms: int = 1) -> nn.Module:
    """Train every filter of ``module`` as a sum of outer products of one-way filters, in place.

    ``filter[n, c, y, x] = sum_t channel[t, n, c] vertical[t, n, y] horizontal[t, n, x]``: a term has ``c + h + w``
    weights instead of ``c h w``. They are drawn at random, such that filters have the variance of the layer's own.
    The layers run unchanged, with filters that are multiplied out; :func:`in_stages` makes a net that runs the one-way
    filters one after another. Grouped convolutions, and filters that would not have fewer weights, stay as they are.

    Parameters
    ----------
    terms
        Outer products per filter.

    Returns
    -------
    torch.nn.Module
        The same module; :func:`octavo.training.settle` or :func:`octavo.save` ends the training.

    Raises
    ------
    RequestError
        If ``terms`` is not positive, or there is no filter that would have fewer weights.
    """
    if terms < 1:
        raise RequestError(f"one-way filters: {terms} terms; give at least 1")
    forms, layouts = {}, {}
    for name, layer in module.named_modules():
        if type(layer) not in _KINDS or layer.groups > 1:
            continue
        sizes = (layer.in_channels, *layer.kernel_size)
        if terms * sum(sizes) < math.prod(sizes):
            weight = f"{name}.weight".lstrip(".")
            deviation = (float(layer.weight.detach().std()) / terms**0.5) ** (1 / 3)
            parts = (Dense(torch.randn(terms * layer.out_channels, size) * deviation) for size in sizes)
            channel, vertical, horizontal = parts
            forms[weight] = Separable(channel, vertical, horizontal, terms)
            layouts[weight] = Layout("transposed") if isinstance(layer, nn.ConvTranspose2d) else Layout()
    if not forms:
        raise RequestError(
            f"{type(module).__name__}: has no filter that {terms} terms would make smaller; give fewer terms or a "
            "module with larger filters"
        )
    formed(module, forms, layouts)
    return module


def in_stages(module: nn.Module) -> nn.Module:
    """A copy of a module from :func:`one_way` that runs the one-way filters one after another.

    It needs fewer multiplications, computes the same outputs up to rounding, and can be trained further. What is frozen
    stays so.

    Raises
    ------
    RequestError
        If the module has no one-way filters.
    """
    forms = {name: form for name, form in forms_of(module).items() if isinstance(form, Separable)}
    if not forms:
        raise RequestError(f"{type(module).__name__}: has no one-way filters; call octavo.training.one_way first")
    made = copy.deepcopy(module)
    stages = {}
    for name, form in forms.items():
        layer = made.get_submodule(name.rpartition(".")[0])
        stages[layer] = OneWayStages(layer, form)
    if made in stages:
        return stages[made]
    # A layer used in two places stays one layer.
    for place, part in list(made.named_modules(remove_duplicate=False)):
        if part in stages:
            made.set_submodule(place, stages[part])
    return made


class OneWayStages(nn.Module):
    """One convolution as three: 1 x 1 over the channels, then h x 1 and 1 x w for every channel of every term.

    Parameters
    ----------
    layer
        A convolution or a transposed one, whose bias, stride, padding and dilation are taken over. Its filters are
        computed from one-way filters, or are a parameter.
    form
        Its filters.
    """

    def __init__(self, layer: Any, form: Separable) -> None:
        super().__init__()
        self.terms, channels = form.terms, form.channel.shape[0]
        kind = next(kind for kind in _KINDS if isinstance(layer, kind))
        place = {"device": layer.weight.device, "dtype": layer.weight.dtype}

        def along(axis: int) -> Any:
            """The stage of one axis, with the stride, padding and dilation of that axis."""

            def own(values: Any, still: int) -> Any:
                return (
                    values
                    if isinstance(values, str)
                    else tuple(v if k == axis else still for k, v in enumerate(values))
                )

            more = {"output_padding": own(layer.output_padding, 0)} if kind is nn.ConvTranspose2d else {}
            return kind(
                channels, channels, own(layer.kernel_size, 1), own(layer.stride, 1), own(layer.padding, 0),
                dilation=own(layer.dilation, 1), groups=channels, bias=False, padding_mode=layer.padding_mode,
                **more, **place,
            )  # fmt: skip

        stages = [nn.Conv2d(layer.in_channels, channels, 1, bias=False, **place), along(0), along(1)]
        self.channel, self.vertical, self.horizontal = stages
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
        trained = any(part.requires_grad for part in layer.parameters() if part is not bias)
        with torch.no_grad():
            for stage, part in zip(stages, (form.channel, form.vertical, form.horizontal), strict=True):
                stage.weight.copy_(part.dense().view_as(stage.weight))
                stage.weight.requires_grad_(trained)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in channels, H, W) to (N, out channels, H', W')."""
        y = self.horizontal(self.vertical(self.channel(x))).unflatten(-3, (self.terms, -1)).sum(-4)
        return y if self.bias is None else y + self.bias[:, None, None]
