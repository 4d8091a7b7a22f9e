"""What a sender of updates is asked for: a codec, and how large a payload may be."""

from __future__ import annotations

import math
from dataclasses import dataclass

from octavo.errors import RequestError
from octavo.flows.base import FLOWS
from octavo.flows.updates.base import UpdateCodec


@dataclass(frozen=True)
class Requested:
    """A checked request.

    Parameters
    ----------
    where
        Who was asked, as errors say it.
    codec
        The codec of updates.
    ratio, size
        Bytes of an update over those of a payload, or the bytes of a payload; the other one is None.
    """

    where: str
    codec: UpdateCodec
    ratio: float | None
    size: int | None

    @classmethod
    def of(cls, where: str, codec: UpdateCodec | str, ratio: float | None, size: int | None) -> Requested:
        """Check what a user gave.

        Raises
        ------
        RequestError
            If there is no such codec of updates, or not one of ratio and size, in its range.
        """
        if (ratio is None) == (size is None):
            raise RequestError(f"{where}: give a ratio, such as ratio=50, or the size of a payload in bytes")
        if ratio is not None and (
            isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 1 <= ratio < math.inf
        ):
            raise RequestError(f"{where}: the ratio is {ratio!r}; give a number from 1, such as 50")
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise RequestError(f"{where}: the size is {size!r}; give the bytes of a payload, such as 20_000")
        flow = FLOWS.get(codec)() if isinstance(codec, str) else codec
        if not isinstance(flow, UpdateCodec):
            raise RequestError(f"{where}: {codec!r} is not a codec of updates; name one, such as 'threshold'")
        return cls(where, flow, ratio, size)

    def budget(self, nbytes: int) -> int:
        """Bytes of a payload for an update of so many bytes.

        Raises
        ------
        RequestError
            If the ratio leaves none.
        """
        budget = self.size if self.ratio is None else int(nbytes / self.ratio)
        if not budget:
            raise RequestError(
                f"{self.where}: a ratio of {self.ratio} leaves no byte of {nbytes}; give a smaller ratio, such as 50"
            )
        return budget
