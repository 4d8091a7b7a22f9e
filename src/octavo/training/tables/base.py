"""Tables that are trained compressed, in place of embeddings: what they have in common, and how a model gets them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.forms import Form
from octavo.system.modes import evaluating
from octavo.training.computed import owners
from octavo.training.formed import with_zero_row, zero_row_of


class CompactTable(nn.Module, ABC):
    """A drop-in for ``nn.Embedding`` whose rows are computed from fewer numbers, and which hands over a form.

    Parameters
    ----------
    num_embeddings, embedding_dim
        Rows and columns, named as those of an embedding.

    Raises
    ------
    RequestError
        If there are no rows or no columns.
    """

    like: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        if num_embeddings < 1 or embedding_dim < 1:
            raise RequestError(
                f"table: a table of {num_embeddings} rows and {embedding_dim} columns holds nothing; give at least 1"
            )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        #: The row that uses do not train, as in ``nn.Embedding``; None if there is none.
        self.padding_idx: int | None = None
        #: The row that is zero, whatever the table shares with other rows; None if there is none.
        self.zero_row: int | None = None
        # Rows have its dtype, whatever they are computed in; it follows the model to another one.
        self.register_buffer("like", torch.zeros(0), persistent=False)

    @abstractmethod
    def read(self, index: Tensor) -> Tensor:
        """Rows (n, columns) for ``index`` (n,), with gradients."""

    @abstractmethod
    def form(self) -> Form:
        """What is to be stored."""

    def forward(self, index: Tensor) -> Tensor:
        """Rows (..., columns) for indices (...); each needed row is computed once.

        Raises
        ------
        RequestError
            If an index is not one of a row.
        """
        needed, places = index.unique(return_inverse=True)
        if len(needed) and not 0 <= int(needed[0]) <= int(needed[-1]) < self.num_embeddings:
            wrong = int(needed[0]) if int(needed[0]) < 0 else int(needed[-1])
            raise RequestError(
                f"table: index {wrong} is beyond its {self.num_embeddings} rows; give indices from 0 to "
                f"{self.num_embeddings - 1}, or make a table with more rows"
            )
        rows = self.read(needed)
        if self.padding_idx is not None:
            rows = torch.where((needed == self.padding_idx)[:, None], rows.detach(), rows)
        rows = self._finished(needed, rows)
        return rows[places.flatten()].reshape(*index.shape, self.embedding_dim)

    @property
    def weight(self) -> Tensor:
        """All rows (rows, columns) as they would be stored, for code that reads the weight of an embedding.

        Reading them changes nothing and draws nothing, in training mode too.
        """
        index = torch.arange(self.num_embeddings, device=next(self.parameters()).device)
        with evaluating(self):
            return self._finished(index, self.read(index))

    def _finished(self, index: Tensor, rows: Tensor) -> Tensor:
        rows = rows.to(self.like.dtype)
        return rows if self.zero_row is None else rows.masked_fill((index == self.zero_row)[:, None], 0.0)

    def extra_repr(self) -> str:
        """The size, as for an embedding."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


def tables_of(module: nn.Module) -> dict[str, CompactTable]:
    """All compressed tables of a module by name, without those that others are made of."""
    found = {name: part for name, part in module.named_modules() if isinstance(part, CompactTable)}
    inner = {id(part) for table in found.values() for part in table.modules() if part is not table}
    return {name: table for name, table in found.items() if id(table) not in inner}


def with_tables(
    module: nn.Module, make: Callable[[nn.Embedding], CompactTable], names: Sequence[str] | None = None
) -> nn.Module:
    """Replace embeddings inside a module by compressed tables, in place; train it as usual afterwards.

    The padding row of an embedding stays zero if it is zero. Rows have the embedding's dtype, and the table of a frozen
    embedding is frozen.

    Parameters
    ----------
    make
        Gives the table for an embedding, whose sizes and weight it may use.
    names
        Globs of the names of embeddings; all by default.

    Returns
    -------
    torch.nn.Module
        The same module. :func:`settle_tables` ends the training.

    Raises
    ------
    RequestError
        If no embedding matches, one is tied to another weight or limits its norms, or a table has another size. Then
        nothing is replaced.

    Examples
    --------
    >>> import torch
    >>> from octavo.training.tables import FormTable, hashed_rows, settle_tables, with_tables
    >>> net = torch.nn.Sequential(torch.nn.Embedding(1000, 16), torch.nn.Linear(16, 1))
    >>> net = with_tables(net, lambda old: FormTable(hashed_rows(old.num_embeddings, 16, size=100)))
    >>> net(torch.tensor([3, 999])).shape
    torch.Size([2, 1])
    >>> forms = settle_tables(net)
    >>> {name: form.name for name, form in forms.items()}, type(net[0]).__name__
    ({'0.weight': 'hashed'}, 'Embedding')
    """
    found = {part: places for part, places in _places(module).items() if isinstance(part, nn.Embedding)}
    if names is not None:
        known = [name for places in found.values() for name in places]
        for glob in names:
            if not any(fnmatchcase(name, glob) for name in known):
                raise RequestError(f"tables: no embedding is named {glob!r}; choose from {', '.join(known) or 'none'}")
        found = {
            part: places
            for part, places in found.items()
            if any(fnmatchcase(name, glob) for name in places for glob in names)
        }
    if not found or module in found:
        raise RequestError(f"{type(module).__name__}: holds no embedding to replace; give the module that holds one")
    held = owners(module)
    for old, (name, *_) in found.items():
        if held[id(old.weight)] > 1 or old.max_norm is not None:
            raise RequestError(f"{name!r}: is tied to another weight or limits its norms; give it a plain weight first")
    tables = {old: make(old) for old in found}
    for old, made in tables.items():
        if (made.num_embeddings, made.embedding_dim) != (old.num_embeddings, old.embedding_dim):
            raise RequestError(
                f"{found[old][0]!r}: a table of {made.extra_repr()} does not replace {old.num_embeddings}, "
                f"{old.embedding_dim}; give one of that size"
            )
    for old, made in tables.items():
        made.padding_idx, made.zero_row = old.padding_idx, zero_row_of(old)
        made.like = old.weight.detach().new_zeros(0)
        if not old.weight.requires_grad:
            made.requires_grad_(False)
        _put(module, found[old], made.to(old.weight.device).train(old.training))
    return module


def settle_tables(module: nn.Module) -> dict[str, Form]:
    """Replace every compressed table by a plain embedding with its rows; returns the forms by parameter name.

    With ``octavo.save((module, forms), path)`` they become an artifact.
    """
    forms, everywhere = {}, _places(module)
    for name, table in tables_of(module).items():
        form, device = table.form(), next(table.parameters()).device
        form = form if table.zero_row is None else with_zero_row(form, table.zero_row)
        rows = form.dense().to(device, table.like.dtype)
        frozen = not any(part.requires_grad for part in table.parameters())
        plain = nn.Embedding.from_pretrained(rows, frozen, padding_idx=table.padding_idx)
        _put(module, everywhere[table], plain.train(table.training))
        forms[f"{name}.weight"] = form
    return forms


def _places(module: nn.Module) -> dict[nn.Module, list[str]]:
    """All names of each module inside: one that several others share has several."""
    found: dict[nn.Module, list[str]] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        found.setdefault(part, []).append(name)
    return found


def _put(module: nn.Module, places: Sequence[str], made: nn.Module) -> None:
    """Put a module at all places of another, so that it is shared as that was."""
    for name in places:
        module.set_submodule(name, made)
