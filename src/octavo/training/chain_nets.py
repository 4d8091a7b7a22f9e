"""Convolutional nets without branches as data: read from a module, made shorter or thinner, and built again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from octavo.errors import RequestError


@dataclass(frozen=True)
class ConvLayer:
    """A convolution, batch normalization and a ReLU.

    Parameters
    ----------
    channels
        Of its output.
    kernel, stride
        Height and width of its kernel, and its step; it is padded by ``kernel // 2``.
    pooled
        Whether a 2 x 2 maximum follows.
    """

    channels: int
    kernel: int = 3
    stride: int = 1
    pooled: bool = False

    @property
    def shrinks(self) -> bool:
        """Whether its output has fewer pixels than its input; such a layer is needed where it is."""
        return self.stride > 1 or self.pooled


@dataclass(frozen=True)
class ChainNet:
    """Layers in a row, the mean of all pixels, and one linear layer. Equal descriptions have equal hashes.

    Parameters
    ----------
    inputs, classes
        Channels of the images, and outputs.

    Examples
    --------
    >>> net = ChainNet(1, (ConvLayer(8), ConvLayer(8), ConvLayer(16, pooled=True)), 10)
    >>> net.parameters == sum(parameter.numel() for parameter in net.module().parameters())
    True
    >>> net.kept([True, False, True]).shrunk([0.5, 1.0]).layers
    (ConvLayer(channels=4, kernel=3, stride=1, pooled=False), ConvLayer(channels=16, kernel=3, stride=1, pooled=True))
    """

    inputs: int
    layers: tuple[ConvLayer, ...]
    classes: int

    def __post_init__(self) -> None:
        if not self.layers:
            raise RequestError("chain: a net without a layer; keep at least one")

    @classmethod
    def of(cls, module: nn.Module) -> ChainNet:
        """The description of a module that :meth:`module` could have built, whatever it is composed of.

        Raises
        ------
        RequestError
            If the module has anything else, or in another order.
        """
        leaves: list[tuple[str, Any]] = [
            (name, part) for name, part in module.named_modules() if not list(part.children())
        ]
        parts = [(name, part) for name, part in leaves if not isinstance(part, nn.Dropout | nn.Identity | nn.Flatten)]
        layers: list[ConvLayer] = []
        inputs = 0
        while parts and isinstance(parts[0][1], nn.Conv2d):
            name, convolution = parts.pop(0)
            inputs = inputs or convolution.in_channels
            layers.append(_read(name, convolution, parts))
        if not layers or [type(part) for _, part in parts] != [nn.AdaptiveAvgPool2d, nn.Linear]:
            found = ", ".join(type(part).__name__ for _, part in parts[:3]) or "nothing"
            raise RequestError(
                f"{type(module).__name__}: after {len(layers)} convolutions it has {found}; a chain is convolutions, "
                "each with batch normalization, a ReLU and perhaps a pooling, then AdaptiveAvgPool2d and one Linear"
            )
        (place, mean), (last, linear) = parts
        if mean.output_size not in (1, (1, 1)):
            raise RequestError(
                f"{place}: {mean} leaves {mean.output_size} pixels; a chain takes the mean of all, so give "
                "AdaptiveAvgPool2d(1)"
            )
        if linear.bias is None:
            raise RequestError(f"{last}: {linear} has no bias; the linear layer of a chain has one, so give it one")
        return cls(inputs, tuple(layers), linear.out_features)

    def module(self) -> nn.Sequential:
        """A net with random weights, (N, inputs, H, W) to (N, classes)."""
        parts: list[nn.Module] = []
        for before, layer in zip(self._inputs(), self.layers, strict=True):
            kernel, channels = layer.kernel, layer.channels
            parts.append(nn.Conv2d(before, channels, kernel, layer.stride, kernel // 2, bias=False))
            parts += [nn.BatchNorm2d(channels), nn.ReLU(), *([nn.MaxPool2d(2)] if layer.pooled else [])]
        return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, self.classes))

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        pairs = zip(self._inputs(), self.layers, strict=True)
        weights = sum(before * layer.channels * layer.kernel**2 + 2 * layer.channels for before, layer in pairs)
        return weights + (self.layers[-1].channels + 1) * self.classes

    def kept(self, mask: Sequence[bool]) -> ChainNet:
        """The net without the layers that are False; those that shrink the image stay whatever is said of them.

        Raises
        ------
        RequestError
            If nothing is left, or there are not as many answers as layers.
        """
        stays = zip(self.layers, self._each(mask), strict=True)
        return replace(self, layers=tuple(layer for layer, keep in stays if keep or layer.shrinks))

    def shrunk(self, shares: Sequence[float]) -> ChainNet:
        """The net with a share of the channels of every layer, rounded, one at least.

        Kernels, steps and paddings stay: with less a net would no longer see as much of the image.
        """
        pairs = zip(self.layers, self._each(shares), strict=True)
        thinner = (replace(layer, channels=max(1, round(share * layer.channels))) for layer, share in pairs)
        return replace(self, layers=tuple(thinner))

    def _inputs(self) -> Iterator[int]:
        yield self.inputs
        yield from (layer.channels for layer in self.layers[:-1])

    def _each(self, given: Sequence[float]) -> Sequence[float]:
        if len(given) != len(self.layers):
            raise RequestError(f"chain: {len(given)} answers for {len(self.layers)} layers; give one for each")
        return given


def _halves(pool: nn.MaxPool2d) -> bool:
    """Whether a pooling is ``nn.MaxPool2d(2)``."""
    twos, plain = (2, (2, 2)), (pool.padding in (0, (0, 0)), pool.dilation in (1, (1, 1)))
    return (
        pool.kernel_size in twos and pool.stride in twos and all(plain) and not (pool.ceil_mode or pool.return_indices)
    )


def _read(name: str, convolution: nn.Conv2d, rest: list[tuple[str, Any]]) -> ConvLayer:
    """A layer from its convolution and the modules after it, which are taken from the list."""
    kernel, stride, padding = convolution.kernel_size, convolution.stride, convolution.padding
    usual = convolution.groups == 1 and convolution.dilation == (1, 1) and convolution.bias is None
    usual = usual and convolution.padding_mode == "zeros"
    if not usual or kernel != kernel[:1] * 2 or stride != stride[:1] * 2 or padding != (kernel[0] // 2,) * 2:
        raise RequestError(
            f"{name}: {convolution} is not the convolution of a chain; it needs a square kernel, one stride, a padding "
            "with zeros of half the kernel, and neither groups, dilation nor bias"
        )
    kinds = [type(part) for _, part in rest[:3]]
    if kinds[:2] != [nn.BatchNorm2d, nn.ReLU]:
        raise RequestError(f"{name}: a convolution of a chain is followed by BatchNorm2d and ReLU")
    norm: Any = rest[0][1]
    if not (norm.affine and norm.track_running_stats):
        raise RequestError(f"{rest[0][0]}: {norm} is not that of a chain; it needs weights and running statistics")
    pooled = kinds[2:] == [nn.MaxPool2d]
    if pooled and not _halves(rest[2][1]):
        raise RequestError(
            f"{rest[2][0]}: {rest[2][1]} is not the pooling of a chain, which takes the maximum of 2 x 2 pixels in "
            "steps of 2, without padding, dilation or ceil_mode; give nn.MaxPool2d(2)"
        )
    del rest[: 2 + pooled]
    return ConvLayer(convolution.out_channels, kernel[0], stride[0], pooled)
