"""Merging similar rows of a trained table, found by locality-sensitive hashing.

Source: Dedup of the benchmark of Zhang et al. (2023), arXiv 2311.15578, which merges blocks of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.errors import RequestError
from octavo.forms import Vectors

#: Signs of random projections in a signature; more would hardly divide a table further.
_BITS = 40


def merged_rows(weight: Tensor, entries: int, *, width: int | None = None, seed: int = 0) -> Vectors:
    """Pieces of rows with equal signs in as many random directions as ``entries`` allow become their mean.

    Parameters
    ----------
    weight
        (rows, columns).
    entries
        The most different pieces that remain.
    width
        Elements of a piece; whole rows by default.

    Raises
    ------
    RequestError
        If there are not as many pieces, or no rows.
    """
    rows, columns = weight.shape
    width = columns if width is None else width
    if not rows or not columns or not 1 <= width <= columns:
        raise RequestError(
            f"merging: pieces of {width} elements in a table of {rows} x {columns}; give a fitting width"
        )
    blocks = -(-columns // width)
    if not 1 <= entries <= rows * blocks:
        raise RequestError(f"merging: {entries} entries for {rows * blocks} pieces; give 1 to {rows * blocks}")
    padded = torch.nn.functional.pad(weight.detach().float().cpu(), (0, blocks * width - columns))
    pieces = padded.reshape(-1, width)
    directions = torch.randn(width, _BITS, generator=torch.Generator().manual_seed(seed))
    signs = ((pieces - pieces.mean(0)) @ directions > 0).long()
    member, used = torch.zeros(len(pieces), dtype=torch.long), 1
    for bit in range(_BITS):
        found, split = (2 * member + signs[:, bit]).unique(return_inverse=True)
        if len(found) > entries:
            break
        member, used = split, len(found)
    counts = member.bincount(minlength=used).float()[:, None]
    means = torch.zeros(used, width).index_add_(0, member, pieces) / counts
    kind = torch.uint8 if used <= 256 else torch.int32
    return Vectors(member.view(1, rows, blocks).to(kind), means[None, None].half(), columns)
