"""Compressed tables: what they hand over is what they computed, it learns, lies in a file, and refuses bad input."""

import pytest
import torch
from torch import nn

import octavo
from octavo.architectures import DeepHash
from octavo.errors import RequestError
from octavo.forms import Dense, Grid, Hashed, LowRank, RowBlocks, Sparse, TensorTrain, Trimmed, Vectors
from octavo.training import fit
from octavo.training.regimens.deeplight import DeepLight
from octavo.training.tables import (
    CompactTable,
    FormTable,
    GatedGroups,
    LowPrecision,
    Prefixes,
    ProductCodes,
    RowGroups,
    SoftThreshold,
    WidthChoice,
    codes_by_frequency,
    frequent_rows,
    hashed_elements,
    hashed_rows,
    merged_rows,
    quotient_remainder,
    ranked,
    settle_tables,
    tables_of,
    thin_rows,
    train_of_rows,
    widths_by_frequency,
    with_tables,
)

ROWS, COLUMNS = 120, 8
COUNTS = torch.arange(ROWS).float().roll(7)

#: Tables by method, and the form that each hands over.
KINDS = {
    "hash": (lambda: FormTable(hashed_rows(ROWS, COLUMNS, 20)), Hashed),
    "double hashing": (lambda: FormTable(hashed_rows(ROWS, COLUMNS, 20, functions=2)), Hashed),
    "quotient and remainder": (lambda: FormTable(quotient_remainder(ROWS, COLUMNS, 11)), Hashed),
    "ROBE": (lambda: FormTable(hashed_elements(ROWS, COLUMNS, 150)), Hashed),
    "AdaptEmb": (lambda: FormTable(frequent_rows(COUNTS, COLUMNS, 12, 20)), RowBlocks),
    "MDE": (lambda: FormTable(thin_rows(ROWS, COLUMNS, 3)), LowRank),
    "TT-Rec": (lambda: FormTable(train_of_rows(ROWS, COLUMNS, 5)), TensorTrain),
    "INT8": (lambda: LowPrecision(ROWS, COLUMNS), Grid),
    "ternary": (lambda: LowPrecision(ROWS, COLUMNS, 1, reach=0.2), Grid),
    "ALPT": (lambda: LowPrecision(ROWS, COLUMNS, 7, learned=True), Grid),
    "DPQ": (lambda: ProductCodes(ROWS, COLUMNS, 4, 16), Vectors),
    "MGQE": (lambda: codes_by_frequency(COUNTS, COLUMNS, 4, (12, 4)), RowBlocks),
    "AutoDim": (lambda: WidthChoice(ROWS, COLUMNS, (2, 4, 8)), LowRank),
    "OptEmbed": (lambda: Prefixes(ROWS, COLUMNS), Trimmed),
    "AutoSrh": (lambda: GatedGroups(COUNTS, COLUMNS), RowBlocks),
    "PEP": (lambda: SoftThreshold(ROWS, COLUMNS), Sparse),
}  # fmt: skip


def made(name):
    torch.manual_seed(0)
    return KINDS[name][0]()


def lesson(model, steps=30):
    """Whether an index is odd or not, which a table can only know row by row."""
    draws = torch.Generator().manual_seed(0)
    index = torch.randint(0, ROWS, (steps, 64), generator=draws)
    batches = [(part, (part < ROWS // 2).float()) for part in index]
    loss = lambda net, batch: nn.functional.binary_cross_entropy_with_logits(net(batch[0])[:, 0], batch[1])  # noqa: E731
    return fit(model, lambda epoch: batches, loss, epochs=3, lr=0.02)


@pytest.mark.parametrize("name", KINDS)
def test_a_table_hands_over_the_rows_that_it_computed(name):
    table = made(name)
    model = nn.Sequential(nn.Embedding(ROWS, COLUMNS), nn.Linear(COLUMNS, 1))
    assert with_tables(model, lambda old: table) is model and tables_of(model) == {"0": table}
    losses = lesson(model)
    assert losses[-1] < losses[0]
    index = torch.tensor([[0, 5, 5], [ROWS - 1, 7, 60]])
    rows = model.eval()[0](index).detach()
    assert rows.shape == (2, 3, COLUMNS) and torch.equal(rows[0, 1], rows[0, 2])
    form = table.form()
    assert type(form) is KINDS[name][1] and form.shape == (ROWS, COLUMNS)
    # Steps and vectors are rounded to 16 bits.
    torch.testing.assert_close(form.dense()[index], rows, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(form.lookup(index.flatten()), form.dense()[index.flatten()])
    torch.testing.assert_close(table.weight.detach(), form.dense(), atol=2e-3, rtol=2e-3)
    (settled,) = settle_tables(model).values()
    assert type(model[0]) is nn.Embedding and torch.equal(model[0].weight.detach(), settled.dense())


@pytest.mark.parametrize("name", ["hash", "DPQ", "MGQE"])
def test_it_is_saved_loaded_and_looked_up(name, tmp_path):
    def net():
        torch.manual_seed(1)
        return nn.Sequential(nn.Embedding(ROWS, COLUMNS), nn.Linear(COLUMNS, 1))

    model = with_tables(net(), lambda old: made(name))
    lesson(model, 4)
    forms = settle_tables(model)
    report = octavo.save((model, forms), tmp_path / "small", report=False, progress=False)
    index = torch.tensor([3, 100])
    assert torch.equal(octavo.load(tmp_path / "small", into=net())(index), model(index))
    read = octavo.Artifact(tmp_path / "small").form("0.weight")
    assert type(read) is KINDS[name][1] and torch.equal(read.lookup(index), model[0](index))
    assert report.artifact.ratio > 1


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("index", [-1, ROWS])
def test_an_index_beyond_the_table_is_refused(name, index):
    with pytest.raises(RequestError, match=f"index {index} is beyond its {ROWS} rows"):
        made(name)(torch.tensor([0, index]))
    with pytest.raises(RequestError, match=f"beyond its {ROWS}"):
        DeepHash(ROWS, COLUMNS, (8,), hashes=4)(torch.tensor([0, index]))


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_looked_up_from_an_empty_batch(name):
    assert made(name)(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, COLUMNS)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ProductCodes(20, 8, 4, 21), "21 entries for 20 rows"),
        (lambda: ProductCodes(20, 8, 3, 4), "3 books do not divide 8"),
        (lambda: ProductCodes(0, 8, 2, 1), "0 rows"),
        (lambda: hashed_rows(20, 8, 21), "21 shared of 20 rows"),
        (lambda: hashed_rows(20, 8, 0), "0 shared"),
        (lambda: quotient_remainder(0, 8, 1), "1 shared of 0"),
        (lambda: hashed_elements(2, 3, 7), "7 shared of 6 pieces"),
        (lambda: frequent_rows(torch.ones(5), 8, 5, 1), "5 of 5 rows"),
        (lambda: thin_rows(5, 8, 9), "9 shared of 8 columns"),
        (lambda: merged_rows(torch.ones(3, 4), 4), "4 entries for 3 pieces"),
        (lambda: merged_rows(torch.ones(0, 4), 1), "0 x 4"),
        (lambda: LowPrecision(5, 8, 0), "0 levels"),
        (lambda: LowPrecision(5, 8, 40000), "40000 levels"),
        (lambda: LowPrecision(0, 8), "0 rows"),
        (lambda: GatedGroups(torch.ones(3), 8), "6 groups of 3 rows"),
        (lambda: GatedGroups(torch.ones(300), 2, 257), "257 blocks"),
        (lambda: ranked(torch.ones(300), range(1, 258)), "give at most 256"),
        (
            lambda: RowGroups(torch.arange(257), [FormTable(Dense(torch.ones(1, 2)))] * 257),
            "257 tables, but the number of a group is one byte",
        ),
        (lambda: WidthChoice(5, 8, (9,)), "widths"),
        (lambda: SoftThreshold(2, 4).kept(9), "9 of 8"),
        (lambda: Prefixes(2, 4).kept(3, 1), "3 rows of 1"),
        (lambda: RowGroups(torch.tensor([0, 0, 1]), [ProductCodes(1, 4, 2, 1), ProductCodes(2, 4, 2, 1)]), "groups of"),
        (lambda: FormTable(Grid(torch.ones(2, 2, dtype=torch.int8), torch.ones(1, 1))), "no dense part"),
        (lambda: DeepHash(0, 8, (4,)), "0 rows"),
        (lambda: DeepLight(sparsity=1.0), "sparsity is 1.0"),
    ],
)  # fmt: skip
def test_bad_sizes_are_refused(make, said):
    with pytest.raises(RequestError, match=said):
        make()


def test_models_that_cannot_be_changed_are_refused():
    make = lambda old: LowPrecision(old.num_embeddings, old.embedding_dim)  # noqa: E731
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    with pytest.raises(RequestError, match=r"no embedding is named 'table'; choose from 0"):
        with_tables(net, make, ["table"])
    with pytest.raises(RequestError, match="does not replace 5, 4"):
        with_tables(net, lambda old: LowPrecision(4, 4))
    for module in (nn.Linear(2, 2), nn.Embedding(5, 4)):
        with pytest.raises(RequestError, match="holds no embedding"):
            with_tables(module, make)
    net[1].weight = net[0].weight
    with pytest.raises(RequestError, match="tied"):
        with_tables(net, make)


def test_a_padding_row_is_not_trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=2))
    with_tables(model, lambda old: FormTable(Dense(torch.randn(6, 4))))
    model(torch.tensor([2, 2, 3])).sum().backward()
    (gradient,) = (leaf.grad for leaf in model.parameters())
    assert not gradient[2].any() and gradient[3].all()
    settle_tables(model)
    assert model[0].padding_idx == 2


def test_random_rounding_loses_no_small_update():
    torch.manual_seed(0)
    table = LowPrecision(2000, 4, 7, reach=0.7).train()
    with torch.no_grad():
        table.latent.fill_(0.23)
    rows = table(torch.arange(2000)).detach()
    assert set((rows / 0.1).round().unique().tolist()) == {2.0, 3.0}
    assert float(rows.mean()) == pytest.approx(0.23, abs=0.003)
    assert torch.equal(table.eval()(torch.arange(2000)), rows), "it stays on the grid"


def test_steps_are_learned_from_what_rounding_leaves():
    torch.manual_seed(0)
    table = LowPrecision(3, 2, 1, reach=0.1, learned=True).eval()
    with torch.no_grad():
        table.latent.copy_(torch.tensor([[0.06, 0.04], [0.5, 0.5], [0.0, 0.0]]))
    table(torch.arange(3)).sum().backward()
    # The step times what was rounded away inside, the step itself beyond, nothing where all is zero.
    expected = torch.tensor([0.1 * (0.4 - 0.4), 0.2, 0.0])
    torch.testing.assert_close(table.log_step.grad[:, 0], expected, atol=1e-4, rtol=0)
    assert table.latent.grad.tolist() == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]


def test_frequent_rows_come_first_and_widths_fall_with_the_rows():
    member = ranked(torch.tensor([5.0, 9.0, 1.0, 7.0]), [1, 3])
    assert member.tolist() == [1, 0, 2, 1]
    assert widths_by_frequency([100, 400, 100000], 0.5, 16) == [16, 8, 1]
    groups = codes_by_frequency(COUNTS, COLUMNS, 4, (12, 4)).form()
    assert [block.values.shape[2] for block in groups.blocks] == [12, 4]
    assert COUNTS[groups.member == 0].min() > COUNTS[groups.member == 1].max()


def test_what_was_searched_keeps_as_much_as_it_is_told():
    torch.manual_seed(0)
    pruned = SoftThreshold(30, 8)
    assert int(pruned.kept(50).mask.sum()) == 50
    trimmed = Prefixes(30, 8).kept(10, 3)
    assert trimmed.inner.shape == (10, 3) and trimmed.columns.tolist() == [True] * 3 + [False] * 5
    gated = GatedGroups(torch.rand(30), 8, 3)
    with torch.no_grad():
        gated.gates.mul_(torch.tensor([[3.0], [2.0], [1.0]]))
    kept = gated.kept(100)
    assert [block.inner.shape for block in kept.blocks] == [(10, 8), (10, 1), (10, 1)]
    assert WidthChoice(30, 8, (2, 8)).of_width(2).left.shape == (30, 2)


def test_equal_rows_are_merged():
    torch.manual_seed(0)
    weight = torch.randn(5, 6).repeat(20, 1)
    form = merged_rows(weight, 12)
    assert form.values.shape[2] <= 12
    assert torch.allclose(form.dense(), weight, atol=2e-3)
    assert merged_rows(weight, 3, width=3).values.shape[2] <= 3


def test_deeplight_prunes_early_and_reaches_its_share():
    model = nn.Sequential(nn.Embedding(ROWS, COLUMNS), nn.Linear(COLUMNS, 1))
    regimen, shares = DeepLight(0.9, every=5, names=("0.weight",)), []
    after = regimen.after_step
    regimen.after_step = lambda step: (after(step), shares.append(float((model[0].weight == 0).float().mean())))
    torch.manual_seed(0)
    index = torch.randint(0, ROWS, (40, 64))
    loss = lambda net, batch: (net(batch)[:, 0] - (batch % 2)).square().mean()  # noqa: E731
    fit(model, lambda epoch: list(index), loss, lr=0.02, regimen=regimen)
    # Two thirds of the way to the last pruning.
    assert shares[20] > 0.75 and shares == sorted(shares) and shares[-1] == pytest.approx(0.9, abs=1e-3)
    (form,) = regimen.forms(model).values()
    assert isinstance(form, Sparse) and torch.equal(form.dense(), model[0].weight.detach())


def test_a_network_stands_for_a_table():
    torch.manual_seed(0)
    net = DeepHash(100, 8, (16, 16), hashes=32)
    rows = net.eval()(torch.arange(100).view(50, 2))
    assert rows.shape == (50, 2, 8) and len(rows.view(100, 8).unique(dim=0)) == 100
    again = DeepHash(100, 8, (16, 16), hashes=32).eval()
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(torch.arange(100)), rows.view(100, 8))


def test_every_kind_of_table_is_here():
    kinds = {type(made(name)) for name in KINDS}
    assert kinds == set(CompactTable.__subclasses__())


class Shared(nn.Module):
    """Two encoders that read the same table, and one that has its own."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.other = (nn.ModuleDict() for _ in range(3))
        self.left["table"] = self.right["table"] = nn.Embedding(ROWS, COLUMNS)
        self.other["table"] = nn.Embedding(ROWS, COLUMNS)

    def forward(self, index):
        return self.left["table"](index) + self.right["table"](index) + self.other["table"](index)


@pytest.mark.parametrize("names", [None, ["left.*"], ["right.*"]])
def test_a_table_that_two_modules_share_is_replaced_in_both(names):
    model = Shared()
    with_tables(model, lambda old: LowPrecision(ROWS, COLUMNS), names)
    assert isinstance(model.left["table"], LowPrecision) and model.left["table"] is model.right["table"]
    assert isinstance(model.other["table"], LowPrecision) is (names is None)
    before = model.eval()(torch.arange(ROWS))
    forms = settle_tables(model)
    assert type(model.left["table"]) is nn.Embedding and model.left["table"] is model.right["table"]
    assert forms.keys() == ({"left.table.weight"} if names else {"left.table.weight", "other.table.weight"})
    assert torch.allclose(model(torch.arange(ROWS)), before, atol=2e-3)


@pytest.mark.parametrize("name", KINDS)
def test_reading_the_weight_changes_nothing_and_draws_nothing(name):
    table = made(name).train()
    state, random = {key: value.clone() for key, value in table.state_dict().items()}, torch.get_rng_state()
    rows = table.weight
    assert torch.equal(rows, table.weight) and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in table.state_dict().items())
    assert rows.requires_grad and all(part.training for part in table.modules())


def test_as_many_groups_as_a_byte_can_number():
    torch.manual_seed(0)
    table = GatedGroups(torch.rand(300), 2, 256)
    assert len(table.form().blocks) == 256
    assert torch.allclose(table.form().dense(), table.weight.detach(), atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_a_padding_row_that_is_zero_stays_zero(name, tmp_path):
    def net():
        torch.manual_seed(1)
        return nn.Sequential(nn.Embedding(ROWS, COLUMNS, padding_idx=5), nn.Linear(COLUMNS, 1))

    model = with_tables(net(), lambda old: made(name))
    lesson(model, 4)
    index = torch.arange(ROWS)
    table = model.train()[0]
    assert not table(index)[5].any() and not table.weight[5].any() and table(index)[6:].any()
    rows = model.eval()[0](index).detach()
    forms = settle_tables(model)
    assert not model[0].weight[5].any() and torch.allclose(model[0].weight, rows, atol=2e-3, rtol=2e-3)
    octavo.save((model, forms), tmp_path / "small", report=False, progress=False)
    read = octavo.Artifact(tmp_path / "small").form("0.weight")
    assert not read.lookup(torch.tensor([5])).any() and torch.equal(read.dense(), model[0].weight.detach())


def test_a_refused_model_keeps_all_embeddings():
    def refused(model, word, make):
        before = list(model.modules())
        with pytest.raises(RequestError, match=word):
            with_tables(model, make)
        assert list(model.modules()) == before

    make = lambda old: LowPrecision(old.num_embeddings, old.embedding_dim)  # noqa: E731
    tied = nn.Sequential(nn.Embedding(9, 4), nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    tied[2].weight = tied[1].weight
    refused(tied, "'1': is tied", make)
    refused(nn.Sequential(nn.Embedding(9, 4), nn.Embedding(5, 4, max_norm=1.0)), "'1': is tied", make)
    refused(nn.Sequential(nn.Embedding(9, 4), nn.Embedding(5, 4)), "does not replace 5, 4", lambda old: make(tied[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", KINDS)
def test_a_table_has_the_dtype_and_the_flag_of_its_embedding(name, dtype):
    for trained in (True, False):
        model = nn.Sequential(nn.Embedding(ROWS, COLUMNS), nn.Linear(COLUMNS, 1)).to(dtype).requires_grad_(trained)
        table = with_tables(model, lambda old: made(name))[0]
        assert model(torch.tensor([[0, 5]])).dtype == table.weight.dtype == dtype
        assert any(part.requires_grad for part in table.parameters()) is trained
        settle_tables(model)
        assert model[0].weight.dtype == dtype and model[0].weight.requires_grad is trained
