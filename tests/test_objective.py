"""Divergences: zero for equals, the textbook's values, blind to padding, and probes that sample their curvature."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from octavo.errors import RequestError
from octavo.objective import KL, OBJECTIVES, Cosine, Squared, mask_of, objective, run, sequences_in


class Tagger(nn.Module):
    """Classes for every token, as language models give them."""

    def __init__(self, words=20, width=8, classes=7):
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids, attention_mask=None):
        states = self.table(input_ids)
        return SimpleNamespace(last_hidden_state=states, logits=self.head(states))


def perturbed(module, size=0.1):
    torch.manual_seed(5)
    other = Tagger()
    other.load_state_dict(
        {name: value + size * torch.randn(value.shape) for name, value in module.state_dict().items()}
    )
    return other


@pytest.fixture
def tagger():
    torch.manual_seed(0)
    return Tagger()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 20, (3, 6), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    return {"input_ids": tokens, "attention_mask": mask}


def padded(batch, extra=5, token=13):
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    garbage = torch.full((len(tokens), extra), token)
    where = mask.bool()
    return {
        "input_ids": torch.cat([tokens.where(where, torch.tensor(token)), garbage], 1),
        "attention_mask": torch.cat([mask, torch.zeros_like(garbage)], 1),
    }


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equal_outputs_have_no_divergence(name, tagger, batch):
    if name == "squared":
        batch = {"input_ids": batch["input_ids"]}
    wanted = objective(name)
    reference = wanted.reference(tagger, [batch, batch])
    losses = wanted.measure(tagger, [batch, batch], reference)
    assert losses.shape == (6,)
    assert losses.tolist() == [0.0] * 6


@pytest.mark.parametrize("name", OBJECTIVES)
def test_other_outputs_have_more_the_further_they_are(name, tagger, batch):
    wanted = objective(name)
    reference = wanted.reference(tagger, [batch])
    near = wanted.measure(perturbed(tagger, 0.03), [batch], reference)
    far = wanted.measure(perturbed(tagger, 0.3), [batch], reference)
    assert bool((near > 0).all()) and bool((far > 5 * near).all())


def test_kl_is_the_mean_over_positions_that_are_no_padding(tagger, batch):
    other, wanted = perturbed(tagger), KL()
    got = wanted.measure(other, [batch], wanted.reference(tagger, [batch]))
    with torch.no_grad():
        old, new = (m(**batch).logits.double().log_softmax(-1) for m in (tagger, other))
    each = nn.functional.kl_div(new, old, log_target=True, reduction="none").sum(-1)
    mask = batch["attention_mask"].bool()
    expected = torch.stack([row[keep].mean() for row, keep in zip(each, mask, strict=True)])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-8)


def test_kl_of_a_classifier_is_that_of_torch():
    torch.manual_seed(0)
    old, new, x = nn.Linear(6, 4), nn.Linear(6, 4), torch.randn(9, 6)
    got = KL().measure(new, [x], KL().reference(old, [x]))
    with torch.no_grad():
        logs = [m(x).double().log_softmax(-1) for m in (new, old)]
    expected = nn.functional.kl_div(*logs, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-8)


def test_cosine_is_one_minus_the_cosine_of_the_means(tagger, batch):
    other, wanted = perturbed(tagger), Cosine()
    got = wanted.measure(other, [batch], wanted.reference(tagger, [batch]))
    mask = batch["attention_mask"].bool()
    for row, value in enumerate(got):
        keep = batch["input_ids"][row][mask[row]]
        old, new = (m.table.weight.detach().double()[keep].mean(0) for m in (tagger, other))
        assert float(value) == pytest.approx(float(1 - nn.functional.cosine_similarity(old, new, dim=0)), rel=1e-3)


def test_cosine_of_the_first_token(tagger, batch):
    got = Cosine("cls").outputs(tagger, batch)
    first = tagger.table.weight[batch["input_ids"][:, 0]]
    torch.testing.assert_close(got, nn.functional.normalize(first, dim=1))


def test_cosine_does_not_see_length():
    x = torch.randn(4, 5)
    wanted, double = Cosine(), nn.Linear(5, 5, bias=False)
    double.weight.data = 2 * torch.eye(5)
    losses = wanted.measure(double, [x], wanted.reference(nn.Identity(), [x]))
    torch.testing.assert_close(losses, torch.zeros_like(losses), atol=1e-12, rtol=0)


def test_squared_is_relative_to_the_outputs():
    torch.manual_seed(0)
    old, new, x = nn.Linear(6, 4), nn.Linear(6, 4), torch.randn(9, 6)
    got = Squared().measure(new, [x], Squared().reference(old, [x]))
    with torch.no_grad():
        expected = (old(x) - new(x)).double().square().mean(1) / old(x).double().square().mean()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("wanted", [Cosine(), Cosine("cls"), KL()], ids=["mean", "cls", "kl"])
def test_padding_changes_nothing(wanted, tagger, batch):
    other = perturbed(tagger)
    short = wanted.measure(other, [batch], wanted.reference(tagger, [batch]))
    longer = padded(batch)
    padding = wanted.measure(other, [longer], wanted.reference(tagger, [longer]))
    torch.testing.assert_close(padding, short, rtol=1e-5, atol=1e-9)
    alone = []
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        one = {"input_ids": row[mask.bool()][None], "attention_mask": torch.ones(1, int(mask.sum()), dtype=torch.long)}
        alone.append(wanted.measure(other, [one], wanted.reference(tagger, [one])))
    torch.testing.assert_close(torch.cat(alone), short, rtol=1e-4, atol=1e-9)


def curvature(wanted, module, weight, call):
    """Hessian of the summed divergence at the unchanged weight, by automatic differentiation."""
    reference = call(weight).detach()
    return torch.autograd.functional.hessian(lambda w: wanted.divergence(reference, call(w)).sum(), weight)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("tokens", [False, True])
def test_probes_sample_the_curvature(name, tokens):
    torch.manual_seed(0)
    wanted, module = objective(name), nn.Linear(2, 3, bias=False)
    if tokens:
        if name == "squared":
            pytest.skip("Squared has no notion of padding")
        x = torch.randn(2, 4, 2)
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    else:
        x, mask = torch.randn(5, 2), None

    class Wrapped(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x, attention_mask=None):
            return nn.functional.linear(x, self.weight)

    def call(weight):
        holder = Wrapped.__new__(Wrapped)
        nn.Module.__init__(holder)
        holder.__dict__["weight"] = weight
        return wanted.outputs(holder, {"x": x} if mask is None else {"x": x, "attention_mask": mask})

    weight = module.weight.detach().clone().requires_grad_(True)
    exact = curvature(wanted, module, weight.detach(), call).reshape(6, 6)
    outputs, generator = call(weight), torch.Generator().manual_seed(0)
    total, draws = torch.zeros(6, 6, dtype=torch.float64), 6000
    for _ in range(draws):
        (gradient,) = torch.autograd.grad(wanted.probe(outputs, generator), weight, retain_graph=True)
        flat = gradient.flatten().double()
        total += flat[:, None] * flat[None]
    error = (total / draws - exact).norm() / exact.norm()
    assert float(error) < 0.06


@pytest.mark.parametrize("name", OBJECTIVES)
def test_probes_follow_their_generator(name):
    outputs = objective(name).outputs(nn.Linear(4, 5), torch.randn(3, 4)).detach()
    draws = [float(objective(name).probe(outputs, torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_batches_are_tensors_tuples_or_mappings():
    module, x = nn.Bilinear(3, 4, 2), (torch.randn(5, 3), torch.randn(5, 4))
    torch.testing.assert_close(run(module, x), module(*x))
    torch.testing.assert_close(run(module, {"input1": x[0], "input2": x[1]}), module(*x))
    torch.testing.assert_close(run(nn.Identity(), x[0]), x[0])
    assert [sequences_in(b) for b in (x, x[0], {"a": x[0]}, [])] == [5, 5, 5, 0]
    assert mask_of(x) is None and mask_of({"attention_mask": x[0]}) is x[0]


def test_what_cannot_be_compared_is_refused():
    class Odd(nn.Module):
        def forward(self, x):
            return {"answer": x}

    x = torch.randn(3, 4)
    for wanted in (Cosine(), KL()):
        with pytest.raises(RequestError, match=r"dict \(answer\).*; fits: squared$"):
            wanted.outputs(Odd(), x)
    for wanted in (Cosine(), KL(), Squared()):
        with pytest.raises(RequestError, match=r"dict \(answer\).*give an objective"):
            wanted.outputs(Odd(), x.long())
    with pytest.raises(RequestError, match="cosine, kl, squared"):
        objective("perplexity")
    given = KL()
    assert objective(given) is given


def test_loss_objective_follows_the_labels() -> None:
    """A user's loss: its increase is what is measured, and evidence comes from its gradients."""
    from octavo.objective import Loss

    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3)
    inputs, labels = torch.randn(64, 6), torch.randint(0, 3, (64,))
    objective = Loss(
        lambda module, batch: torch.nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")
    )
    reference = objective.reference(model, [(inputs, labels)])
    assert float(objective.measure(model, [(inputs, labels)], reference).abs().max()) == 0.0
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(3, 6)
    for _ in range(2000):
        model.zero_grad()
        objective.probe(objective.outputs(model, (inputs, labels)), generator).backward()
        total += model.weight.grad.square() / 2000
    wanted = torch.zeros(3, 6)
    for one, label in zip(inputs, labels, strict=True):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(one), label).backward()
        wanted += model.weight.grad.square()
    assert torch.allclose(total, wanted, rtol=0.15)
    with pytest.raises(RequestError, match="one number an example"):
        Loss(lambda module, batch: module(batch[0])).outputs(model, (inputs, labels))
