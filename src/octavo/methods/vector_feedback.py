"""Error feedback for methods that round several columns of a row at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from octavo.methods.feedback import round_blocks


def round_vectors(weight: Tensor, feedback: Tensor, width: int, nearest: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Round vectors of adjacent columns one after another, feeding errors forward in the order of the columns.

    A vector is chosen as if its columns did not interact. What its columns miss together is then exact.

    Parameters
    ----------
    weight
        (rows, columns); a last vector that is not whole is filled with zeros.
    feedback
        (columns, columns) of :func:`octavo.methods.feedback.factor`, for columns in their own order.
    width
        Columns of a vector, a divisor of 64.
    nearest
        Rounds vectors (rows, width) whose first column is given too.

    Returns
    -------
    Tensor
        (rows, columns rounded up to whole vectors).
    """
    spare = -weight.shape[1] % width
    targets = torch.nn.functional.pad(weight.t(), (0, 0, 0, spare)).contiguous()
    feedback = torch.nn.functional.pad(feedback, (0, spare, 0, spare))

    def sweep(start: int, targets: Tensor, feedback: Tensor, rounded: Tensor) -> None:
        for first in range(0, len(targets), width):
            part = slice(first, first + width)
            if first:
                targets[part].addmm_(feedback[:first, part].t(), targets[:first])
            rounded[part] = nearest(targets[part].t().contiguous(), start + first).t()
            for j in range(first, first + width):
                if j > first:
                    targets[j].addmv_(targets[first:j].t(), feedback[first:j, j])
                targets[j].sub_(rounded[j])

    return round_blocks(targets, feedback, sweep).t()
