"""The methods of the benchmark of vector storage: tables of a model by one knob, which says how large they are."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo.architectures import DeepHash
from octavo.forms import Dense, Form, LowRank, Sparse
from octavo.forms.tensor_train import full_ranks
from octavo.methods.factorize.mpo import modes
from octavo.methods.prune.masks import largest
from octavo.recipes.testbeds.ctr import CTR
from octavo.training.tables import (
    CompactTable,
    FormTable,
    GatedGroups,
    LowPrecision,
    Prefixes,
    ProductCodes,
    SoftThreshold,
    WidthChoice,
    codes_by_frequency,
    frequent_rows,
    hashed_elements,
    hashed_rows,
    merged_rows,
    quotient_remainder,
    thin_rows,
    train_of_rows,
    widths_by_frequency,
)
from octavo.training.tables.by_form import DEVIATION

#: Elements of a row.
WIDTH = 16
#: Hidden layers of a network in place of a table, and its hashes.
_DEEP, _HASHES = 5, 128
#: What an evolutionary search of widths tries: generations, and candidates of each.
_GENERATIONS, _CANDIDATES = 3, 6


@dataclass(frozen=True)
class TableOf:
    """A table that is to be replaced.

    Parameters
    ----------
    counts
        (rows,) how often each row is used in the training data.
    share
        Bytes that it may take, as a share of those in 16 bits.
    sizes
        Rows of all tables that are replaced.
    """

    counts: Tensor
    share: float
    sizes: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Its rows."""
        return len(self.counts)

    def part(self, knob: float, of: int | None = None) -> int:
        """A share of the rows or of another number, at least 1."""
        whole = self.rows if of is None else of
        return min(whole, max(1, round(knob * whole)))

    @property
    def books(self) -> int:
        """The fewest codebooks whose codes fill the bytes with 8 bits each."""
        wanted = self.share * 16 * WIDTH / 8
        return next((books for books in (1, 2, 4, 8) if books >= wanted), WIDTH)


def _quotients(table: TableOf, knob: float) -> CompactTable:
    # Below the root, the table of quotients is the larger one.
    least = round(table.rows**0.5)
    return FormTable(quotient_remainder(table.rows, WIDTH, max(least, table.part(knob))))


def _adaptive(table: TableOf, knob: float) -> CompactTable:
    own = min(table.part(knob / 2), table.rows - 1)
    return FormTable(frequent_rows(table.counts, WIDTH, own, min(table.part(knob / 2), table.rows - own)))


def _train(table: TableOf, knob: float) -> CompactTable:
    most = max(full_ranks(modes(table.rows, 3), modes(WIDTH, 3)))
    return FormTable(train_of_rows(table.rows, WIDTH, table.part(knob, most)))


def _low_precision(table: TableOf, knob: float, *, learned: bool) -> CompactTable:
    levels = round(2 ** (14.9 * knob))
    # Few codes are used alike in a new table; many leave room for it to grow.
    reach = DEVIATION * min(10, 1.2 * levels**0.6)
    return LowPrecision(table.rows, WIDTH, levels, reach=reach, learned=learned)


def _product_codes(table: TableOf, knob: float) -> CompactTable:
    return ProductCodes(table.rows, WIDTH, table.books, min(table.rows, round(2 ** (8 * knob))))


def _codes_by_frequency(table: TableOf, knob: float) -> CompactTable:
    entries = round(2 ** (8 * knob))
    return codes_by_frequency(table.counts, WIDTH, table.books, (entries, max(1, entries // 4)))


def _mixed_widths(table: TableOf, knob: float) -> CompactTable:
    # From equal widths, the power rises to 1; below half of the knob, all widths shrink.
    widths = widths_by_frequency(table.sizes, min(1.0, 2 * (1 - knob)), WIDTH, min(1.0, 2 * knob))
    return FormTable(thin_rows(table.rows, WIDTH, widths[table.sizes.index(table.rows)]))


def _network(table: TableOf, knob: float) -> nn.Module:
    return DeepHash(table.rows, WIDTH, (max(1, round(400 * knob**2)),) * _DEEP, hashes=_HASHES)


#: Tables that rows share, by a knob from 0 to 1.
SHARING: Mapping[str, Callable[[TableOf, float], nn.Module]] = {
    "hash": lambda table, knob: FormTable(hashed_rows(table.rows, WIDTH, table.part(knob))),
    "double hashing": lambda table, knob: FormTable(hashed_rows(table.rows, WIDTH, table.part(knob), functions=2)),
    "QR": _quotients,
    "ROBE": lambda table, knob: FormTable(
        hashed_elements(table.rows, WIDTH, table.part(knob, table.rows * WIDTH)),
    ),
    "AdaptEmb": _adaptive,
    "TT-Rec": _train,
    "DHE": _network,
}
#: Tables of codes.
CODED: Mapping[str, Callable[[TableOf, float], nn.Module]] = {
    "low precision": lambda table, knob: _low_precision(table, knob, learned=False),
    "ALPT": lambda table, knob: _low_precision(table, knob, learned=True),
    "DPQ": _product_codes,
    "MGQE": _codes_by_frequency,
}
#: Thinner tables whose widths need no search.
THIN: Mapping[str, Callable[[TableOf, float], nn.Module]] = {"MDE": _mixed_widths}

#: Supernets by table.
Nets = Mapping[str, CompactTable]
#: A quality of a model with these forms, more is better.
Judge = Callable[[Mapping[str, Form]], float]


@dataclass(frozen=True)
class Searched:
    """A method that trains a supernet first, and then what it chose.

    Parameters
    ----------
    net
        The supernet of a table.
    chosen
        Forms of all tables by a knob from 0 to 1, and what judges them.
    """

    net: Callable[[TableOf], CompactTable]
    chosen: Callable[[Nets, float, Judge | None], dict[str, Form]]


def _kept(nets: Nets, knob: float, judge: Judge | None) -> dict[str, Form]:
    return {
        name: net.kept(max(1, round(knob * net.num_embeddings * WIDTH)))
        for name, net in nets.items()
        if isinstance(net, SoftThreshold | GatedGroups)
    }


def _widths(nets: Nets, knob: float, judge: Judge | None) -> dict[str, Form]:
    """The most probable widths, less a price of their elements.

    A prior that grows like the logarithm of the width lets every size be met, however little logits differ.
    """
    found: dict[str, Form] = {}
    for name, net in nets.items():
        assert isinstance(net, WidthChoice)
        price = (1 / max(knob, 1e-6) - 1) * net.num_embeddings / sum(one.num_embeddings for one in nets.values())
        widths = torch.tensor(net.widths).float()
        worth = net.logits.detach().log_softmax(0) + widths.log() - price * widths / WIDTH
        found[name] = net.of_width(net.widths[int(worth.argmax())])
    return found


def _evolved(nets: Nets, knob: float, judge: Judge | None) -> dict[str, Form]:
    """Widths that mutate and are selected, each with as many rows as fill the elements."""
    draws, total = random.Random(0), knob * sum(net.num_embeddings * WIDTH for net in nets.values())

    def made(widths: Mapping[str, int]) -> dict[str, Form]:
        rows = min(1.0, total / sum(nets[name].num_embeddings * width for name, width in widths.items()))
        found: dict[str, Form] = {}
        for name, width in widths.items():
            net = nets[name]
            assert isinstance(net, Prefixes)
            found[name] = net.kept(max(1, round(rows * net.num_embeddings)), width)
        return found

    best = {name: max(1, min(WIDTH, round(2 * knob * WIDTH))) for name in nets}
    if judge is None:
        return made(best)
    score = judge(made(best))
    for _ in range(_GENERATIONS):
        tried = []
        for _ in range(_CANDIDATES):
            mutant = {name: max(1, min(WIDTH, width + draws.choice((-2, -1, 0, 1, 2)))) for name, width in best.items()}
            tried.append((judge(made(mutant)), list(mutant.values()), mutant))
        top = max(tried, key=lambda one: one[:2])
        if top[0] > score:
            score, best = top[0], top[2]
    return made(best)


SEARCHED: Mapping[str, Searched] = {
    "AutoDim": Searched(lambda table: WidthChoice(table.rows, WIDTH, range(1, WIDTH + 1)), _widths),
    "OptEmbed": Searched(lambda table: Prefixes(table.rows, WIDTH), _evolved),
    "AutoSrh": Searched(lambda table: GatedGroups(table.counts, WIDTH), _kept),
    "PEP": Searched(lambda table: SoftThreshold(table.rows, WIDTH), _kept),
}


def _magnitudes(weight: Tensor, knob: float) -> Form:
    chosen = largest(weight.abs().flatten()[None], max(1, round(knob * weight.numel())))[0]
    mask = chosen.view(weight.shape)
    return Sparse(mask, Dense(weight[mask][None]))


def _svd(weight: Tensor, knob: float) -> Form:
    rank = max(1, round(knob * WIDTH))
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return LowRank(Dense(u[:, :rank] * s[:rank]), Dense(v[:rank]))


#: What is done to the tables of a trained model, by a knob from 0 to 1.
AFTERWARDS: Mapping[str, Callable[[Tensor, float], Form]] = {
    "Dedup": lambda weight, knob: merged_rows(weight, max(1, round(knob * len(weight)))),
    "magnitude pruning": _magnitudes,
    "SVD": _svd,
}


def replaced(model: CTR, tables: Mapping[str, nn.Module]) -> CTR:
    """A copy of a model with these tables by name."""
    made = copy.deepcopy(model)
    for name, table in tables.items():
        made.set_submodule(name, table)
    return made
