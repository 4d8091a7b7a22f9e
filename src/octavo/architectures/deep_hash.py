"""A table without rows: hashes of an index pass through a small network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from octavo.errors import RequestError

#: Hashes are taken modulo a prime, then modulo the number of buckets.
_PRIME, _BUCKETS = 2**31 - 1, 1_000_000


class DeepHash(nn.Module):
    """A drop-in for ``nn.Embedding``: ``hashes`` random hashes of an index, scaled to -1..1, through a perceptron.

    Hash ``k`` is ``((a_k i + b_k) mod p) mod 10^6``; hidden layers have batch normalization and Mish. Its size does not
    depend on the number of rows. It is a network and no form of a matrix: it is saved as its own module.

    Parameters
    ----------
    num_embeddings, embedding_dim
        Rows and columns.
    hidden
        Outputs of the hidden layers.
    hashes
        Inputs of the first.
    seed
        Of the hash functions, which are not stored.

    Raises
    ------
    RequestError
        If it has no rows, columns or hashes.

    Notes
    -----
    Source: Kang et al. (2021), arXiv 2010.10784 (DHE).
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, hidden: tuple[int, ...], *, hashes: int = 1024, seed: int = 0
    ) -> None:
        super().__init__()
        if min(num_embeddings, embedding_dim, hashes, *hidden) < 1:
            raise RequestError(
                f"deep hash: {num_embeddings} rows, {embedding_dim} columns, {hashes} hashes and layers of {hidden}; "
                "give at least 1 of each"
            )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        draws = torch.Generator().manual_seed(seed)
        for name in ("factors", "shifts"):
            self.register_buffer(name, torch.randint(1, _PRIME, (hashes,), generator=draws), persistent=False)
        layers: list[nn.Module] = []
        inputs = hashes
        for outputs in hidden:
            layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.Mish()]
            inputs = outputs
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, embedding_dim))

    def forward(self, index: Tensor) -> Tensor:
        """Rows (..., columns) for indices (...).

        Raises
        ------
        RequestError
            If an index is not one of a row.
        """
        flat = index.flatten()
        if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < self.num_embeddings:
            raise RequestError(
                f"deep hash: an index of {int(flat.min())}..{int(flat.max())} is beyond its {self.num_embeddings} "
                f"rows; give indices from 0 to {self.num_embeddings - 1}"
            )
        hashed = (flat[:, None] * self.get_buffer("factors") + self.get_buffer("shifts")) % _PRIME % _BUCKETS
        return self.layers(hashed.float() * (2 / (_BUCKETS - 1)) - 1).reshape(*index.shape, self.embedding_dim)
