"""The blocks of a GGUF file taken over as they are: lossless, and without decoding and rounding them again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.coding.ggml import BlockType, StoredBlocks, block_type, row_order
from octavo.errors import RequestError
from octavo.forms import Form
from octavo.forms.ggml import GgmlBlocks
from octavo.methods.base import Method, Setting, method
from octavo.methods.knobs import choice
from octavo.sources.sites import Site


@method("source-blocks", family="quantize", preset="fast", source="Block types of ggml")
@dataclass(frozen=True)
class SourceBlocks(Method):
    """The blocks in which the source's GGUF file holds a matrix, bit for bit.

    Other types round a matrix that was rounded before, and so lose twice. Blocks that do not decode to the weights
    of the source, such as those of a cut model, are not offered.
    """

    takes = ("type",)
    lossless = True
    runtimes = ("gguf",)

    def accepts(self, site: Site) -> bool:
        """Sites that have blocks in the source's file."""
        return site.blocks is not None

    def at_site(self, site: Site) -> SourceBlocks:
        """The method that reads the blocks of this site."""
        return self if site.blocks is None else _BlocksOfSite(site.blocks)

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """One, if the source has blocks."""
        return []

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        raise RequestError(f"{self.name}: the source has no blocks of this matrix; choose method ggml")


@dataclass(frozen=True)
class _BlocksOfSite(SourceBlocks):
    stored: StoredBlocks

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        return [{"type": self.stored.kind}]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:
        kind = choice(self.name, setting, "type", (self.stored.kind,))
        form = self._read(block_type(kind), *weight.shape)
        if not torch.equal(form.dense(), weight):
            raise RequestError(f"{self.name}: {self.stored.file} holds blocks of other weights; choose method ggml")
        return form

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """Yields no form if the source's weights are not those of its blocks."""
        forms = (self._read(block_type(setting["type"]), *weight.shape) for setting in settings)
        return (form for form in forms if torch.equal(form.dense(), weight))

    def _read(self, kind: BlockType, rows: int, columns: int) -> Form:
        size = kind.row_bytes(columns)
        content = np.fromfile(self.stored.file, np.uint8, rows * size, offset=self.stored.offset)
        if len(content) != rows * size:
            raise RequestError(f"{self.stored.file}: ends within the blocks of a matrix; copy it again")
        blocks = torch.from_numpy(content).view(rows, size)
        return GgmlBlocks(blocks[row_order(rows, self.stored.heads).argsort()], kind.name, columns)
