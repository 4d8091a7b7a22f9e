"""GroupReduce: rows of a table in blocks by frequency, each block with its own low rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.forms import Dense, Form, RowBlocks
from octavo.forms.rowblocks import MOST_BLOCKS
from octavo.methods.base import Method, Setting, method
from octavo.methods.factorize import factors
from octavo.methods.factorize.grouping import Grouping, RowGroup, grouped
from octavo.methods.knobs import real, whole
from octavo.methods.quantize.entropy import Entropy
from octavo.sources.sites import Site

#: Ranks, as shares of the rank whose factors have as many elements as the table, with bits per coefficient: the hull of
#: the best choices for MiniLM's table under calibrated evidence. At more bits, quantization alone is better.
_CHOICES = ((0.85, 3), (0.85, 2.5), (0.85, 2), (0.67, 2), (0.67, 1.5), (0.5, 1.5), (0.33, 2), (0.33, 1.5), (0.2, 1.5))
#: Fewest rows per column that justify a block, since each block needs its own right factor.
_ROWS_A_COLUMN = 8
#: Largest bits per coefficient if block weights differ widely: codes must fit 31 bits.
_MOST_BITS = 16


@method("groupreduce", family="factorize", preset="best", source="GroupReduce (Chen et al., 2018, arXiv 1806.06950)")
@dataclass(frozen=True)
class GroupReduce(Method):
    """``A[i] = left_p[i] @ right_p`` for the rows ``i`` of block ``p``, with more components for frequent tokens.

    ``A`` is (rows, columns), ``left_p`` (rows of the block, ``k_p``), ``right_p`` (``k_p``, columns), and ``r`` the
    weights of the rows, which for a table follow the token frequencies. Every block minimizes ``sum_i r[i] E[i] C
    E[i]^T`` at its rank (:func:`octavo.methods.factorize.factors.whitened`); the ranks are proportional to the mean
    weight of the blocks, and rows are moved between blocks until this no longer helps
    (:func:`octavo.methods.factorize.grouping.grouped`). A block whose factors would take as many coefficients as its
    rows stays dense. Everything is quantized with one step in units of the loss.

    Parameters
    ----------
    blocks
        Numbers of blocks tried by :meth:`settings`, fewer for small tables.
    rounds
        Largest number of refinement rounds; 0 keeps the blocks sorted by frequency.
    """

    takes = ("rank", "blocks", "bits")

    blocks: int = 8
    rounds: int = 6

    def accepts(self, site: Site) -> bool:
        """Rows must be tokens, whose frequencies differ."""
        return site.kind in ("embedding", "head")

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Ranks, each that of an SVD of the whole table with as many coefficients, times bits per coefficient."""
        rows, columns = weight.shape
        blocks = min(self.blocks, max(2, rows // (_ROWS_A_COLUMN * columns)), rows) if columns > 1 else 1
        least = math.ceil((rows + blocks * columns) / (rows + columns))
        even = rows * columns / (rows + columns)
        pairs = dict.fromkeys((min(max(round(share * even), least), columns), bits) for share, bits in _CHOICES)
        ordered = sorted(pairs, key=lambda pair: -pair[0] * pair[1])
        return [{"rank": rank, "blocks": blocks, "bits": bits} for rank, bits in ordered]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        return next(self.encode_all(weight, [setting], evidence))

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """Settings with the same rank and number of blocks share the grouping."""
        weight, known = weight.float(), dict[tuple[int, int], Grouping]()
        for setting in settings:
            rank = whole(self.name, setting, "rank", 1, weight.shape[1])
            blocks = whole(self.name, setting, "blocks", 1, min(len(weight), MOST_BLOCKS))
            bits = real(self.name, setting, "bits", 1, _MOST_BITS)
            if (rank, blocks) not in known:
                known[rank, blocks] = grouped(weight, evidence, rank, blocks, self.rounds)
            grouping = known[rank, blocks]
            yield RowBlocks(grouping.member, quantized(grouping.blocks(weight, evidence), bits))


def exact(blocks: Sequence[RowGroup]) -> tuple[Form, ...]:
    """All blocks with their factors as found, to be trained or stored as they are."""
    return tuple(Dense(block.weight) if block.parts is None else block.parts.form for block in blocks)


def quantized(blocks: Sequence[RowGroup], bits: float) -> tuple[Form, ...]:
    """Quantize all blocks with one step in units of the loss, at about ``bits`` per coefficient."""
    levels = [_level(block) for block in blocks]
    # Blocks of zeros take no bits at any step.
    counts = [_coefficients(block) if bool(block.weight.any()) else 0 for block in blocks]
    mean = sum(level * count for level, count in zip(levels, counts, strict=True)) / max(sum(counts), 1)
    largest = max((level for level, count in zip(levels, counts, strict=True) if count), default=0.0)
    step = max(mean - bits, largest - _MOST_BITS)
    return tuple(_stored(block, level, step) for block, level in zip(blocks, levels, strict=True))


def _stored(block: RowGroup, level: float, step: float) -> Form:
    """Quantize a block; level and step are given as logarithms."""
    if block.parts is None:
        return Entropy().encode(block.weight, {"step": 2**step}, block.evidence)
    return factors.quantized(block.parts, level - step, block.evidence)


def _coefficients(block: RowGroup) -> int:
    return block.weight.numel() if block.parts is None else block.parts.left.numel() + block.parts.right.numel()


def _level(block: RowGroup) -> float:
    """Logarithm of the step at which coefficients take zero bits by the high-rate formula."""
    if block.parts is not None:
        return math.log2(factors.step_for(block.parts, 0))
    return math.log2(Entropy(levels=(0,)).settings(block.weight, block.evidence)[0]["step"])
