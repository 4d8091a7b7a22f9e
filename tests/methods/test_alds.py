"""ALDS: the bound of its error, what it becomes with one group, and its allocation over all layers."""

import math

import pytest
import torch
from torch import nn

import octavo
from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import GroupedLowRank
from octavo.methods import get_method
from octavo.methods.factorize.alds import decomposed
from octavo.methods.factorize.minimax import RankChoice, RankedLayer, allocate_ranks, constant_ranks, energy_ranks
from octavo.sources.source import from_module


def kernels() -> dict[str, tuple[torch.Tensor, int]]:
    """Matrices of convolutions whose energy falls at different rates, and their channels."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for number, (rows, channels, area) in enumerate(((16, 12, 9), (32, 16, 9), (24, 32, 1), (10, 64, 1))):
        u = torch.linalg.qr(torch.randn(rows, rows, generator=generator)).Q
        matrix = u * torch.logspace(0, -number, rows) @ torch.randn(rows, channels * area, generator=generator)
        found[f"layer{number}"] = matrix, channels
    return found


def layers(**options) -> dict[str, RankedLayer]:
    return {name: RankedLayer(matrix, channels, **options) for name, (matrix, channels) in kernels().items()}


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_error_is_within_the_bound(groups, rank):
    """``|W - W'|_2 <= sqrt(k) max_i sigma_{j+1}(W_i)``."""
    matrix, channels = kernels()["layer1"]
    lost = torch.linalg.matrix_norm(matrix - decomposed(matrix, groups, rank).dense(), 2)
    largest = max(float(torch.linalg.svdvals(part)[rank]) for part in matrix.chunk(groups, 1))
    assert largest * 0.999 <= float(lost) <= math.sqrt(groups) * largest * 1.001
    bound, plain = (
        RankedLayer(matrix, channels, bound=bound).error(RankChoice(groups, rank)) for bound in (True, False)
    )
    norm = float(torch.linalg.matrix_norm(matrix, 2))
    assert plain * norm == pytest.approx(largest, rel=1e-4)
    assert bound == pytest.approx(math.sqrt(groups) * plain, rel=1e-9)


def test_one_group_is_the_truncated_svd(matrix, evidence):
    u, values, v = torch.linalg.svd(matrix)
    best = (u[:, :9] * values[:9]) @ v[:9]
    assert torch.allclose(decomposed(matrix, 1, 9).dense(), best, atol=1e-5)
    setting = {"rank": 9, "bits": 5}
    for found, name in ((evidence, "activation-svd"), (Evidence(torch.ones(len(matrix)), None), "svd")):
        grouped = get_method("alds").encode(matrix, {"groups": 1, **setting}, found)
        assert torch.allclose(grouped.dense(), get_method(name).encode(matrix, setting, found).dense(), atol=1e-6)


def test_every_group_has_its_own_factors(matrix, evidence):
    blind = Evidence(torch.ones(len(matrix)), None)
    form = get_method("alds").encode(matrix, {"groups": 4, "rank": 6, "bits": 15}, blind)
    assert isinstance(form, GroupedLowRank) and form.groups == 4 and form.left.shape == (96, 24)
    for part, restored in zip(matrix.chunk(4, 1), form.dense().chunk(4, 1), strict=True):
        values = torch.linalg.svdvals(part)
        assert float((part - restored).square().sum()) == pytest.approx(float(values[6:].square().sum()), rel=1e-2)
    inputs = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(form.apply(inputs), inputs @ form.dense().t(), atol=1e-4)


@pytest.mark.parametrize("groups", [2, 4])
def test_evidence_lowers_the_loss(groups, matrix, evidence):
    setting = {"groups": groups, "rank": 8, "bits": 6}
    blind = Evidence(torch.ones(len(matrix)), None)
    losses = [
        evidence.loss(matrix - get_method("alds").encode(matrix, setting, found).dense()) for found in (evidence, blind)
    ]
    assert losses[0] < 0.9 * losses[1]


def test_groups_of_columns_are_a_convolution_in_groups():
    """A grouped convolution of the same kernel, then one of 1 x 1, gives what the form's matrix gives."""
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False).requires_grad_(False)
    form = decomposed(layer.weight.flatten(1), 4, 5)
    encode = nn.Conv2d(12, 20, 3, stride=2, padding=1, groups=4, bias=False).requires_grad_(False)
    decode = nn.Conv2d(20, 16, 1, bias=False).requires_grad_(False)
    encode.weight.copy_(form.right.dense().view(20, 3, 3, 3))
    decode.weight.copy_(form.left.dense().view(16, 20, 1, 1))
    x = torch.randn(2, 12, 9, 9)
    layer.weight.copy_(form.dense().view_as(layer.weight))
    assert torch.allclose(decode(encode(x)), layer(x), atol=1e-5)


@pytest.mark.parametrize(
    ("module", "accepted"),
    [
        (nn.Linear(48, 24), True),
        (nn.Conv2d(16, 24, 3), True),
        (nn.Conv2d(12, 24, 3), True),
        (nn.Conv2d(32, 64, 3, groups=4), True),
        (nn.Conv2d(64, 64, 3, groups=64), False),
        (nn.Conv2d(16, 24, 4), True),
        # Eight groups divide the 12 * 16 columns, but not the channels; nor do two the three of an image.
        (nn.Conv2d(12, 24, 4), True),
        (nn.Conv2d(3, 192, 16, 16), True),
        (nn.Embedding(40, 16), False),
    ],
)
def test_where_channels_can_be_split(module, accepted):
    (site,) = from_module(module).sites()[0]
    method = get_method("alds")
    assert method.accepts(site) == accepted
    if accepted and site.kind == "convolution":
        weight = module.weight.detach().flatten(1)
        channels = module.weight.shape[1]
        evidence = Evidence(torch.ones(len(weight)), None)
        settings = method.at_site(site).settings(weight, evidence)
        assert settings and all(channels % setting["groups"] == 0 for setting in settings)


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        (
            {"groups": 3, "rank": 4, "bits": 6},
            "groups is 3 in the setting .* does not divide the 128 columns.*choose from 1, 2, 4",
        ),
        ({"groups": 0, "rank": 4, "bits": 6}, "groups is 0"),
        ({"groups": 2, "rank": 0, "bits": 6}, "rank is 0.*from 1 to 64"),
        ({"groups": 2, "rank": 65, "bits": 6}, "rank is 65.*from 1 to 64"),
        ({"groups": 2, "rank": 4, "bits": 40}, "bits is 40"),
        ({"rank": 4, "bits": 4}, "no 'groups'"),
    ],
)
def test_unusable_settings_are_named(setting, word, matrix, evidence):
    with pytest.raises(RequestError, match=f"alds.*{word}"):
        get_method("alds").encode(matrix, setting, evidence)


def test_groups_of_lower_rank_and_evidence_that_sees_little():
    """Groups may have fewer components than are asked for, and inputs may span fewer directions than there are."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 32, generator=generator)
    weight[:, :16] = torch.randn(24, 2, generator=generator) @ torch.randn(2, 16, generator=generator)
    weight[:, 16:24] = 0
    inputs = torch.randn(5, 32, generator=generator)
    for columns in (None, inputs.t() @ inputs / 5 + 1e-6 * torch.eye(32)):
        evidence = Evidence(torch.ones(24), columns)
        form = get_method("alds").encode(weight, {"groups": 4, "rank": 8, "bits": 14}, evidence)
        error = weight - form.dense()
        assert evidence.loss(error) < 1e-3 * evidence.loss(weight)


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("share", [0.15, 0.3, 0.5, 0.8])
def test_no_ablation_of_that_size_has_a_smaller_largest_error(share, bound):
    found = layers(bound=bound)
    for choices in (constant_ranks(found, share / 2), energy_ranks(found, share)):
        size = sum(layer.size(choices[name]) for name, layer in found.items())
        worst = max(layer.error(choices[name]) for name, layer in found.items())
        ours = allocate_ranks(found, size)
        single = allocate_ranks(found, size, groups=(1,))
        assert ours.elements <= size and single.elements <= size
        assert ours.error <= single.error <= worst
        assert {choice.groups for choice in single.choices.values() if choice} <= {1}


def test_the_level_is_the_least_for_one_group():
    """With one group the bisection is exact: no choice of ranks within the budget has a smaller largest error."""
    found = {name: layers()[name] for name in ("layer0", "layer2")}
    budget = sum(layer.dense for layer in found.values()) // 3
    made = allocate_ranks(found, budget, groups=(1,))
    first, second = found.values()
    options = [[*(RankChoice(1, j) for j in range(1, len(layer.errors(1)))), None] for layer in (first, second)]
    best = min(
        max(first.error(a), second.error(b))
        for a in options[0]
        for b in options[1]
        if first.size(a) + second.size(b) <= budget
    )
    assert made.error == best and made.elements <= budget


def test_errors_fall_as_the_budget_grows_until_all_is_dense():
    found = layers()
    dense = sum(layer.dense for layer in found.values())
    errors = [allocate_ranks(found, int(share * dense)).error for share in (0.1, 0.2, 0.4, 0.8, 1.0)]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0
    assert set(allocate_ranks(found, dense).choices.values()) == {None}
    assert allocate_ranks(found, dense // 3) == allocate_ranks(layers(), dense // 3)


def test_budgets_and_groups_that_cannot_be():
    with pytest.raises(RequestError, match=r"20 coefficients are too few, as rank 1 in all layers takes 430"):
        allocate_ranks(layers(), 20)
    with pytest.raises(RequestError, match="layers: none are given"):
        allocate_ranks({}, 20)
    with pytest.raises(RequestError, match="starts is 0 and rounds is 4; both must be at least 1"):
        allocate_ranks(layers(), 10_000, starts=0)
    with pytest.raises(RequestError, match="starts is 15 and rounds is 0"):
        allocate_ranks(layers(), 10_000, rounds=0)
    with pytest.raises(RequestError, match="channels: 5 do not divide the 108 columns"):
        RankedLayer(kernels()["layer0"][0], 5)
    with pytest.raises(RequestError, match="5 groups do not divide 12 channels"):
        layers()["layer0"].errors(5)


@pytest.mark.parametrize("size", [1e6, 1e7, 1e9, 1e20])
@pytest.mark.parametrize("place", [(3, 5), (40, 120)])
@pytest.mark.parametrize("seen", [True, False])
def test_one_weight_that_is_far_larger_ends_no_setting(size, place, seen, matrix, evidence):
    """Groups then differ by more than the codes of one step can hold."""
    weight = matrix.clone()
    weight[place] = size
    evidence = evidence if seen else Evidence(torch.ones(len(weight)), None)
    method = get_method("alds")
    for form in method.encode_all(weight, method.settings(weight, evidence), evidence):
        assert evidence.loss(form.dense() - weight) < 0.02 * evidence.loss(weight)


def test_a_layer_with_one_huge_weight_is_compressed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(96, 64))
    with torch.no_grad():
        net[0].weight[3, 5] = 1e8
    assert octavo.compress(net, ratio=1.5, methods=["alds"], preset="best").ratio >= 1.5
