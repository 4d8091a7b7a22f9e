"""Feature mimicking of modules: parts of the right shapes, folds, and what is refused."""

import copy

import pytest
import torch
from torch import nn

from octavo.errors import RequestError
from octavo.methods.factorize.mimicking import Mimicking


class Ranker(nn.Module):
    """Tables and a perceptron; with ``pairs`` the rows are also multiplied with each other."""

    def __init__(self, pairs=False):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, 12) for size in (60, 50))
        self.mlp, self.pairs = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 2, bias=False)), pairs

    def forward(self, fields):
        rows = [table(fields[:, k]) for k, table in enumerate(self.tables)]
        out = self.mlp(torch.cat(rows, 1))
        return out + (rows[0] * rows[1]).sum(1, keepdim=True) if self.pairs else out


TABLES = {"tables.0": 5, "tables.1": 7}
FOLDS = {"mlp.0": ("tables.0", "tables.1")}


@pytest.fixture(scope="module")
def data():
    return [torch.randint(0, 50, (100, 2), generator=torch.Generator().manual_seed(k)) for k in range(3)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Ranker()


def error(made, model, data):
    return float(sum((made.eval()(batch) - model(batch)).square().sum() for batch in data))


@torch.no_grad()
def test_parts_mimic_outputs_better_than_truncated_weights(model, data):
    before = copy.deepcopy(model.state_dict())
    wanted = Mimicking({**TABLES, "mlp.0": 10}, relu=False)
    made, other = wanted.of(model, data), wanted.by_weights(model)
    assert error(made, model, data) < 0.9 * error(other, model, data)
    assert made.tables[0][0].weight.shape == (60, 5) and made.tables[0][1].weight.shape == (12, 5)
    assert [part.weight.shape for part in made.mlp[0]] == [(10, 24), (32, 10)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and model.training
    # All directions lose nothing.
    full = Mimicking({"tables.0": 12, "tables.1": 12, "mlp.0": 24, "mlp.2": 2}, relu=False).of(model, data)
    assert error(full, model, data) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("ranks", [TABLES, {**TABLES, "mlp.0": 10}])
def test_folded_tables_compute_the_same(model, data, ranks):
    split, made = Mimicking(ranks).of(model, data), Mimicking(ranks, folds=FOLDS).of(model, data)
    torch.testing.assert_close(made(data[0]), split(data[0]), rtol=1e-4, atol=1e-5)
    first = made.mlp[0][0] if "mlp.0" in ranks else made.mlp[0]
    assert first.in_features == 12 and len(made.tables[0]) == 1
    elements = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert elements(made) < elements(split)


def test_a_fold_that_would_change_the_outputs_is_refused(data):
    torch.manual_seed(0)
    with pytest.raises(RequestError, match=r"folds: .*something beside that layer reads the rows"):
        Mimicking(TABLES, folds=FOLDS).of(Ranker(pairs=True), data)
    with pytest.raises(RequestError, match=r"folds: the outputs .*in another order; leave the fold out"):
        Mimicking({"tables.0": 5, "tables.1": 5}, folds={"mlp.0": ("tables.1", "tables.0")}).of(Ranker(), data)


def test_shapes_depend_on_the_ranks_alone(model, data):
    wanted = Mimicking({**TABLES, "mlp.0": 10}, folds=FOLDS)
    made, fresh = wanted.of(model, data), wanted.shaped(Ranker())
    fresh.load_state_dict(made.state_dict())
    torch.testing.assert_close(fresh(data[0]), made(data[0]))
    # Rows that are all alike have no direction of variance, so the codes are zeros.
    with torch.no_grad():
        model.tables[0].weight.fill_(0.5)
    wanted.shaped(Ranker()).load_state_dict(wanted.of(model, data).state_dict())


def test_it_trains_with_a_relu_between_the_parts(model, data):
    made = Mimicking({"mlp.0": 10}).of(model, data)
    assert isinstance(made.mlp[0][1], nn.ReLU)
    optimizer, losses = torch.optim.Adam(made.parameters(), 1e-2), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (made(data[0]) - model(data[0]).detach()).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def test_requests_that_cannot_be_met_are_explained(model, data):
    for wanted, message in (
        (Mimicking({"mlp.9": 3}), r"has no module 'mlp.9'; choose from tables.0, tables.1, mlp.0, mlp.2"),
        (Mimicking({"mlp.1": 3}), "mlp.1: is ReLU; give the names of linear layers and embeddings"),
        (Mimicking({"mlp.0": 25}), "mlp.0: rank 25 is not possible; choose from 1 to 24"),
        (Mimicking({"tables.0": 3}, folds=FOLDS), "mlp.0: tables.1 is no table with a rank"),
    ):
        for act in (lambda wanted=wanted: wanted.of(model, data), lambda wanted=wanted: wanted.shaped(model)):
            with pytest.raises(RequestError, match=message):
                act()
    model.spare = nn.Linear(3, 3)
    with pytest.raises(RequestError, match="spare: no batch passes this layer"):
        Mimicking({"spare": 2}).of(model, data)
    with pytest.raises(RequestError, match="batches: none are given"):
        Mimicking({"mlp.0": 2}).of(model, [])
