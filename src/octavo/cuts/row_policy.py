"""A policy over the rows of matrices: which rows to keep, learned from the matrices alone and used at any ratio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.errors import RequestError
from octavo.system.atomic import writing
from octavo.system.paths import checked


@dataclass(frozen=True)
class RowPolicy:
    """The log odds to keep a row, a linear function of the row: of all layers one.

    Parameters
    ----------
    direction
        (width,), or (width + 1,) if it also weighs the norm of the row, as :func:`described` gives it.
    offset
        The odds of a row of zeros.
    width
        The length of the rows.

    Examples
    --------
    >>> policy = RowPolicy(torch.tensor([1.0, 0.0, -1.0]), 0.5, 3)
    >>> policy.odds(torch.eye(3)).tolist()
    [1.5, 0.5, -0.5]
    """

    direction: Tensor
    offset: float
    width: int

    @torch.no_grad()
    def odds(self, rows: Tensor) -> Tensor:
        """Log odds of every row of (rows, width), float32.

        Raises
        ------
        RequestError
            If the rows have another length.
        """
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise RequestError(
                f"policy: it was trained on rows of length {self.width}, and these are {tuple(rows.shape)}; train one "
                "on this model"
            )
        seen = described(rows, norms=len(self.direction) > self.width)
        return seen @ self.direction.to(seen) + self.offset

    def save(self, path: str | Path) -> None:
        """Write it as a safetensors file, to be reused at other ratios and for models of the same width."""
        tensors = {
            "direction": self.direction.contiguous(),
            "offset": torch.tensor(self.offset, dtype=torch.float64),
            "width": torch.tensor(self.width),
        }
        with writing(checked(path)) as aside:
            save_file(tensors, aside)

    @classmethod
    def load(cls, path: str | Path) -> RowPolicy:
        """Read what :meth:`save` wrote.

        Raises
        ------
        RequestError
            If the file does not exist, or holds no policy.
        """
        try:
            tensors = load_file(checked(path))
            return cls(*_read(tensors))
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise RequestError(f"{path}: holds no policy over rows ({error}); give a file that save wrote") from error


def _read(tensors: Mapping[str, Tensor]) -> tuple[Tensor, float, int]:
    direction, offset, width = tensors["direction"], tensors["offset"], int(tensors["width"])
    if direction.ndim != 1 or len(direction) not in (width, width + 1):
        raise ValueError(f"a direction of shape {tuple(direction.shape)} for rows of length {width}")
    return direction, float(offset), width


def described(rows: Tensor, *, norms: bool) -> Tensor:
    """What a policy sees of rows (rows, width): themselves, and with ``norms`` also how long each is.

    The last column is then the norm less the mean of all, in standard deviations. A linear function of a row alone
    cannot value it for its length: it gives the row and its negative opposite values.
    """
    rows = rows.detach().float()
    if not norms:
        return rows
    lengths = rows.norm(dim=1)
    spread = lengths.std(correction=0)
    column = (lengths - lengths.mean()) / spread if float(spread) > 0 else torch.zeros_like(lengths)
    return torch.cat([rows, column[:, None]], 1)


def perturbed(logs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """``logs`` (rows,) plus Gumbel noise: the largest are rows drawn in proportion to ``exp(logs)``.

    They are drawn one after another without replacement (Kool et al., 2019, arXiv 1903.06059).
    """
    uniform = torch.rand(len(logs), generator=generator).clamp(1e-20, 1 - 1e-7).to(logs.device)
    return logs.detach() - (-uniform.log()).log()


def drawn(odds: Tensor, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Rows drawn one after another without replacement, each in proportion to ``exp(odds)``.

    Parameters
    ----------
    odds
        (rows,).

    Returns
    -------
    rows, log
        (count,) indices in the order drawn, and the logarithm of the exact probability of that order: the sum of each
        row's odds less those of everything that was not drawn before it.
    """
    order = perturbed(odds, generator).sort(descending=True, stable=True).indices
    ordered = odds[order]
    left = ordered.flip(0).logcumsumexp(0).flip(0)
    return order[:count], (ordered - left)[:count].sum()


def concrete(odds: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Keep scores between 0 and 1 with noise: ``sigmoid(odds + log u - log(1 - u))`` of uniform ``u`` (rows,)."""
    uniform = torch.rand(len(odds), generator=generator).clamp(1e-6, 1 - 1e-6).to(odds.device)
    return (odds + uniform.log() - (-uniform).log1p()).sigmoid()
