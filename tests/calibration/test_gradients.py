"""Sites that no layer multiplies with: recurrent weights, fused projections, experts, tables and weights read directly."""

import math

import pytest
import torch
import transformers as T
from torch import nn
from torch.nn import functional as F

import octavo
from octavo.calibration.calibrating import calibrate
from octavo.calibration.inmemory import replaced
from octavo.calibration.layers import is_layer, scale_of_table
from octavo.calibration.objective import objective
from octavo.errors import RequestError
from octavo.sources.source import from_module

WIDTH, LENGTH, EXAMPLES = 32, 6, 64


def gather(module, batches, name="squared", seed=0):
    source = from_module(module)
    sites, _ = source.sites()
    return calibrate(source, sites, batches, objective(name), seed=seed), {site.name: site for site in sites}


def sequences():
    return torch.randn(EXAMPLES, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


def vectors():
    return torch.randn(EXAMPLES, WIDTH, generator=torch.Generator().manual_seed(1))


def tokens():
    return torch.randint(0, 64, (EXAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))


class Recurrent(nn.Module):
    """The last state of a recurrent layer, with a head."""

    def __init__(self, kind, **options):
        super().__init__()
        self.inner = kind(WIDTH, WIDTH, batch_first=True, **options)
        self.head = nn.Linear(WIDTH * (2 if options.get("bidirectional") else 1), 16)

    def forward(self, x):
        return self.head(self.inner(x)[0].mean(1))


class Cell(nn.Module):
    def __init__(self, kind=nn.GRUCell):
        super().__init__()
        self.cell = kind(WIDTH, WIDTH)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(WIDTH, 4, batch_first=True), nn.Linear(WIDTH, 16)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(64, WIDTH, mode="mean"), nn.Linear(WIDTH, 16)

    def forward(self, x):
        return self.head(torch.tanh(4 * self.bag(x)))


class TwoRoles(nn.Module):
    """A table that is also the head."""

    def __init__(self):
        super().__init__()
        self.table, self.inner = nn.Embedding(64, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return F.linear(torch.tanh(self.inner(self.table(x).mean(1))), self.table.weight)


class Experts(nn.Module):
    """Four experts in one tensor, chosen by a router."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Parameter(torch.randn(4, WIDTH) / 4), nn.Parameter(torch.randn(4, WIDTH, WIDTH) / 6)
        self.down = nn.Parameter(torch.randn(4, WIDTH, 16) / 6)

    def forward(self, x):
        chosen = F.linear(x, self.gate).softmax(-1)
        each = torch.einsum("ni,eio->neo", x, self.up).relu()
        return torch.einsum("neo,eoc,ne->nc", each, self.down, chosen)


class Reading(nn.Module):
    """A layer of its own that reads ``self.weight``."""

    def __init__(self):
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6), nn.Linear(WIDTH, 16)

    def forward(self, x):
        return self.other(torch.tanh(x @ self.weight.t()))


class Subclass(nn.Module):
    """A linear layer that does more with its weight than to multiply."""

    class Normed(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)

    def __init__(self):
        super().__init__()
        self.inner, self.head = self.Normed(WIDTH, WIDTH), nn.Linear(WIDTH, 16)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x)))


MODELS = {
    "lstm": (lambda: Recurrent(nn.LSTM, num_layers=2), sequences),
    "lstm, both ways": (lambda: Recurrent(nn.LSTM, bidirectional=True), sequences),
    "gru": (lambda: Recurrent(nn.GRU), sequences),
    "rnn": (lambda: Recurrent(nn.RNN), sequences),
    "gru cell": (Cell, sequences),
    "lstm cell": (lambda: Cell(nn.LSTMCell), sequences),
    "attention": (Attention, sequences),
    "bag": (Bag, tokens),
    "table and head": (TwoRoles, tokens),
    "experts": (Experts, vectors),
    "reads its weight": (Reading, vectors),
    "subclass": (Subclass, vectors),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    torch.manual_seed(0)
    make, data = MODELS[request.param]
    module = make().eval()
    return module, data(), *gather(module, list(data().split(16)))


def test_every_site_has_evidence(case):
    module, _, found, sites = case
    assert set(found.evidence) == set(sites) and len(sites) >= 1
    assert {name for name, p in module.named_parameters() if p.numel() >= 512} <= set(sites)
    assert all(evidence.samples > 0 and evidence.columns is not None for evidence in found.evidence.values())
    assert not [warning for warning in found.warnings if "typical" in warning]


def ratio(module, x, evidence, site, name="squared", errors=8):
    """Predicted over measured loss of small random errors."""
    wanted = objective(name)
    reference = wanted.reference(module, [x])
    weight = module.state_dict()[site.name].clone()
    predicted = measured = 0.0
    for seed in range(errors):
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * weight.std() * 0.02
        predicted += evidence.loss(site.layout.to_matrix(noise))
        with replaced(module, {site.name: weight + noise}):
            measured += float(wanted.measure(module, [x], reference).mean())
    return predicted / measured


def test_evidence_tells_what_an_error_costs(case):
    module, x, found, sites = case
    for site in sites.values():
        assert 0.5 < ratio(module, x, found.evidence[site.name], site) < 2.5, site.name


class Direct(nn.Module):
    """Two linear layers, called as modules or read directly."""

    def __init__(self, hooked):
        super().__init__()
        torch.manual_seed(3)
        self.one, self.two, self.hooked = nn.Linear(WIDTH, 48), nn.Linear(48, 16), hooked

    def forward(self, x):
        if self.hooked:
            return self.two(torch.tanh(self.one(x)))
        return F.linear(torch.tanh(F.linear(x, self.one.weight, self.one.bias)), self.two.weight, self.two.bias)


@pytest.mark.parametrize("name", ["squared", "kl", "cosine"])
def test_gradients_of_weights_agree_with_watched_layers(name):
    x = vectors()
    (watched, sites), (read, _) = (gather(Direct(hooked), list(x.split(16)), name) for hooked in (True, False))
    for site in sites.values():
        one, other = watched.evidence[site.name], read.evidence[site.name]
        assert one.samples != other.samples
        for seed in range(3):
            error = torch.randn(site.rows, site.columns, generator=torch.Generator().manual_seed(seed))
            assert 0.5 < other.loss(error) / one.loss(error) < 2
        # Not by the sum alone: the most important rows are the same ones.
        assert torch.corrcoef(torch.stack([one.rows, other.rows]))[0, 1] > 0.8


def test_a_layer_that_is_also_read_has_both_uses():
    """Neither use is counted twice: the whole is the sum of both."""

    class Both(nn.Module):
        def __init__(self, called=True, read=True):
            super().__init__()
            torch.manual_seed(3)
            self.layer, self.called, self.read = nn.Linear(WIDTH, WIDTH, bias=False), called, read

        def forward(self, x):
            one, other = x[:, :WIDTH], x[:, WIDTH:]
            constant = self.layer.weight.detach().clone()
            first = self.layer(one) if self.called else F.linear(one, constant)
            second = F.linear(other, self.layer.weight if self.read else constant)
            return torch.cat([first, second], 1)

    x = torch.randn(EXAMPLES, 2 * WIDTH, generator=torch.Generator().manual_seed(1))
    losses = {}
    error = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    for uses in ((True, True), (True, False), (False, True)):
        found, _ = gather(Both(*uses), list(x.split(16)))
        losses[uses] = found.evidence["layer.weight"].loss(error)
    assert len(gather(Both(), list(x.split(16)))[0].evidence["layer.weight"].terms) == 2
    assert losses[True, True] == pytest.approx(losses[True, False] + losses[False, True], rel=0.1)


@pytest.mark.parametrize("name", ["table and head", "experts", "lstm"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_module_is_left_as_it_was(name, fails):
    torch.manual_seed(0)
    make, data = MODELS[name]
    module = make().train()
    frozen, graded = list(module.parameters())[:2]
    frozen.requires_grad_(False)
    graded.grad = torch.ones_like(graded)
    wanted = {n: p.requires_grad for n, p in module.named_parameters()}
    before = {n: (id(p), p.detach().clone()) for n, p in module.named_parameters()}
    calls = 0

    def fail(*_):
        nonlocal calls
        calls += 1
        if fails and calls > 3:
            raise KeyError("in the model")

    handle = list(module.modules())[-1].register_forward_hook(fail) if list(module.children()) else None
    handle = handle or module.register_forward_hook(fail)
    if fails:
        with pytest.raises((RequestError, KeyError), match="in the model"):
            gather(module, list(data().split(16)))
    else:
        gather(module, list(data().split(16)))
    handle.remove()
    assert module.training and {n: p.requires_grad for n, p in module.named_parameters()} == wanted
    assert all(id(p) == before[n][0] and torch.equal(p, before[n][1]) for n, p in module.named_parameters())
    assert torch.equal(graded.grad, torch.ones_like(graded))
    assert all(p.grad is None for p in module.parameters() if p is not graded)
    assert not any(p._post_accumulate_grad_hooks for p in module.parameters())
    for child in module.modules():
        assert not child._forward_hooks and not child._forward_pre_hooks


class Scaled(nn.Embedding):
    """Gemma, BART and T5 relatives multiply their table."""

    def forward(self, tokens):
        return super().forward(tokens) * math.sqrt(self.embedding_dim)


class Positions(nn.Embedding):
    """OPT and BART learn positions, which are worked out from a mask or a length."""

    def forward(self, mask):
        return super().forward(mask.long().cumsum(1))


class Shifted(nn.Embedding):
    """BART's have an offset."""

    def forward(self, tokens):
        return super().forward(torch.arange(tokens.shape[1]).expand(len(tokens), -1) + 2)


class Normed(nn.Embedding):
    def forward(self, tokens):
        return F.normalize(super().forward(tokens), dim=-1)


def test_tables_are_known_by_what_they_give():
    torch.manual_seed(0)
    x = tokens()
    assert scale_of_table(nn.Embedding(64, WIDTH), (x,), {}) == pytest.approx(1)
    assert scale_of_table(Scaled(64, WIDTH), (), {"tokens": x}) == pytest.approx(math.sqrt(WIDTH))
    for kind, given in ((Positions, torch.ones_like(x)), (Shifted, x), (Normed, x)):
        assert scale_of_table(kind(64, WIDTH), (given,), {}) is None
    assert scale_of_table(nn.Embedding(64, WIDTH), (x > 3,), {}) is None
    assert is_layer(Scaled(64, WIDTH), "weight") and not is_layer(Subclass().inner, "weight")


class Embedded(nn.Module):
    def __init__(self, kind, scale=1.0):
        super().__init__()
        torch.manual_seed(3)
        self.table, self.places, self.head = kind(64, WIDTH), Positions(64, WIDTH), nn.Linear(WIDTH, 16)
        with torch.no_grad():
            self.table.weight.mul_(scale)

    def forward(self, input_ids, attention_mask):
        return self.head(torch.tanh(self.table(input_ids) + self.places(attention_mask)).mean(1))


def test_a_scaled_table_is_watched_as_one():
    """Its evidence is that of a table with larger rows, seen from where the rows are."""
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in tokens().split(16)]
    found, sites = gather(Embedded(Scaled), batches)
    plain, _ = gather(Embedded(nn.Embedding, math.sqrt(WIDTH)), batches)
    one, other = found.evidence["table.weight"], plain.evidence["table.weight"]
    assert sites["table.weight"].kind == "embedding" and one.samples == other.samples == EXAMPLES * LENGTH
    torch.testing.assert_close(one.rows, other.rows)
    torch.testing.assert_close(one.columns, WIDTH * other.columns, rtol=1e-4, atol=1e-6)


def test_learned_positions_are_weighed_by_their_gradients():
    """They are no table of tokens: their first argument counts nothing."""
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in tokens().split(16)]
    module = Embedded(nn.Embedding)
    found, _ = gather(module, batches)
    rows = found.evidence["places.weight"].rows
    used = torch.zeros(64, dtype=torch.bool)
    used[1 : LENGTH + 1] = True
    # Those that were not met count less, but are not lost.
    assert rows[used].mean() / 12 < rows[~used].min() and rows[~used].max() < rows[used].mean() / 2
    assert not [warning for warning in found.warnings if "typical" in warning]


PAIRED = {
    "vocab_size": 64, "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "scale_embedding": True, "init_std": 0.2,
}  # fmt: skip
OPT = {
    "vocab_size": 64, "hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "max_position_embeddings": 64, "init_std": 0.2,
}  # fmt: skip
WHISPER = {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 16}


def both_sides():
    return {"input_ids": tokens(), "decoder_input_ids": tokens()[:, :4]}


def heard():
    return {"input_features": torch.randn(EXAMPLES, 16, 40), "decoder_input_ids": tokens()[:, :4]}


#: Positions that are met, by the names of their tables.
LEARNED = {
    "opt": (
        lambda: T.OPTForCausalLM(T.OPTConfig(**OPT)),
        lambda: {"input_ids": tokens()},
        {"model.decoder.embed_positions.weight": range(2, 2 + LENGTH)},
    ),
    "bart": (
        lambda: T.BartForConditionalGeneration(T.BartConfig(**PAIRED, max_position_embeddings=32)),
        both_sides,
        {
            "model.encoder.embed_positions.weight": range(2, 2 + LENGTH),
            "model.decoder.embed_positions.weight": range(2, 6),
        },
    ),
    "whisper": (
        lambda: T.WhisperForConditionalGeneration(T.WhisperConfig(**PAIRED, **WHISPER)),
        heard,
        {"model.decoder.embed_positions.weight": range(4)},
    ),
}


@pytest.mark.parametrize("name", LEARNED)
def test_learned_positions_of_transformers(name):
    torch.manual_seed(0)
    make, batch, places = LEARNED[name]
    few = [{key: value[at : at + 8] for key, value in batch().items()} for at in range(0, 32, 8)]
    found, sites = gather(make().eval(), few, "kl")
    assert set(found.evidence) == set(sites) and not [warning for warning in found.warnings if "typical" in warning]
    for table, met in places.items():
        rows = found.evidence[table].rows
        used = torch.zeros(len(rows), dtype=torch.bool)
        used[list(met)] = True
        assert rows[used].mean() / 12 < rows[~used].min() and rows[~used].max() < rows[used].mean() / 2
    # The table of tokens is a head, too, and every use is seen.
    (tokens_of,) = (site for site in sites.values() if site.kind == "embedding" and "positions" not in site.name)
    assert len(found.evidence[tokens_of.name].terms) >= 2


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_recurrent_plan_is_no_worse_than_plain_rounding(kind, tmp_path):
    torch.manual_seed(0)
    module, x = MODELS[kind][0]().eval(), sequences()
    ratio = 6
    one = octavo.compress(module, ratio=ratio, data=list(x.split(16)), objective="squared", preset="fast")
    plain = octavo.compress(
        module, ratio=ratio, data=list(x.split(16)), objective="squared", preset="fast", methods=["rtn"]
    )
    assert one.built.bytes <= one.budget.bytes and plain.built.bytes <= plain.budget.bytes
    assert (
        one.save(tmp_path / "one", report=False)["quality"]["value"]
        <= 1.02 * plain.save(tmp_path / "two")["quality"]["value"]
    )
