"""Estimates for large matrices from a sample of their rows: bytes and loss of a setting are means over rows.

The estimates only guide the allocator. A plan is always encoded in full, and its bytes are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo import coding
from octavo.artifact import Packed, Sized, pack
from octavo.artifact.packing import Resident
from octavo.calibration.curvature import Curvature
from octavo.calibration.evidence import Evidence
from octavo.forms import Form
from octavo.methods.tables import is_table, least_of_table

#: Larger matrices are sampled: a quarter of their weights, within these bounds. The error of the estimated bytes is a
#: few parts in a thousand for a 4096 x 4096 matrix and a few percent for 576 x 576. For a whole model errors cancel, to
#: less than one percent.
MEDIUM = 1 << 18
_TAKEN = (1 << 17, 1 << 19)
#: Smallest number of rows in a sample.
_ROWS = 16
#: Largest number of elements in the sample of a table; tables of up to 2,000 columns do not reach it.
_TABLE = 1 << 25
#: Largest size of a coder's tables in bytes, besides one class per column.
_TABLES = 1 << 12


@dataclass(frozen=True)
class Sample:
    """Some rows of a matrix.

    Parameters
    ----------
    weight
        (taken, columns) float32.
    evidence
        Evidence of these rows, without a curvature, since that belongs to all rows together.
    rows
        Number of rows of the whole matrix.
    curvature
        Cost of an error in these rows alone, by the measured curvature of the whole matrix, if there is one.
    """

    weight: Tensor
    evidence: Evidence
    rows: int
    curvature: Curvature | None = None

    @property
    def share(self) -> float:
        """Rows of the whole matrix per sampled row."""
        return self.rows / len(self.weight)

    def loss(self, form: Form) -> float:
        """Expected loss of the whole matrix in a form found for the sample."""
        error = form.dense() - self.weight
        # Points of a sample are compared with points of the whole matrix, so both use the same loss.
        return (self.evidence.loss(error) if self.curvature is None else self.curvature.loss(error)) * self.share

    def grown(self, form: Form) -> int:
        """Bytes of a whole table in a form found for the sample as a separate table."""
        return form.grown(self.share, lambda inner: pack(inner).bytes)

    def packed(self, form: Form, resident: Resident | None = None) -> Packed:
        """Sizes, without content, of the whole matrix in a form found for the sample.

        Payloads and escapes grow with the rows. Coder tables, and parts of columns or of the whole matrix, do not.
        """
        found, parts, end = pack(form), {}, 0
        blob, columns = memoryview(found.blob), self.weight.shape[1]
        for name, (start, length, *floats) in found.parts.items():
            if floats:
                elements, payload = math.prod(floats[1:]), length
                floats = [floats[0], *(self.rows if size == len(self.weight) else size for size in floats[1:])]
            else:
                header = coding.describe(blob[start : start + length])
                # A head larger than the largest tables holds escapes.
                elements, payload = header.elements, max(header.payload, length - columns - _TABLES)
            if elements >= len(self.weight) and elements != columns:
                length += round(payload * (self.share - 1))
            parts[name] = [end, length, *floats]
            end += length
        codecs = {codec: round(size * end / max(found.bytes, 1)) for codec, size in found.codecs.items()}
        running = None if resident is None else resident(form, self.rows)
        return Packed(Sized(end), parts, found.meta, codecs, running)


def sample_of(weight: Tensor, evidence: Evidence) -> Sample | None:
    """A sample of a matrix (rows, columns); None if the matrix is small enough to use as a whole.

    Rows are sorted by the loss of dropping them and taken at even distances, so important and unimportant rows are
    represented in proportion.
    """
    taken = _usual(weight)
    return None if weight.numel() <= MEDIUM or len(weight) < 2 * taken else _sample(weight, evidence, taken)


def table_sample_of(weight: Tensor, evidence: Evidence) -> Sample | None:
    """A sample of a table as a smaller table; None if the matrix is not a table, or too wide for a sample."""
    rows, columns = weight.shape
    taken = max(least_of_table(columns), _usual(weight))
    # This pays even if the sample has most rows, since only one setting of a method is then tried instead of all.
    return _sample(weight, evidence, taken) if is_table(rows, columns) and taken * columns <= _TABLE else None


def _usual(weight: Tensor) -> int:
    """Rows of a sample."""
    return max(_ROWS, min(max(weight.numel() // 4, _TAKEN[0]), _TAKEN[1]) // weight.shape[1])


def _sample(weight: Tensor, evidence: Evidence, taken: int) -> Sample:
    rows = len(weight)
    order = (evidence.rows.sqrt() * torch.linalg.vector_norm(weight, dim=1)).argsort(stable=True)
    places = (torch.arange(taken, dtype=torch.float64) + 0.5) * (rows / taken)
    index = order[places.long()].sort().values
    # The cache depends only on the columns, which equal those of the whole matrix.
    terms = tuple((weights[index], moment) for weights, moment in evidence.terms)
    part = Evidence(evidence.rows[index], evidence.columns, evidence.samples, evidence.cache, terms)
    curvature = evidence.curvature and replace(evidence.curvature, outputs=evidence.curvature.outputs[index])
    return Sample(weight[index], part, rows, curvature)
