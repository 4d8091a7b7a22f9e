"""MoDeGPT: every identity it rests on, and that a cut model computes what the smaller one would."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from octavo.cuts.decoder import blocks, observe
from octavo.cuts.decomposition import (
    LIMIT,
    TYPES,
    allocate,
    decompose,
    leverage,
    pairs,
    refitted,
    value_bases,
)
from octavo.errors import RequestError
from octavo.forms import Trimmed
from octavo.recipes.frame import through_file

transformers = pytest.importorskip("transformers")


def decoder(kind="Llama", *, heads=4, shared=2, bias=False, seed=0):
    torch.manual_seed(seed)
    more = {"attention_bias": bias, "mlp_bias": bias} if kind == "Llama" else {}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=shared, max_position_embeddings=64, initializer_range=0.2, **more,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


TOKENS = torch.randint(0, 64, (12, 16), generator=torch.Generator().manual_seed(1))
BATCHES = [{"input_ids": part} for part in TOKENS.split(4)]


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


def moment(size, rank=None, seed=0):
    flow = torch.randn(200, rank or size, generator=torch.Generator().manual_seed(seed)).double()
    if rank is not None:
        flow = flow @ torch.randn(rank, size, generator=torch.Generator().manual_seed(seed + 1)).double()
    return flow.t() @ flow / len(flow)


def test_leverage_is_the_diagonal_of_the_ridge_projection():
    c = moment(12)
    added = 0.1 * c.diagonal().mean()
    expected = (c @ torch.linalg.inv(c + added * torch.eye(12, dtype=torch.float64))).diagonal()
    assert torch.allclose(leverage(c, 0.1), expected)
    assert bool((expected > 0).all()) and bool((expected < 1).all())


def test_what_is_kept_makes_up_for_the_rest():
    c, weight = moment(20, rank=10) + 0.01 * moment(20, seed=3), torch.randn(8, 20)
    kept = torch.zeros(20, dtype=torch.bool)
    kept[leverage(c, 1e-4).topk(12).indices] = True

    def cost(inner):
        error = weight.double().clone()
        error[:, kept] -= inner.double()
        return float(((error @ c) * error).sum())

    refit = refitted(weight, c, kept, 1e-8)
    assert cost(refit) < cost(weight[:, kept]) / 2
    nudged = refit + 1e-3 * torch.randn(refit.shape, dtype=torch.float64)
    assert cost(refit) < cost(nudged), "it is the least of all"
    assert torch.allclose(refitted(weight, c, torch.ones(20, dtype=torch.bool), 1e-2), weight.double())


def test_scores_of_queries_and_keys_need_only_diagonals():
    c = moment(6)
    values, vectors = torch.linalg.eigh(c)
    root = vectors @ values.sqrt().diag() @ vectors.t()
    assert torch.allclose(root.norm(dim=0) ** 2, c.diagonal())


def test_rotated_pairs_stay_together_and_groups_decide_as_one():
    queries = torch.tensor([[9.0, 0, 0, 0, 0, 0, 4, 0], [0, 0, 0, 5, 0, 0, 4, 1]])
    keys = torch.tensor([[1.0, 1, 1, 1, 1, 1, 1, 1]])
    # Pairs are (0, 4), (1, 5), (2, 6), (3, 7); their sums over the group are 3, 0, 4 and sqrt(6).
    assert pairs(queries, keys, 1).nonzero()[:, 1].tolist() == [2, 6]
    assert pairs(queries, keys, 2).nonzero()[:, 1].tolist() == [0, 2, 4, 6]
    # A rotation moves energy inside a pair, and changes nothing.
    assert torch.equal(pairs(queries.roll(4, 1), keys, 2), pairs(queries, keys, 2))


def test_values_and_output_are_the_best_product_of_their_rank():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(300, 24, generator=generator).double() @ torch.randn(24, 24, generator=generator).double()
    value = torch.randn(8, 24, generator=generator).double()
    output = torch.randn(24, 8, generator=generator).double()
    flow = x @ value.t()
    for rank in (1, 3, 8):
        (left,), right = value_bases(output[:, None], flow.t() @ flow / 300, rank, 0.0)
        u, s, v = torch.linalg.svd(x @ (output @ value).t(), full_matrices=False)
        best = u[:, :rank] * s[:rank] @ v[:rank]
        found = x @ (left @ right @ value).t()
        assert torch.allclose(found, best, atol=1e-4 * float(best.abs().max()))


def test_heads_that_share_values_share_the_basis_that_costs_them_least_together():
    c, outputs = moment(8), torch.randn(16, 3, 8, dtype=torch.float64)
    outputs[:, :, 4:] *= 0.05
    lefts, right = value_bases(outputs, c, 5, 0.0)

    def cost(parts):
        errors = [outputs[:, member] - part for member, part in enumerate(parts)]
        return sum(float(((error @ c) * error).sum()) for error in errors)

    root = torch.linalg.cholesky(c)
    values = torch.linalg.svdvals(torch.cat([outputs[:, member] for member in range(3)]) @ root)
    found = cost([left @ right for left in lefts])
    assert found == pytest.approx(float(values[5:].square().sum()), rel=1e-4), "the least of all bases"
    # A basis of what varies most knows nothing of what is read.
    basis = torch.linalg.eigh(c).eigenvectors[:, -5:]
    assert found < cost([outputs[:, member] @ basis @ basis.t() for member in range(3)]) / 2


def test_moments_of_rank_one_and_of_zeros_are_cut_too():
    c = torch.ones(6, 6, dtype=torch.float64)
    assert bool(torch.isfinite(refitted(torch.randn(4, 6), c, torch.arange(6) < 2, 1e-4)).all())
    for bad in (c, torch.zeros(6, 6, dtype=torch.float64)):
        lefts, right = value_bases(torch.randn(4, 2, 6).double(), bad, 3, 1e-4)
        assert 1 <= len(right) <= 3 and all(bool(torch.isfinite(left).all()) for left in lefts)
    model = decoder()
    nothing = [
        replace(seen, **{name: getattr(seen, name) * 0 for name in ("queries", "keys", "values", "neurons")})
        for seen in observe(model, BATCHES)
    ]
    cut = decompose(model, nothing, [0.5, 0.5]).load(model)
    assert bool(torch.isfinite(logits(cut)).all())


@pytest.mark.parametrize(
    ("kind", "heads", "shared", "bias"),
    [
        ("Llama", 4, 4, False),
        ("Llama", 4, 2, True),
        ("Llama", 4, 4, True),
        ("Qwen2", 4, 2, True),
        ("Mistral", 4, 1, False),
    ],
)
def test_a_cut_model_computes_what_the_sliced_one_would(kind, heads, shared, bias):
    model = decoder(kind, heads=heads, shared=shared, bias=bias)
    found = decompose(model, observe(model, BATCHES), [0.4, 0.6])
    assert all(isinstance(form, Trimmed) for form in found.forms.values()) and len(found.forms) == 14
    cut = found.load(copy.deepcopy(model))
    expected = logits(cut)
    # The same blocks, computed from the small matrices alone.
    for block in blocks(cut):
        block.module.self_attn.forward = Sliced(block, found).forward
        block.module.mlp.forward = lambda x, block=block: sliced_mlp(block, found, x)
    assert torch.allclose(logits(cut), expected, atol=1e-5)
    assert (expected - logits(model)).norm() < logits(model).norm()


class Sliced:
    """Attention on tensors of the kept dimensions; heads may keep different pairs."""

    def __init__(self, block, found):
        self.block, self.found, self.name = block, found, f"{block.name}.self_attn"

    def small(self, x, name):
        form = self.found.forms[f"{self.name}.{name}_proj.weight"]
        bias = self.block.linear(f"self_attn.{name}_proj").bias
        out = x @ form.inner.dense().t()
        return (out if bias is None else out + bias[form.rows]), form.rows.view(-1, self.block.size)

    def forward(self, hidden_states, position_embeddings, **_):
        cosines, sines = position_embeddings
        (queries, turned), (keys, shared), (values, held) = (self.small(hidden_states, name) for name in "qkv")
        out = []
        for head in range(self.block.heads):
            group, kept = head // self.block.group, turned[head]
            assert torch.equal(kept, shared[group]) and int(kept.sum()) % 2 == 0
            width, depth = int(kept.sum()), int(held[group].sum())
            q = queries[..., head * width : (head + 1) * width]
            k, v = keys[..., group * width : (group + 1) * width], values[..., group * depth : (group + 1) * depth]
            q, k = (self.rotated(part, cosines[..., kept], sines[..., kept]) for part in (q, k))
            scores = q @ k.transpose(1, 2) * self.block.size**-0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
            out.append(scores.softmax(-1) @ v)
        output = self.block.linear("self_attn.o_proj")
        made = torch.cat(out, -1) @ self.found.forms[f"{self.name}.o_proj.weight"].inner.dense().t()
        return (made if output.bias is None else made + output.bias), None

    @staticmethod
    def rotated(x, cosines, sines):
        a, b = x.chunk(2, -1)
        return x * cosines + torch.cat([-b, a], -1) * sines


def sliced_mlp(block, found, x):
    def small(name, x):
        form = found.forms[f"{block.name}.mlp.{name}_proj.weight"]
        bias, out = block.linear(f"mlp.{name}_proj").bias, x @ form.inner.dense().t()
        return out if bias is None else out + bias[form.rows]

    return small("down", nn.functional.silu(small("gate", x)) * small("up", x))


def test_nothing_is_lost_where_nothing_is_cut():
    model = decoder(bias=True)
    before, moments = logits(model), observe(model, BATCHES)
    assert not decompose(model, moments, [0.0, 0.0]).forms
    whole = decompose(model, moments, [1e-9, 1e-9]).load(copy.deepcopy(model))
    assert torch.allclose(logits(whole), before, atol=1e-4)


def test_types_are_cut_alone_and_files_shrink():
    model = decoder(heads=4, shared=2)
    moments = observe(model, BATCHES)
    whole = through_file(model, dtype=torch.float32).bytes
    for kind in TYPES:
        found = decompose(model, moments, [0.5, 0.5], [kind])
        stored = through_file(model, found.forms, dtype=torch.float32)
        removed = sum(
            form.rows.numel() * form.columns.numel() - form.inner.dense().numel() for form in found.forms.values()
        )
        assert whole - stored.bytes > 4 * removed - 4000 and removed > 0
        again = stored.load(copy.deepcopy(model))
        assert torch.equal(logits(again), logits(found.load(copy.deepcopy(model))))
    assert [sorted(name.split(".")[-2] for name in decompose(model, moments, [0, 0.5], [kind]).forms) for kind in TYPES] == [
        ["down_proj", "gate_proj", "up_proj"], ["k_proj", "q_proj"], ["o_proj", "v_proj"],
    ]  # fmt: skip


def test_decomposing_costs_less_than_slicing_by_hand():
    model = decoder(heads=4, shared=4, seed=3)
    moments = observe(model, BATCHES)
    found = decompose(model, moments, [0.25, 0.25], ["mlp"])
    plain = copy.deepcopy(model)
    for name, form in found.forms.items():
        if "down_proj" in name:
            plain.get_parameter(name).data[:, ~form.columns] = 0
    reference = logits(model)
    assert (logits(found.load(copy.deepcopy(model))) - reference).norm() < (logits(plain) - reference).norm()


def test_allocation_meets_the_mean_clips_and_follows_influence():
    shares = allocate([0.02, 0.05, 0.3, 0.01], 0.5, 0.05)
    assert sum(shares) / 4 == pytest.approx(0.5) and max(shares) == LIMIT
    assert shares[3] >= shares[0] >= shares[1] >= shares[2] > 0
    free = torch.tensor([0.05, 0.3]).double()
    assert shares[1] / shares[2] == pytest.approx(float(((free[1] - free[0]) / 0.05).exp()))
    assert allocate([0.1, 0.9, 0.4], 0.2, 1e6) == pytest.approx([0.2] * 3, abs=1e-5)
    assert allocate([0.1, 0.9], LIMIT, 0.01) == pytest.approx([LIMIT] * 2)
    assert allocate([0.1, 0.9], 0.0) == [0, 0]


def test_observing_leaves_modes_as_they_are():
    model = decoder().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    observe(model, BATCHES)
    assert [module.training for module in model.modules()] == modes


def test_pairs_stay_where_their_moments_are():
    assert pairs(torch.rand(4, 8, device="meta"), torch.rand(2, 8, device="meta"), 2).device.type == "meta"


def test_moments_are_those_of_the_tokens_that_are_no_padding():
    model = decoder(bias=True)
    plain = observe(model, [{"input_ids": TOKENS}])
    padded = torch.cat([TOKENS, torch.zeros(12, 4, dtype=torch.long)], 1)
    mask = torch.ones_like(padded)
    mask[:, 16:] = 0
    masked = observe(
        model, [{"input_ids": padded[half], "attention_mask": mask[half]} for half in (slice(6), slice(6, 12))]
    )
    for one, other in zip(plain, masked, strict=True):
        for name in ("queries", "keys", "values", "neurons"):
            assert torch.allclose(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-6)
        assert one.influence == pytest.approx(other.influence, abs=1e-5) and 0 < one.influence < 2
        assert one.neurons.dtype == torch.float64


def test_bfloat16_models_stay_bfloat16_and_bytes_are_the_same_each_time():
    model = decoder(bias=True).to(torch.bfloat16)
    first, second = (decompose(model, observe(model, BATCHES), [0.3, 0.3]) for _ in range(2))
    assert all(form.inner.weight.dtype == torch.bfloat16 for form in first.forms.values())
    assert all(torch.equal(form.dense(), second.forms[name].dense()) for name, form in first.forms.items())


def test_bad_requests_are_told():
    model = decoder()
    moments = observe(model, BATCHES)
    with pytest.raises(RequestError, match="type 'gpt2'"):
        blocks(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=16)))
    with pytest.raises(RequestError, match="type 'Linear'"):
        blocks(nn.Linear(2, 2))
    with pytest.raises(RequestError, match=r"2 blocks, but 1 moments"):
        decompose(model, moments[:1], [0.1, 0.1])
    with pytest.raises(RequestError, match="a share to cut is 1"):
        decompose(model, moments, [0.1, 1.0])
    with pytest.raises(RequestError, match="type 'heads' is not known; choose from mlp"):
        decompose(model, moments, [0.1, 0.1], ["heads"])
    with pytest.raises(RequestError, match=r"must be from 0 to 0\.8"):
        allocate([0.1], 0.9)
    with pytest.raises(RequestError, match="temperature is 0"):
        allocate([0.1], 0.2, 0)
    with pytest.raises(RequestError, match="influence is nan; it must be a finite number"):
        allocate([0.1, float("nan")], 0.2)
    with pytest.raises(RequestError, match="nothing to observe"):
        observe(model, [])
    model.model.layers[0].mlp.up_proj.weight.data[0] = float("nan")
    with pytest.raises(RequestError, match=r"model\.layers\.0: the moments of 'neurons' are not finite"):
        observe(model, BATCHES)
    model.model.layers[1].mlp.up_proj = nn.Identity()
    with pytest.raises(RequestError, match=r"layers\.1: mlp\.up_proj is not an nn\.Linear"):
        blocks(model)
