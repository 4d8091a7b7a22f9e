"""Self-attention whose cost grows linearly with the length of the sequence, and a classifier built from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.errors import RequestError


class LinformerAttention(nn.Module):
    """Self-attention over ``projected`` learned mixtures of all positions.

    ``softmax(Q (E K)^T / sqrt(d)) (F V)`` with ``E`` and ``F`` of shape (projected, length), which all heads share.
    The cost is proportional to ``length * projected``; full attention's is proportional to ``length ** 2``. There are
    ``2 * projected * length`` more weights than in full attention, so the file does not become smaller.

    Parameters
    ----------
    width
        Features of a position, a multiple of ``heads``.
    length
        Positions of every sequence. Mixtures are bound to that number, and are not causal.
    projected
        Mixtures of keys and of values; None for full attention, which accepts sequences of any length.

    Raises
    ------
    RequestError
        If the width is not a multiple of the heads, or the number of mixtures is not from 1 to ``length``.

    Notes
    -----
    Source: Wang et al. (2020), arXiv 2006.04768, with ``E`` and ``F`` shared by the heads of a layer.
    """

    def __init__(self, width: int, length: int, projected: int | None, heads: int = 4) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise RequestError(
                f"attention: a width of {width} has no {heads} equal heads; give a multiple of the heads"
            )
        if projected is not None and not 1 <= projected <= length:
            raise RequestError(
                f"attention: {projected} mixtures of {length} positions; give a number from 1 to {length}, or None"
            )
        self.heads, self.projected = heads, projected
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        if projected is not None:
            self.mix_keys, self.mix_values = (
                nn.Parameter(torch.randn(projected, length) / length**0.5) for _ in range(2)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, length, width) to the same shape."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.projected is not None:
            k, v = self.mix_keys @ k, self.mix_values @ v
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        return self.output(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SequenceClassifier(nn.Module):
    """A pre-norm transformer encoder that classifies the mean of its positions.

    Parameters
    ----------
    features, length
        Shape of its inputs, (N, length, features).
    projected
        Mixtures of :class:`LinformerAttention`; None for full attention.
    """

    def __init__(
        self,
        features: int,
        length: int,
        classes: int,
        *,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        projected: int | None = None,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.Sequential(*(_Layer(width, length, projected, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, length, features) to logits (N, classes)."""
        return self.head(self.norm(self.layers(self.embed(x) + self.positions)).mean(1))


class _Layer(nn.Module):
    def __init__(self, width: int, length: int, projected: int | None, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = LinformerAttention(width, length, projected, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))
