"""Magnitude, Wanda and SparseGPT."""

from itertools import pairwise

import pytest
import torch

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.methods import get_method
from octavo.methods.prune import masks
from octavo.methods.prune.sparsegpt import SparseGPT

NAMES = ("magnitude", "wanda", "sparsegpt")


@pytest.mark.parametrize("name", NAMES)
def test_settings_fall_in_size(name, evidence_of, size):
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)) * 0.05
    evidence, method = evidence_of(256, 384), get_method(name)
    sizes = [size(form) for form in method.encode_all(weight, method.settings(weight, evidence), evidence)]
    # Neighbours that differ by a few thousandths may swap places.
    assert all(after < 1.01 * before for before, after in pairwise(sizes))
    assert sizes[-1] < sizes[0] / 6


@pytest.mark.parametrize(
    "setting",
    [
        {"sparsity": 0.5, "bits": 6},
        {"sparsity": 0.8, "bits": 4},
        {"pattern": "2:4", "bits": 4},
        {"pattern": "4:8", "bits": 4},
    ],
)
def test_the_more_is_known_the_less_is_lost(setting, matrix, evidence):
    losses = [evidence.loss(matrix - get_method(name).encode(matrix, setting, evidence).dense()) for name in NAMES]
    assert losses[2] < 0.9 * losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("pattern", "keep", "group"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4), ("3:3", 3, 3)])
def test_patterns_keep_exactly_n(name, pattern, keep, group, evidence_of):
    weight = torch.randn(20, 48, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    weight[4] = 1
    form = get_method(name).encode(weight, {"pattern": pattern, "bits": 4}, evidence_of(20, 48))
    assert bool((form.mask.view(20, -1, group).sum(2) == keep).all())
    assert form.pattern == (keep, group) and "patterns" in form.tensors()


def test_counts_are_exact(evidence_of):
    weight = torch.randn(31, 40, generator=torch.Generator().manual_seed(0))
    evidence = evidence_of(31, 40)
    # So fine that no survivor is rounded to zero.
    setting = {"sparsity": 0.7, "bits": 16}
    for name in ("magnitude", "sparsegpt"):
        form = get_method(name).encode(weight, setting, evidence)
        assert abs(int(form.mask.sum()) - round(0.3 * weight.numel())) <= 2, name
    by_row = get_method("wanda").encode(weight, setting, evidence).mask.sum(1)
    assert bool((by_row == 12).all())


@pytest.mark.parametrize("setting", [{"sparsity": 0.5}, {"pattern": "2:4"}])
@pytest.mark.parametrize("name", NAMES)
def test_without_bits_nothing_is_rounded(name, setting, matrix, evidence, size):
    form = get_method(name).encode(matrix, setting, evidence)
    pruned = form.dense()
    assert float((pruned == 0).float().mean()) == pytest.approx(0.5, abs=1e-3)
    if name != "sparsegpt":
        assert torch.equal(pruned[form.mask], matrix[form.mask])
    # SparseGPT changes survivors to make up for the others; finer steps approach what it finds.
    rounded = get_method(name).encode(matrix, {**setting, "bits": 16}, evidence).dense()
    assert evidence.loss(pruned - rounded) < 1e-3 * evidence.loss(matrix - pruned)
    assert size(form) < 0.5 * 4 * matrix.numel()


def test_survivors_of_a_narrow_source_stay_narrow(evidence, matrix, size):
    sizes = [
        size(get_method("magnitude").encode(matrix.to(dtype).float(), {"sparsity": 0.5}, evidence))
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ]
    assert sizes[1] < 0.5 * 2 * matrix.numel() and sizes[2] < 0.42 * 2 * matrix.numel() and sizes[0] > 1.5 * sizes[1]


def test_magnitude_keeps_the_largest(matrix, evidence):
    form = get_method("magnitude").encode(matrix, {"sparsity": 0.6, "bits": 8}, evidence)
    assert float(matrix[form.mask].abs().min()) >= float(matrix[~form.mask].abs().max())


def test_wanda_keeps_large_inputs():
    weight = torch.ones(4, 16)
    moment = torch.diag(torch.arange(1.0, 17.0))
    form = get_method("wanda").encode(weight, {"sparsity": 0.75, "bits": 4}, Evidence(torch.ones(4), moment))
    assert bool(form.mask[:, 12:].all()) and int(form.mask.sum()) == 16


def test_survivors_that_round_to_zero_leave_the_mask(matrix, evidence):
    form = get_method("magnitude").encode(matrix, {"sparsity": 0.0, "bits": 3}, evidence)
    assert bool((form.values.codes != 0).all())
    assert float(form.mask.float().mean()) < 0.95


def test_sparsegpt_does_not_depend_on_chunks(matrix, evidence):
    """Rows are swept apart, only the shares of the blocks are split: copies of a matrix are pruned as it is itself."""
    setting, copies = {"pattern": "2:4", "bits": 4}, 50
    alone = get_method("sparsegpt").encode(matrix, setting, evidence).dense()
    many = Evidence(evidence.rows.repeat(copies), evidence.columns)
    found = get_method("sparsegpt").encode(matrix.repeat(copies, 1), setting, many).dense()
    for part in found.chunk(copies):
        assert evidence.loss(alone - part) < 1e-3 * evidence.loss(matrix - alone)


def test_sparsegpt_order_is_a_choice(matrix, evidence):
    setting = {"sparsity": 0.5, "bits": 4}
    plain = evidence.loss(matrix - get_method("magnitude").encode(matrix, setting, evidence).dense())
    unordered = SparseGPT(order=False).encode(matrix, setting, evidence)
    assert evidence.loss(matrix - unordered.dense()) < 0.8 * plain


def test_sparsegpt_without_a_moment_weighs_rows():
    weight = torch.ones(2, 64) * torch.linspace(1, 2, 64)
    evidence = Evidence(torch.tensor([100.0, 1.0]), None)
    form = get_method("sparsegpt").encode(weight, {"sparsity": 0.5, "bits": 6}, evidence)
    assert form.mask.sum(1).tolist() == [64, 0]


def test_equal_scores_keep_the_first():
    scores = torch.ones(3, 10)
    assert masks.largest_by_row(scores, 4).sum(1).tolist() == [4, 4, 4]
    assert masks.largest_by_row(scores, 4)[:, :4].all()
    assert int(masks.largest(scores, 7).sum()) == 7
    assert not masks.largest(scores, 0).any() and masks.largest(scores, 30).all()
    assert masks.largest_by_group(torch.ones(2, 8), (2, 4)).tolist() == [[True, True, False, False] * 2] * 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ({"sparsity": 1.0, "bits": 4}, "sparsity"),
        ({"sparsity": -0.1, "bits": 4}, "sparsity"),
        ({"sparsity": float("nan"), "bits": 4}, "sparsity"),
        ({"sparsity": 0.5, "bits": 1}, "bits"),
        ({"bits": 4}, "sparsity"),
        ({"pattern": "5:4", "bits": 4}, "pattern"),
        ({"pattern": "half", "bits": 4}, "pattern"),
        ({"pattern": "2:7", "bits": 4}, "divide"),
        ({"pattern": "2:4", "sparsity": 0.5, "bits": 4}, "either"),
    ],
)
def test_unusable_settings_are_named(name, setting, word, matrix, evidence):
    with pytest.raises(RequestError, match=f"{name}.*{word}"):
        get_method(name).encode(matrix, setting, evidence)


def test_patterns_are_offered_where_they_divide():
    offered = {
        s.get("pattern") for s in get_method("wanda").settings(torch.zeros(3, 12), Evidence(torch.ones(3), None))
    }
    assert offered == {None, "2:4"}


@pytest.mark.parametrize("pattern", ["2:6", "1:3", "3:5", "4:7"])
def test_groups_that_do_not_divide_a_block_are_pruned(pattern, evidence_of):
    keep, group = map(int, pattern.split(":"))
    weight = torch.randn(32, 210, generator=torch.Generator().manual_seed(0))
    columns = weight[:, : 210 // group * group]
    form = get_method("sparsegpt").encode(columns, {"pattern": pattern, "bits": 6}, evidence_of(*columns.shape))
    assert bool((form.mask.view(len(columns), -1, group).sum(2) == keep).all())
