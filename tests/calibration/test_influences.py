"""Influence: EK-FAC and iterations against the dense Gauss-Newton matrix, and what takes part."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional

from octavo.calibration import influence
from octavo.calibration.example_gradients import ExampleGradients
from octavo.calibration.influences import layer_curvatures, mean_eigenvalues
from octavo.calibration.objective import objective
from octavo.errors import RequestError

DAMPING = 1.0


def losses(module, batch):
    return functional.cross_entropy(module(batch[0]), batch[1], reduction="none")


@pytest.fixture(scope="module")
def trained():
    """A small convolutional net, its examples, and its queries, which are the first examples."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.Tanh(),
        nn.Flatten(), nn.Linear(16, 3),
    ).double()  # fmt: skip
    y = torch.randint(0, 3, (90,))
    x = torch.randn(90, 1, 6, 6).double() + y[:, None, None, None] * torch.linspace(-1, 1, 6).double()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        losses(net, (x, y)).mean().backward()
        optimizer.step()
    return net.train(), list(zip(x.split(40), y.split(40), strict=True)), [(x[:5], y[:5])]


@pytest.fixture(scope="module")
def exact(trained):
    """Influence by the dense matrix of all weights together."""
    net, batches, _ = trained
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    held = {name: value.detach() for name, value in net.named_parameters()}
    jacobian = vmap(jacrev(lambda p, one: functional_call(net, p, (one[None],))[0]), (None, 0))(held, x)
    jacobian = torch.cat([part.flatten(2) for part in jacobian.values()], 2)
    p = net(x).softmax(1).detach()
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    matrix = torch.einsum("ncp,ncd,ndq->pq", jacobian, hessian, jacobian) / len(x)
    one = lambda p, x, y: functional.cross_entropy(functional_call(net, p, (x[None],)), y[None])  # noqa: E731
    found = vmap(grad(one), (None, 0, 0))(held, x, y)
    gradients = torch.cat([part.flatten(1) for part in found.values()], 1)
    traced = ExampleGradients(net)
    with traced.watching():
        levels = mean_eigenvalues(traced, batches, objective("kl"))
    ridge = [torch.full((v.numel(),), DAMPING * levels[name.partition(".")[0]]) for name, v in held.items()]
    return gradients[:5] @ torch.linalg.solve(matrix + torch.cat(ridge).double().diag(), gradients.t())


def correlation(one, other):
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


@pytest.mark.parametrize(
    ("solver", "least"),
    [("cg", 0.99999), ("lissa", 0.98), ("ekfac", 0.8), ("kfac", 0.7), ("diagonal", 0.3)],
)
def test_scores_are_those_of_the_dense_matrix(trained, exact, solver, least):
    net, batches, queries = trained
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = influence(net, batches, queries, losses, damping=DAMPING, solver=solver)
    assert found.scores.shape == (5, 90) and correlation(found.scores, exact) > least
    assert found.layers == ("0", "2", "5") and not found.left_out
    # The module is as before, and nothing accumulates in it.
    assert net.training and all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_an_example_lowers_its_own_loss_most(trained):
    net, batches, queries = trained
    scores = influence(net, batches, queries, losses).scores
    assert bool((scores.diagonal() > 0).all())
    again = influence(net, [(torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches]))], queries, losses)
    assert correlation(scores, again.scores) > 0.99


def test_curvatures_are_moments_of_single_gradients(trained):
    net, batches, _ = trained
    traced = ExampleGradients(net)
    with traced.watching():
        found = layer_curvatures(traced, batches, objective("kl"), seed=3)
        levels = mean_eigenvalues(traced, batches, objective("kl"), seed=3)
    # The bias is one more column.
    assert {name: tuple(part.values.shape) for name, part in found.items()} == {
        "0": (3, 10),
        "2": (4, 27),
        "5": (3, 17),
    }
    for name, curvature in found.items():
        assert float(curvature.values.mean()) == pytest.approx(levels[name], rel=1e-5)


def test_layers_that_read_tokens_and_what_takes_no_part():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm = nn.Embedding(20, 6), nn.LayerNorm(6)
            self.twice, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, input_ids):
            x = self.norm(self.table(input_ids))
            return self.head(torch.tanh(self.twice(torch.tanh(self.twice(x)))))

    def of_tags(module, batch):
        return functional.cross_entropy(module(batch["input_ids"]).mT, batch["tags"], reduction="none").mean(1)

    torch.manual_seed(0)
    net = Tagger()
    batch = {"input_ids": torch.randint(0, 20, (12, 5)), "tags": torch.randint(0, 4, (12, 5))}
    found = influence(net, [batch], [batch], of_tags)
    assert found.layers == ("twice", "head")
    assert found.left_out == ("table.weight", "norm.weight", "norm.bias")
    # Symmetric, since the queries are the examples.
    torch.testing.assert_close(found.scores, found.scores.t(), rtol=1e-3, atol=1e-5)
    exact = influence(net, [batch], [batch], of_tags, solver="cg")
    assert correlation(found.scores, exact.scores) > 0.8


def test_regressions_have_another_curvature():
    torch.manual_seed(0)
    net, x = nn.Linear(4, 2), torch.randn(64, 4)
    y = x[:, :2] * 3
    squares = lambda module, batch: (module(batch[0]) - batch[1]).square().sum(1)  # noqa: E731
    found = influence(net, [(x, y)], [(x, y)], squares, objective="squared")
    exact = influence(net, [(x, y)], [(x, y)], squares, objective="squared", solver="cg")
    assert correlation(found.scores, exact.scores) > 0.95


class Late(nn.Module):
    """Outputs that depend on its layer only where a batch says so."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x) if bool((x > 0).all()) else self.layer(x) * 0 + x[:, :2]


def test_examples_without_a_part_in_the_outputs_have_no_influence():
    torch.manual_seed(0)
    live, dead = torch.rand(8, 4) + 0.1, -torch.rand(3, 4)
    summed = lambda module, batch: module(batch).square().sum(1)  # noqa: E731
    found = influence(Late(), [live, dead], [live[:2]], summed)
    assert found.scores.shape == (2, 11) and not found.scores[:, 8:].any() and found.scores[:, :8].any()
    for solver in ("ekfac", "kfac", "diagonal", "cg"):
        with pytest.raises(RequestError, match=r"outputs (on the examples depend on none|do not depend)"):
            influence(Late(), [dead], [live[:2]], summed, solver=solver)


def test_requests_that_cannot_be_met_are_explained(trained):
    net, batches, queries = trained
    for change, message in (
        ({"solver": "qr"}, "solver is 'qr'; choose one of ekfac, kfac, diagonal, cg, lissa"),
        ({"damping": 0.0}, "damping is 0.0; give a share above 0"),
        ({"queries": []}, "there are no queries; give at least one batch"),
        ({"module": nn.Embedding(3, 2)}, "has neither a linear layer nor a convolution"),
        ({"loss": lambda module, batch: losses(module, batch).mean()}, "return one number per example"),
        ({"loss": lambda module, batch: losses(module, batch) / 0}, "the sum over a batch is inf"),
    ):
        with pytest.raises(RequestError, match=message):
            influence(**{"module": net, "examples": batches, "queries": queries, "loss": losses, **change})
