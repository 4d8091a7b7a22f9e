"""Evidence: the moments are those of the data, and predict what an error costs."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from octavo.calibration.calibrating import MINIMUM_SEQUENCES, calibrate, data_free
from octavo.calibration.inmemory import replaced
from octavo.calibration.objective import objective
from octavo.calibration.watches import DAMPING
from octavo.errors import RequestError
from octavo.sources.source import from_module


def gather(module, batches, name="squared", seed=0):
    source = from_module(module)
    sites, _ = source.sites()
    return calibrate(source, sites, batches, objective(name), seed=seed), {site.name: site for site in sites}


def damped(moment):
    return moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def close(got, expected):
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-4, atol=1e-6)


class Encoder(nn.Module):
    """An embedding, a token-wise layer and a head, with padding by mask."""

    def __init__(self, words=40, width=24, projection=nn.Linear):
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.inner = projection(width, 32) if projection is nn.Linear else projection(32, width)
        self.last = nn.Linear(32, width)

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(last_hidden_state=self.last(torch.tanh(self.inner(self.table(input_ids)))))


def texts(count=12, length=7, words=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, words, (count, length), generator=generator)
    lengths = torch.randint(2, length + 1, (count, 1), generator=generator)
    return {"input_ids": tokens, "attention_mask": (torch.arange(length) < lengths).long()}


@pytest.mark.parametrize("projection", [nn.Linear, Conv1D])
def test_moments_of_a_layer_leave_padding_out(projection):
    torch.manual_seed(0)
    module, batches = Encoder(projection=projection), [texts(seed=0), texts(seed=1, length=5)]
    found, _ = gather(module, batches, "cosine")
    live = torch.cat([module.table(b["input_ids"])[b["attention_mask"].bool()] for b in batches]).detach().double()
    evidence = found.evidence["inner.weight"]
    close(evidence.columns, damped(live.T @ live / len(live)))
    assert evidence.samples == len(live) == found.tokens
    assert found.sequences == 24


def test_padding_of_other_length_and_content_gives_the_same_evidence():
    torch.manual_seed(0)
    module, batch = Encoder(), texts()
    tokens = batch["input_ids"].where(batch["attention_mask"].bool(), torch.tensor(0))
    longer = {
        "input_ids": nn.functional.pad(tokens, (0, 4), value=9),
        "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 4)),
    }
    one, two = (gather(module, [b], "cosine")[0].evidence for b in (batch, longer))
    for name in one:
        close(one[name].columns, two[name].columns)
        close(one[name].rows, two[name].rows)


def test_the_gradients_of_the_rows_are_those_of_the_probe():
    torch.manual_seed(0)
    module, x = nn.Linear(24, 32), torch.randn(16, 24)
    found, _ = gather(module, [x], "squared", seed=3)
    wanted, y = objective("squared"), module(x).detach().requires_grad_(True)
    wanted.probe(y.float(), torch.Generator().manual_seed(3)).backward()
    squares = y.grad.square().sum(0) / len(x)
    close(found.evidence["weight"].rows, squares + DAMPING * squares.mean())


@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (9, 8, 7, 6)),
        (lambda: nn.Conv2d(8, 12, (3, 5), dilation=2, padding=(2, 4)), (9, 8, 7, 9)),
        (lambda: nn.Conv2d(8, 12, 3, padding="same"), (9, 8, 7, 6)),
        (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"), (9, 8, 7, 6)),
        (lambda: nn.Conv2d(16, 24, 3, groups=4), (9, 16, 6, 6)),
        (lambda: nn.Conv1d(12, 20, 5, stride=2, padding=2), (9, 12, 9)),
        (lambda: nn.Conv3d(4, 8, 3, padding=1, stride=(1, 2, 1)), (9, 4, 4, 5, 6)),
    ],
    ids=["2d", "dilated", "same", "circular", "grouped", "1d", "3d"],
)
def test_moments_of_a_convolution_are_those_of_its_patches(make, shape):
    torch.manual_seed(0)
    module, x = make(), torch.randn(shape)
    found, sites = gather(module, [x])
    site = sites["weight"]
    # Patches, without unfold: what reaches an output of a convolution whose kernel is one weight.
    reach = math.prod(site.shape[1:])
    probe = make()
    units = torch.eye(reach).reshape(reach, *site.shape[1:])
    per_group = []
    for group in range(module.groups):
        inside = slice(group * site.shape[1], (group + 1) * site.shape[1])
        probe.groups, probe.in_channels = 1, site.shape[1]
        with torch.no_grad():
            probe.weight, probe.bias = nn.Parameter(units), None
            per_group.append(probe(x[:, inside]).movedim(1, -1).reshape(-1, reach))
    patches = torch.cat(per_group).double()
    close(found.evidence["weight"].columns, damped(patches.T @ patches / len(patches)))


def test_parallel_convolutions_over_one_input_have_moments_of_their_own():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(16, 16, 3, padding=1)
            self.tall = nn.Conv2d(16, 16, (3, 1), padding=(1, 0))
            self.wide = nn.Conv2d(16, 16, (1, 3), padding=(0, 1))
            self.far = nn.Conv2d(16, 16, (1, 3), padding=(0, 2), dilation=2)

        def forward(self, x):
            x = self.stem(x)
            return torch.cat([branch(x) for branch in (self.tall, self.wide, self.far)], 1)

    torch.manual_seed(0)
    x = torch.randn(8, 16, 6, 6).cumsum(-1)
    module = Branches()
    together, _ = gather(module, [x])
    for name in ("tall", "wide", "far"):
        alone, _ = gather(getattr(module, name), [module.stem(x).detach()])
        close(together.evidence[f"{name}.weight"].columns, alone.evidence["weight"].columns)


def test_an_input_changed_in_place_is_another_input():
    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.two = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x):
            x = self.stem(x)
            y = self.one(x)
            return y + self.two(x.relu_())

    torch.manual_seed(0)
    module, x = Careless(), torch.randn(16, 24)
    found, _ = gather(module, [x])
    x = module.stem(x).detach()
    rectified = x.relu().double()
    close(found.evidence["two.weight"].columns, damped(rectified.T @ rectified / len(x)))
    close(found.evidence["one.weight"].columns, damped(x.double().T @ x.double() / len(x)))


def test_one_hot_inputs_of_two_layers_are_told_apart():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(24, 32), nn.Linear(24, 32)

        def forward(self, a, b):
            return self.one(a) + self.two(b)

    a, b = torch.eye(24)[torch.arange(16) % 5], torch.eye(24)[torch.arange(16) % 7 + 5]
    found, _ = gather(Wide(), [(a, b)])
    close(found.evidence["one.weight"].columns, damped(a.double().T @ a.double() / 16))
    close(found.evidence["two.weight"].columns, damped(b.double().T @ b.double() / 16))


def test_a_mask_of_tokens_is_not_laid_over_channels():
    class Channels(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(12, 12, 5, padding=2)

        def forward(self, x, attention_mask):
            return self.conv(x)

    torch.manual_seed(0)
    module, x = Channels(), torch.randn(8, 12, 12)
    mask = (torch.arange(12) < 6).long().expand(8, 12)
    found, _ = gather(module, [{"x": x, "attention_mask": mask}])
    alone, _ = gather(module.conv, [x])
    close(found.evidence["conv.weight"].columns, alone.evidence["weight"].columns)


def test_an_embedding_counts_its_tokens():
    torch.manual_seed(0)
    module, batch = Encoder(words=900), texts()
    found, _ = gather(module, [batch], "cosine")
    evidence = found.evidence["table.weight"]
    counts = torch.bincount(batch["input_ids"][batch["attention_mask"].bool()], minlength=900)
    assert evidence.samples == int(counts.sum())
    seen = counts > 0
    order = counts[seen].argsort(stable=True)
    assert bool((evidence.rows[seen][order].diff() >= 0).all())
    assert float(evidence.rows[~seen].max()) <= float(evidence.rows[seen].min())
    assert float(evidence.rows.min()) > 0
    for count in counts.unique():
        assert len(evidence.rows[counts == count].unique()) == 1


def test_query_key_and_value_share_one_moment():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value, self.out = (nn.Linear(24, 24) for _ in range(4))

        def forward(self, x):
            q, k, v = self.query(x), self.key(x), self.value(x)
            return self.out((q @ k.transpose(1, 2)).softmax(-1) @ v)

    torch.manual_seed(0)
    found, _ = gather(Attention(), [torch.randn(8, 6, 24)])
    columns = {name: id(evidence.columns) for name, evidence in found.evidence.items()}
    assert columns["query.weight"] == columns["key.weight"] == columns["value.weight"] != columns["out.weight"]
    rows = [found.evidence[f"{name}.weight"].rows for name in ("query", "key", "value")]
    assert not torch.allclose(rows[0], rows[1]) and not torch.allclose(rows[1], rows[2])


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(1, 16, 3, padding=1)
        self.two = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(32, 8, 3, stride=2)
        self.head = nn.Linear(8 * 9 * 9, 10)

    def forward(self, x):
        x = torch.relu(self.two(torch.relu(self.one(x))))
        return self.head(torch.relu(self.up(torch.relu(self.grouped(x)))).flatten(1))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(24, 48), nn.Linear(48, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


def trained(module, x, targets, steps=60):
    """A few steps of training, so that weights and gradients have some structure."""
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = module(x)
        loss = nn.functional.cross_entropy(outputs, targets % outputs.shape[1])
        loss.backward()
        optimizer.step()
    return module.eval().requires_grad_(True)


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    x = torch.randn(256, 24) @ torch.randn(24, 24) / 5
    targets = x[:, :4].abs().argmax(1) + 4 * (x[:, 5] > 0).long()
    return trained(Plain(), x, targets), x


@pytest.fixture(scope="module")
def convolutions():
    torch.manual_seed(0)
    x = torch.randn(128, 1, 8, 8)
    targets = nn.functional.avg_pool2d(x, 4).flatten(1).argmax(1)
    return trained(Convolutions(), x, targets, 30), x


def ratios(module, x, name, size=0.02, errors=6):
    """Predicted over measured loss of random errors of every site."""
    wanted = objective(name)
    found, sites = gather(module, list(x.split(32)), name)
    reference = wanted.reference(module, [x])
    result = {}
    for site in sites.values():
        weight = module.state_dict()[site.name].clone()
        predicted = measured = 0.0
        for seed in range(errors):
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * weight.std() * size
            predicted += found.evidence[site.name].loss(site.layout.to_matrix(noise))
            with replaced(module, {site.name: weight + noise}):
                measured += float(wanted.measure(module, [x], reference).mean())
        result[site.name] = predicted / measured
    return result


@pytest.mark.parametrize("name", ["cosine", "kl", "squared"])
def test_evidence_predicts_the_loss_of_linear_layers(name, plain):
    for site, ratio in ratios(*plain, name).items():
        assert 0.5 < ratio < 2, site


@pytest.mark.parametrize("name", ["cosine", "kl"])
def test_evidence_predicts_the_loss_of_convolutions(name, convolutions):
    for site, ratio in ratios(*convolutions, name).items():
        assert 0.5 < ratio < 2, site


def test_evidence_of_convolutions_takes_positions_for_independent(convolutions):
    # Raw outputs move with the mean of a feature map, to which all positions add up alike: the factors, which take them
    # for independent, see too little of it, by no more than the number of positions. Measured plans make up for it.
    for site, ratio in ratios(*convolutions, "squared").items():
        assert 1 / 16 < ratio < 2, site


def test_loss_is_quadratic_in_the_error(plain):
    module, x = plain
    found, _ = gather(module, [x], "kl")
    error = torch.randn(48, 24)
    evidence = found.evidence["one.weight"]
    assert evidence.loss(3 * error) == pytest.approx(9 * evidence.loss(error), rel=1e-5)
    by_hand = sum(
        float(r * (e.double() @ evidence.columns.double() @ e.double()))
        for r, e in zip(evidence.rows, error, strict=True)
    )
    assert evidence.loss(error) == pytest.approx(by_hand / 2, rel=1e-4)
    assert evidence.loss(torch.zeros(48, 24)) == 0


def test_seeds_reproduce(plain):
    module, x = plain
    one, again, other = (gather(module, [x], "kl", seed=seed)[0].evidence for seed in (0, 0, 1))
    for name in one:
        assert torch.equal(one[name].rows, again[name].rows) and torch.equal(one[name].columns, again[name].columns)
        assert not torch.equal(one[name].rows, other[name].rows)


def test_too_little_data_is_said_and_still_serves():
    torch.manual_seed(0)
    found, _ = gather(nn.Linear(128, 8), [torch.randn(MINIMUM_SEQUENCES, 128)])
    (warning,) = found.warnings
    assert "weight" in warning and "fewer calibration positions than input columns (8 for 128)" in warning
    assert float(torch.linalg.eigvalsh(found.evidence["weight"].columns.double()).min()) > 0


def test_fewer_sequences_than_eight_are_refused():
    with pytest.raises(RequestError, match="7 sequences for calibration; at least 8"):
        gather(nn.Linear(32, 32), [torch.randn(4, 32), torch.randn(3, 32)])


def test_a_site_that_no_output_depends_on_weighs_as_a_typical_one():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.also, self.idle, self.ignored = (nn.Linear(32, 32) for _ in range(4))

        def forward(self, x):
            self.ignored(x)
            return self.also(self.used(x))

    torch.manual_seed(0)
    module = Idle()
    found, sites = gather(module, [torch.randn(16, 32)])
    whole = {
        name: found.evidence[name].loss(site.layout.to_matrix(module.state_dict()[name]))
        for name, site in sites.items()
    }
    low, high = sorted((whole["used.weight"], whole["also.weight"]))
    for name in ("idle.weight", "ignored.weight"):
        assert found.evidence[name].columns is None
        assert low * 0.999 <= whole[name] <= high * 1.001
        assert any(name in warning for warning in found.warnings)


def test_weights_used_without_a_module_call_do_not_stop_calibration():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
            self.recurrent = nn.LSTM(32, 16, batch_first=True)
            self.pair = nn.Bilinear(16, 16, 8)
            self.head = nn.Linear(8, 64)

        def forward(self, x):
            x = self.attention(x, x, x, need_weights=False)[0]
            x = self.recurrent(x)[0][:, -1]
            return self.head(self.pair(x, x))

    found, sites = gather(Model(), [torch.randn(8, 5, 32)])
    assert set(found.evidence) == set(sites)
    assert found.evidence["head.weight"].columns is not None
    for name in ("attention.in_proj_weight", "recurrent.weight_ih_l0", "pair.weight"):
        assert found.evidence[name].loss(torch.ones(sites[name].rows, sites[name].columns)) > 0
        assert not any(name in warning for warning in found.warnings)


def test_the_fused_path_of_a_transformer_layer_is_seen():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    found, _ = gather(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), [torch.randn(8, 5, 32)])
    for name in ("layers.0.linear1.weight", "layers.1.linear2.weight"):
        assert found.evidence[name].columns is not None


def test_models_that_work_in_place_are_calibrated():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.inner, self.head = nn.Embedding(40, 24), nn.Linear(24, 24), nn.Linear(24, 32)

        def forward(self, tokens):
            x = self.table(tokens)
            x += torch.ones(24)
            x = torch.relu_(self.inner(x))
            return self.head(x.mean(1))

    torch.manual_seed(0)
    module, tokens = InPlace(), texts()["input_ids"]
    found, _ = gather(module, [tokens])
    assert all(evidence.columns is not None for evidence in found.evidence.values())
    inputs = (module.table.weight[tokens] + 1).detach().flatten(0, 1).double()
    close(found.evidence["inner.weight"].columns, damped(inputs.T @ inputs / len(inputs)))


def test_without_sites_there_is_no_evidence():
    found, _ = gather(nn.Linear(4, 4), [torch.randn(8, 4)])
    assert found.evidence == {}


def test_without_data_every_weight_counts_the_same():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 96))
    module[1].weight.data *= 100
    source = from_module(module)
    sites, _ = source.sites()
    found = data_free(source, sites)
    losses = {s.name: found.evidence[s.name].loss(source.read(s.name)) for s in sites}
    # All energy lost at a site costs its share of the weights.
    assert losses["0.weight"] == pytest.approx(0.25, rel=1e-4) and losses["1.weight"] == pytest.approx(0.75, rel=1e-4)
    source.module = None
    calibrated = calibrate(source, sites, [], objective("kl"))
    assert all(torch.equal(calibrated.evidence[s.name].rows, found.evidence[s.name].rows) for s in sites)
    assert all(e.columns is None and e.samples == 0 for e in calibrated.evidence.values())


class Boom(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.frozen, self.drop = nn.Linear(24, 32), nn.Linear(32, 32), nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(32)
        self.fail = False
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = self.frozen(self.norm(self.drop(self.one(x))))
        if self.fail:
            raise KeyError("in the model")
        return x


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_as_it_was(fail):
    torch.manual_seed(0)
    module = Boom()
    module.train()
    module.norm.eval()
    module.fail = fail
    before = {name: value.clone() for name, value in module.state_dict().items()}
    training = {name: child.training for name, child in module.named_modules()}
    wanted = {name: p.requires_grad for name, p in module.named_parameters()}
    if fail:
        with pytest.raises(RequestError, match="in the model"):
            gather(module, [torch.randn(16, 24)])
    else:
        gather(module, [torch.randn(16, 24)])
    assert {name: child.training for name, child in module.named_modules()} == training
    assert {name: p.requires_grad for name, p in module.named_parameters()} == wanted
    assert all(p.grad is None for p in module.parameters())
    for child in module.modules():
        assert not child._forward_hooks and not child._forward_pre_hooks and not child._backward_hooks
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


class Unplaceable:
    """A tensor for which there is no memory."""

    def to(self, **_):
        raise MemoryError


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("frozen.bias", Unplaceable(), MemoryError),
        ("none", torch.zeros(2), KeyError),
        ("one.bias", torch.zeros(32), OSError),
    ],
)
def test_replaced_tensors_come_back_whatever_fails(name, value, error):
    module = Boom().train()
    module.norm.eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    training = [part.training for part in module.modules()]
    with pytest.raises(error), replaced(module, {"one.weight": torch.zeros(32, 24), name: value}) as old:
        assert not module.training and torch.equal(old["one.weight"], before["one.weight"])
        raise OSError
    assert [part.training for part in module.modules()] == training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_outputs_that_are_not_finite_are_refused():
    module = nn.Linear(32, 32)
    x = torch.randn(16, 32)
    x[3, 4] = math.inf
    with pytest.raises(RequestError, match="batch 1 are not finite"):
        gather(module, [torch.randn(8, 32), x])


def test_calibration_is_not_noticed_by_dropout_or_the_global_seed():
    torch.manual_seed(0)
    module, x = Boom(), torch.randn(16, 24)
    torch.manual_seed(1)
    one, _ = gather(module, [x])
    state = torch.get_rng_state()
    torch.manual_seed(2)
    two, _ = gather(module, [x])
    for name in one.evidence:
        assert torch.equal(one.evidence[name].rows, two.evidence[name].rows)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
