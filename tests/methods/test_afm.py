"""Atomic feature mimicking: principal components of outputs, of rows as often as they are met, and the method."""

import pytest
import torch
from torch import nn

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import LowRank
from octavo.methods import get_method
from octavo.methods.factorize.afm import OutputMoments, folded, mimicked, mimicked_table
from octavo.methods.factorize.factors import whitened
from octavo.sources.sites import Layout, Site


@pytest.fixture
def layer():
    """Inputs with a mean and correlations, a layer, and its outputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(600, 24, generator=generator) @ torch.randn(24, 24, generator=generator) * 0.3 + 1
    weight, bias = torch.randn(40, 24, generator=generator), torch.randn(40, generator=generator)
    return inputs, weight, bias, inputs @ weight.t() + bias


def moments(outputs, counts=None):
    found = OutputMoments(outputs.shape[1])
    for rows in torch.arange(len(outputs)).split(70):
        found.add(outputs[rows], None if counts is None else counts[rows])
    return found


def run(parts, inputs):
    return (inputs @ parts.inner.t() + parts.inner_bias) @ parts.outer.t() + parts.outer_bias


def pca(outputs, rank):
    mean = outputs.mean(0)
    u, s, vt = torch.linalg.svd(outputs - mean, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank] + mean, float(s[rank:].square().sum())


def test_moments_in_batches_are_those_of_all(layer):
    *_, outputs = layer
    found = moments(outputs)
    torch.testing.assert_close(found.mean.float(), outputs.mean(0))
    torch.testing.assert_close(found.covariance.float(), outputs.t().cov(correction=0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_two_layers_are_the_principal_components_of_the_outputs(layer, rank):
    inputs, weight, bias, outputs = layer
    parts = mimicked(weight, bias, moments(outputs), rank)
    expected, lost = pca(outputs, rank)
    torch.testing.assert_close(run(parts, inputs), expected, rtol=1e-3, atol=1e-2)
    assert float((run(parts, inputs) - outputs).square().sum()) == pytest.approx(lost, rel=1e-3)
    torch.testing.assert_close(parts.outer.t() @ parts.outer, torch.eye(rank), rtol=1e-5, atol=1e-5)
    assert parts.inner.shape == (rank, 24) and parts.outer.shape == (40, rank)


@pytest.mark.parametrize("rank", [2, 8, 16])
def test_outputs_beat_weights(layer, rank):
    inputs, weight, bias, outputs = layer
    svd = whitened(weight).first(rank)
    ours = float((run(mimicked(weight, bias, moments(outputs), rank), inputs) - outputs).norm())
    assert ours < 0.9 * float((inputs @ svd.right.t() @ svd.left.t() + bias - outputs).norm())


def test_all_components_lose_nothing(layer):
    inputs, weight, bias, outputs = layer
    parts = mimicked(weight, bias, moments(outputs), 40)
    # 24 inputs make 24 directions, whatever was asked for.
    assert parts.inner.shape[0] == 24
    torch.testing.assert_close(run(parts, inputs), outputs, rtol=1e-3, atol=1e-2)


def test_quiet_components_are_found_beside_loud_ones():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(10_000, 4, generator=generator) * torch.tensor([1e4, 1.0, 1.0, 1.0])
    basis = moments(outputs).principal(3)
    assert basis.shape == (4, 3)
    torch.testing.assert_close(basis.t() @ basis, torch.eye(3, dtype=torch.float64))


def test_moments_that_are_not_finite_are_refused():
    with pytest.raises(RequestError, match="not finite; calibrate"):
        moments(torch.full((4, 3), float("nan"))).principal(2)


def test_constant_outputs_are_their_mean():
    weight, bias = torch.zeros(6, 4), torch.arange(6.0)
    parts = mimicked(weight, bias, moments(bias.expand(10, 6)), 3)
    torch.testing.assert_close(run(parts, torch.randn(5, 4)), bias.expand(5, 6))


@pytest.mark.parametrize("rank", [0, -1, 41])
def test_ranks_that_there_are_not_are_refused(layer, rank):
    _, weight, bias, outputs = layer
    with pytest.raises(RequestError, match=f"rank {rank} is not possible for outputs of 40 elements"):
        mimicked(weight, bias, moments(outputs), rank)


def test_a_table_is_weighted_by_occurrence():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(200, 16, generator=generator) + 0.5
    table[:20, 3] *= 4
    counts = torch.randint(0, 3, (200,), generator=generator)
    counts[:20] += 300
    codes = mimicked_table(table, counts, 4)
    rows = codes.inner.t() @ codes.outer.t() + codes.outer_bias
    # The same as of all lookups, one after another.
    seen = table.repeat_interleave(counts, 0)
    expected, _ = pca(seen, 4)
    torch.testing.assert_close(rows.repeat_interleave(counts, 0), expected, rtol=1e-3, atol=1e-3)
    # Counting every row once is worse for what is looked up.
    alike = mimicked_table(table, torch.ones(200), 4)
    blind = alike.inner.t() @ alike.outer.t() + alike.outer_bias
    error = lambda found: float(counts.float() @ (found - table).square().sum(1))  # noqa: E731
    assert error(rows) < 0.9 * error(blind)
    never = mimicked_table(table, torch.zeros(200), 4)
    torch.testing.assert_close(never.inner, alike.inner)


def test_bases_of_tables_fold_into_the_next_layer():
    torch.manual_seed(0)
    tables, layer = [nn.Embedding(50, 8), nn.Embedding(30, 12)], nn.Linear(20, 6)
    parts = [
        mimicked_table(t.weight.detach(), torch.rand(len(t.weight)), rank)
        for t, rank in zip(tables, (3, 5), strict=True)
    ]
    weight, bias = folded(layer.weight.detach(), layer.bias.detach(), parts)
    assert weight.shape == (6, 8)
    index = torch.randint(0, 30, (9, 2))
    codes = torch.cat([part.inner.t()[index[:, k]] for k, part in enumerate(parts)], 1)
    rows = torch.cat([p.inner.t()[index[:, k]] @ p.outer.t() + p.outer_bias for k, p in enumerate(parts)], 1)
    torch.testing.assert_close(codes @ weight.t() + bias, layer(rows).detach())
    narrow, shift = folded(layer.weight.detach().bfloat16(), layer.bias.detach().bfloat16(), parts)
    assert narrow.dtype == shift.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), weight, rtol=2e-2, atol=2e-2)
    with pytest.raises(RequestError, match="20 inputs does not match"):
        folded(layer.weight, layer.bias, parts[:1])
    with pytest.raises(RequestError, match="0 inputs does not match"):
        folded(torch.zeros(6, 0), layer.bias, [])


@pytest.mark.parametrize("rank", [8, 24])
def test_the_method_keeps_the_largest_outputs(matrix, evidence, rank):
    """All outputs alike, it loses less than a truncation of the weights, and than one that weighs outputs unequally."""
    form = get_method("afm").encode(matrix, {"rank": rank, "bits": 12}, evidence)
    assert isinstance(form, LowRank) and form.left.shape == (96, rank)
    lost = {}
    alike = Evidence(torch.ones(96), evidence.columns)
    for name in ("afm", "svd", "activation-svd"):
        lost[name] = alike.loss(matrix - get_method(name).encode(matrix, {"rank": rank, "bits": 12}, evidence).dense())
    assert lost["afm"] < 0.8 * lost["svd"] and lost["afm"] < lost["activation-svd"]
    left_out = float(whitened(matrix, right=evidence.columns).values[rank:].square().sum()) / 2
    assert lost["afm"] == pytest.approx(left_out, rel=0.02)


def test_output_directions_do_not_depend_on_output_weights(matrix, evidence):
    setting = {"rank": 12, "bits": 14}
    other = Evidence(evidence.rows.flip(0) * 1e-4, evidence.columns)
    first, second = (get_method("afm").encode(matrix, setting, found).dense() for found in (evidence, other))
    assert float((first - second).norm() / first.norm()) < 1e-3


def test_sites_that_put_out_what_they_take_in_linearly():
    accepts = get_method("afm").accepts
    shapes = {"linear": (24, 48), "head": (24, 48), "embedding": (24, 48), "convolution": (24, 4, 3, 3)}
    taken = [kind for kind, shape in shapes.items() if accepts(Site("w", kind, shape, torch.float32, Layout()))]
    assert taken == ["linear", "head"]


@pytest.mark.parametrize(
    ("setting", "word"), [({"rank": 0, "bits": 6}, "rank"), ({"rank": 8}, "bits"), ({"rank": 8, "bits": 40}, "bits")]
)
def test_unusable_settings_are_named(setting, word, matrix, evidence):
    with pytest.raises(RequestError, match=f"afm.*{word}"):
        get_method("afm").encode(matrix, setting, evidence)
