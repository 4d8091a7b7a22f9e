"""Large matrices are judged by a sample of their rows: what a setting costs and saves is a mean over rows.

What is estimated here only guides the allocator. A plan is always encoded in full, and its bytes are exact.
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

#: Larger matrices are sampled, a quarter of their weights within these bounds. Of a 4096 x 4096 matrix bytes are then
#: estimated within a few parts in a thousand, of a 576 x 576 one within a few in a hundred, and of a whole model, whose
#: misses cancel, within one.
MEDIUM = 1 << 18
_TAKEN = (1 << 17, 1 << 19)
#: Fewer rows than these are not taken for a sample.
_ROWS = 16
#: Elements of the sample of a table at most, which those of up to 2,000 columns do not reach.
_TABLE = 1 << 25
#: Bytes that a coder's tables take at most, besides a class of every column.
_TABLES = 1 << 12


@dataclass(frozen=True)
class Sample:
    """Some rows of a matrix.

    Parameters
    ----------
    weight
        (taken, columns) float32.
    evidence
        That of these rows; without a curvature, which holds for all rows together.
    rows
        Rows of the whole matrix.
    curvature
        What an error of these rows alone costs by the curvature of the whole matrix, if it was measured.
    """

    weight: Tensor
    evidence: Evidence
    rows: int
    curvature: Curvature | None = None

    @property
    def share(self) -> float:
        """Rows of the whole for each row taken."""
        return self.rows / len(self.weight)

    def loss(self, form: Form) -> float:
        """Expected loss of the whole matrix in a form that was found for the sample."""
        error = form.dense() - self.weight
        # Points of a sample are compared with points of the whole: both have the same loss.
        return (self.evidence.loss(error) if self.curvature is None else self.curvature.loss(error)) * self.share

    def grown(self, form: Form) -> int:
        """Bytes that a whole table would take in a form that was found for the sample as a table of its own."""
        return form.grown(self.share, lambda inner: pack(inner).bytes)

    def packed(self, form: Form, resident: Resident | None = None) -> Packed:
        """What the whole matrix would take in a form that was found for the sample: sizes without content.

        Payloads and escapes grow with the rows; a coder's tables, and parts that belong to columns or to the whole,
        do not.
        """
        found, parts, end = pack(form), {}, 0
        blob, columns = memoryview(found.blob), self.weight.shape[1]
        for name, (start, length, *floats) in found.parts.items():
            if floats:
                elements, payload = math.prod(floats[1:]), length
                floats = [floats[0], *(self.rows if size == len(self.weight) else size for size in floats[1:])]
            else:
                header = coding.describe(blob[start : start + length])
                # A head of more than its tables can take holds escapes.
                elements, payload = header.elements, max(header.payload, length - columns - _TABLES)
            if elements >= len(self.weight) and elements != columns:
                length += round(payload * (self.share - 1))
            parts[name] = [end, length, *floats]
            end += length
        codecs = {codec: round(size * end / max(found.bytes, 1)) for codec, size in found.codecs.items()}
        running = None if resident is None else resident(form, self.rows)
        return Packed(Sized(end), parts, found.meta, codecs, running)


def sample_of(weight: Tensor, evidence: Evidence) -> Sample | None:
    """A sample of a matrix (rows, columns), or None if it is small enough to be looked at as a whole.

    Rows are sorted by what they add to the loss if they are lost, and taken at even distances, so that loud and quiet
    rows are represented by their numbers.
    """
    taken = _usual(weight)
    return None if weight.numel() <= MEDIUM or len(weight) < 2 * taken else _sample(weight, evidence, taken)


def table_sample_of(weight: Tensor, evidence: Evidence) -> Sample | None:
    """A sample of a table that is a table, too; None if the matrix is none, or so wide that a sample is too large."""
    rows, columns = weight.shape
    taken = max(least_of_table(columns), _usual(weight))
    # Even if it takes most rows: with it one setting of a method is tried in the place of all of them.
    return _sample(weight, evidence, taken) if is_table(rows, columns) and taken * columns <= _TABLE else None


def _usual(weight: Tensor) -> int:
    """Rows of a sample."""
    return max(_ROWS, min(max(weight.numel() // 4, _TAKEN[0]), _TAKEN[1]) // weight.shape[1])


def _sample(weight: Tensor, evidence: Evidence, taken: int) -> Sample:
    rows = len(weight)
    order = (evidence.rows.sqrt() * torch.linalg.vector_norm(weight, dim=1)).argsort(stable=True)
    places = (torch.arange(taken, dtype=torch.float64) + 0.5) * (rows / taken)
    index = order[places.long()].sort().values
    # What is cached depends on the columns alone, which are those of the whole.
    terms = tuple((weights[index], moment) for weights, moment in evidence.terms)
    part = Evidence(evidence.rows[index], evidence.columns, evidence.samples, evidence.cache, terms)
    curvature = evidence.curvature and replace(evidence.curvature, outputs=evidence.curvature.outputs[index])
    return Sample(weight[index], part, rows, curvature)
