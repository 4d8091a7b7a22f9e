"""K-means levels: the entries of largest magnitude, each as one of a few values that every tensor has of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.errors import RequestError
from octavo.flows.base import flow
from octavo.flows.schema import Schema
from octavo.flows.updates.base import UpdateCodec
from octavo.flows.updates.codes import counts, expect, pack_codes, pack_floats, unpack_codes, unpack_floats
from octavo.flows.updates.large import Large, of_each

_MOST = 127


@flow("k-means", source="FedZip (Malekijoo et al., 2021, arXiv 2102.01593)")
@dataclass(frozen=True)
class KMeansLevels(UpdateCodec):
    """Top entries; those of a tensor become the nearest of its centroids (Lloyd, 1982).

    Zero is one more centroid, that of all entries that are not sent. Labels and gaps are entropy-coded. The codec is
    biased: what it leaves out is lost without feedback.

    Parameters
    ----------
    centroids
        Numbers of values for a tensor, of which a fit takes the best; 2 are those of the source.
    iterations
        Rounds of Lloyd's algorithm; the source has 4.
    layerwise
        Whether the same share of every tensor is sent, as in the source; otherwise the largest of all tensors together,
        which loses less.
    """

    parts: ClassVar[int] = 3

    centroids: tuple[int, ...] = (2, 4, 8, 16)
    iterations: int = 4
    layerwise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "centroids", tuple(self.centroids))  # a plan from JSON brings a list
        if not self.centroids or any(type(count) is not int or not 1 <= count <= _MOST for count in self.centroids):
            raise RequestError(f"k-means: centroids is {self.centroids!r}; give whole numbers from 1 to {_MOST}")
        if type(self.iterations) is not int or self.iterations < 1:
            raise RequestError(f"k-means: iterations is {self.iterations!r}; give at least 1")

    def choices(self) -> list[dict[str, Any]]:
        """Every number of centroids."""
        return [{"centroids": count} for count in self.centroids]

    def most(self, schema: Schema) -> int:
        """All entries."""
        return schema.elements

    def prepare(self, flat: Tensor, schema: Schema, choice: Mapping[str, Any], step: int) -> list[Large]:
        """The entries from which amounts take theirs, of all tensors together or of each."""
        return [Large(part) for part in (flat.split(schema.sizes) if self.layerwise else (flat,))]

    def pack(self, prepared: list[Large], schema: Schema, amount: int, choice: Mapping[str, Any]) -> Sequence[bytes]:
        """Gaps, labels, and the centroids of the tensors that have entries."""
        count = choice["centroids"]
        places, sent = of_each(prepared, amount)
        each = counts(places, schema.sizes)
        each = each[each > 0]
        labels, centroids = [places[:0]], [torch.zeros(0, dtype=torch.float64)]
        for values in sent.double().split(each.tolist()):
            found = _lloyd(values.sort().values, count, self.iterations)
            labels.append(torch.bucketize(values, (found[1:] + found[:-1]) / 2) + 1)
            centroids.append(found)
        return *pack_codes(places, torch.cat(labels), schema.elements, _MOST), pack_floats(torch.cat(centroids))

    def unpack(self, parts: Sequence[memoryview], schema: Schema, step: int) -> Tensor:
        """Zeros but for what was sent."""
        expect(len(parts[2]) <= 4 * _MOST * len(schema.sizes), "it has more centroids than its tensors can have")
        places, labels = unpack_codes(parts, schema.elements, _MOST)
        expect(not len(labels) or int(labels.min()) > 0, "a label is out of range")
        each = counts(places, schema.sizes)
        each = each[each > 0]
        count = len(parts[2]) // 4 // max(len(each), 1)
        expect(not len(labels) or int(labels.max()) <= count, "a label is out of range")
        centroids = unpack_floats(parts[2], count * len(each))
        first = (torch.arange(len(each)) * count).repeat_interleave(each)
        return torch.zeros(schema.elements).index_copy_(0, places, centroids[first + labels - 1])


def _lloyd(ordered: Tensor, count: int, iterations: int) -> Tensor:
    """Centroids that rise, (count,) float64, of values that rise; they begin evenly spread, as in the source."""
    found = torch.linspace(float(ordered[0]), float(ordered[-1]), count, dtype=torch.float64)
    moment = torch.cat([torch.zeros(1, dtype=torch.float64), ordered.cumsum(0)])
    ends = torch.tensor([0, len(ordered)])
    for _ in range(iterations):
        edges = torch.searchsorted(ordered, (found[1:] + found[:-1]) / 2)
        bounds = torch.cat([ends[:1], edges, ends[1:]])
        inside = bounds.diff()
        found = torch.where(inside > 0, moment[bounds].diff() / inside.clamp_min(1), found)
    return found
