"""Divergences: zero for equals, the textbook's values, blind to padding, and probes that sample their curvature."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from octavo.calibration.objective import KL, OBJECTIVES, Cosine, Squared, objective
from octavo.errors import RequestError
from octavo.sources.batches import mask_of, run, sequences_in


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
    from octavo.calibration.objective import Loss

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
    with pytest.raises(RequestError, match="one number per example"):
        Loss(lambda module, batch: module(batch[0])).outputs(model, (inputs, labels))


class Giving(nn.Module):
    """Returns what is made of one linear layer's outputs."""

    def __init__(self, make, width=6):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.make = nn.Linear(4, width), make

    def forward(self, x, **_):
        return self.make(self.layer(x))


def moved(module):
    other = Giving(module.make, module.layer.out_features)
    torch.manual_seed(1)
    other.layer.weight.data += 0.05 * torch.randn_like(other.layer.weight)
    return other


def divergence(wanted, make, shape, width=6, **more):
    module, batch = Giving(make, width), {"x": torch.randn(*shape, generator=torch.Generator().manual_seed(0)), **more}
    other = moved(module)
    got = wanted.measure(other, [batch], wanted.reference(module, [batch]))
    with torch.no_grad():
        return got, module.layer(batch["x"]), other.layer(batch["x"])


def kl(old, new):
    logs = [logits.double().log_softmax(-1) for logits in (new, old)]
    return nn.functional.kl_div(*logs, log_target=True, reduction="none").sum(-1)


def test_an_answer_is_two_distributions_over_tokens_without_padding():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    got, old, new = divergence(
        KL(), lambda y: {"start_logits": y[..., 0], "end_logits": y[..., 1]}, (3, 5, 4), 2, attention_mask=mask
    )
    for row, keep in enumerate(mask.bool()):
        each = [kl(old[row, keep, side], new[row, keep, side]) for side in (0, 1)]
        assert float(got[row]) == pytest.approx(float(sum(each) / 2), rel=1e-4)


def test_several_heads_count_by_their_positions():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    got, old, new = divergence(
        KL(),
        lambda y: {"prediction_logits": y, "seq_relationship_logits": y[:, 0, :2], "router_logits": y[:1]},
        (2, 3, 4),
        attention_mask=mask,
    )
    words, pairs = kl(old, new) * mask, kl(old[:, 0, :2], new[:, 0, :2])
    expected = (words.sum(1) + pairs) / (mask.sum(1) + 1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-9)


def test_frames_are_not_masked_by_samples():
    class Hearing(Giving):
        main_input_name = "input_values"

    module, x = Hearing(lambda y: {"logits": y}), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    masked, plain = (KL().outputs(module, {"x": x, **more}) for more in ({"attention_mask": mask}, {}))
    assert torch.equal(masked, plain)


def test_probabilities_are_compared_as_such():
    """A softmax of probabilities would hide the loss."""
    torch.manual_seed(0)
    old, new, x = nn.Linear(6, 4), nn.Linear(6, 4), torch.randn(9, 6)
    logits = KL().measure(new, [x], KL().reference(old, [x]))
    old, new = nn.Sequential(old, nn.Softmax(1)), nn.Sequential(new, nn.Softmax(1))
    torch.testing.assert_close(KL().measure(new, [x], KL().reference(old, [x])), logits, rtol=1e-4, atol=1e-7)


def test_probabilities_of_zero_have_gradients():
    logits = torch.tensor([[900.0, 0.0, -900.0], [0.0, 1.0, 2.0]], requires_grad=True)
    outputs = KL().read(logits.softmax(1), nn.Identity(), logits)
    (gradient,) = torch.autograd.grad(KL().probe(outputs, torch.Generator().manual_seed(0)), logits)
    assert bool(outputs.isfinite().all()) and bool(gradient.isfinite().all())


def test_images_have_their_classes_in_dimension_one():
    got, old, new = divergence(KL(), lambda y: {"logits": y.movedim(-1, 1)}, (2, 3, 5, 4))
    torch.testing.assert_close(got, kl(old, new).flatten(1).mean(1), rtol=1e-4, atol=1e-9)


def test_classes_without_a_chance_are_left_out():
    def make(y):
        return {"logits": torch.cat([y, torch.full_like(y[..., :1], float("-inf"))], -1)}

    got, old, new = divergence(KL(), make, (3, 4))
    torch.testing.assert_close(got, kl(old, new), rtol=1e-4, atol=1e-9)


def test_one_class_is_no_distribution():
    for make in (lambda y: {"logits": y}, lambda y: y):
        with pytest.raises(RequestError, match=r"two classes or more; fits: (cosine, )?squared"):
            KL().outputs(Giving(make, 1), {"x": torch.randn(3, 4)})


def test_embeddings_of_two_sides_count_alike():
    def make(y):
        return {"text_embeds": 3 * y[:, :2], "image_embeds": y[:, 2:], "logits_per_text": y @ y.t()}

    got, old, new = divergence(Cosine(), make, (5, 4))
    sides = [1 - nn.functional.cosine_similarity(old[:, part], new[:, part]) for part in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(got.float(), sum(sides) / 2, rtol=1e-3, atol=1e-7)


def test_sentence_embeddings_are_taken_as_they_are():
    got = Cosine("max").outputs(
        Giving(lambda y: {"sentence_embedding": y[:, 0], "last_hidden_state": y}), torch.randn(3, 2, 4)
    )
    assert got.shape == (3, 6)


def boxes(y):
    return {"loss": y.sum(), "logits": y, "levels": (100 * y[:, :2], [y[:, 0]]), "past_key_values": (y,)}


def test_tensors_of_a_tree_are_each_relative_to_themselves():
    got, old, new = divergence(Squared(), boxes, (5, 4))
    errors = []
    for part in (old, old[:, :2], old[:, :1]):
        error = (part - new[:, : part.shape[1]]).square()
        errors.append(error.sum(1) / part.square().sum(1).mean())
    torch.testing.assert_close(got.float(), sum(errors) / 3, rtol=1e-4, atol=0)


def test_padding_is_no_error():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    got, old, new = divergence(Squared(), lambda y: {"last_hidden_state": y}, (2, 3, 4), attention_mask=mask)
    old, new = ((states * mask[..., None]).flatten(1) for states in (old, new))
    torch.testing.assert_close(got.float(), (old - new).square().mean(1) / old.square().mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("wanted", "make", "width"),
    [
        (Squared(), boxes, 3),
        (KL(), lambda y: {"start_logits": y[:, :2], "end_logits": y[:, 1:]}, 3),
        (KL(), lambda y: {"prediction_logits": torch.stack([y, -y], 1), "other_logits": y[:, :2]}, 3),
        (Cosine(), lambda y: {"text_embeds": y, "image_embeds": y[:, :2]}, 3),
    ],
    ids=["tree", "answer", "heads", "sides"],
)
def test_probes_sample_the_curvature_of_every_kind_of_output(wanted, make, width):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 2), torch.randn(width, 2)
    module = nn.Module()
    module.forward = lambda x: make(x @ module.weight.t())

    def call(value):
        module.__dict__["weight"] = value
        return wanted.outputs(module, {"x": x})

    exact = curvature(wanted, module, weight, call).reshape(2 * width, 2 * width)
    live = weight.clone().requires_grad_(True)
    outputs, generator, draws = call(live), torch.Generator().manual_seed(0), 3000
    total = torch.zeros(2 * width, 2 * width, dtype=torch.float64)
    for _ in range(draws):
        (gradient,) = torch.autograd.grad(wanted.probe(outputs, generator), live, retain_graph=True)
        total += gradient.flatten().double()[:, None] * gradient.flatten().double()[None]
    assert float((total / draws - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda y: y, KL),
        (lambda y: torch.cat([y, y], 1).softmax(1).bfloat16(), KL),
        (lambda y: y[:, None], KL),
        (lambda y: y[:, :4], Squared),
        (lambda y: torch.cat([y, y], 1).sigmoid(), Squared),
        (lambda y: nn.functional.normalize(torch.cat([y, y], 1)).bfloat16(), Cosine),
        (lambda y: y[:, :1], Squared),
        (lambda y: y[:, 0], Squared),
        (lambda y: y[:, :, None, None], Squared),
        (lambda y: (y, y), Squared),
        (lambda y: {"out": y}, Squared),
        (lambda y: {"logits": y}, KL),
        (lambda y: SimpleNamespace(last_hidden_state=y), Cosine),
        (lambda y: {"sentence_embedding": y}, Cosine),
    ],
)
def test_outputs_have_an_objective_by_default(make, kind):
    from octavo.calibration.inputs import choose_objective
    from octavo.sources.source import from_module

    module = Giving(make).train()
    assert type(choose_objective(from_module(module), None, [torch.randn(3, 4)])) is kind
    assert module.training and type(choose_objective(from_module(module), "squared", [])) is Squared
