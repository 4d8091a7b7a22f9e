"""GroupReduce: weighted low rank, blocks by frequency, ranks, refinement, and the quantized whole."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import Grid, LowRank, RowBlocks
from octavo.methods import get_method
from octavo.methods.factorize import factors
from octavo.methods.factorize.grouping import Grouping, grouped
from octavo.methods.factorize.groupreduce import GroupReduce, exact
from octavo.sources.sites import Layout, Site


def table(rows: int = 600, columns: int = 24) -> tuple[Tensor, Evidence]:
    """Rows of falling energy by direction, and counts by Zipf's law in an order that has nothing to do with them."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(0, -1, columns) @ mixing
    counts = (rows * 10 / torch.arange(1, rows + 1)).floor() + 1
    return weight, Evidence(counts[torch.randperm(rows, generator=generator)], None)


def product(weight: Tensor, evidence: Evidence, grouping: Grouping) -> Tensor:
    """What blocks stand for before quantization."""
    restored = torch.empty_like(weight)
    for number, block in enumerate(grouping.blocks(weight, evidence)):
        values = block.weight if block.parts is None else block.parts.left @ block.parts.right
        restored[grouping.member == number] = values
    return restored


def coefficients(grouping: Grouping, columns: int) -> int:
    sizes = grouping.member.long().bincount().tolist()
    return sum(
        size * columns if rank == columns else rank * (size + columns)
        for size, rank in zip(sizes, grouping.ranks, strict=True)
    )


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_both_forms_of_weighted_low_rank_are_one(rank):
    """``diag(q^-1/2) svd_r(diag(q^1/2) A)`` and the projection ``A V_r V_r^T``, in which the weights cancel."""
    weight, evidence = table(80, 16)
    q = evidence.rows.double()
    u, s, vt = torch.linalg.svd(q.sqrt()[:, None] * weight.double(), full_matrices=False)
    scaled = (u[:, :rank] * s[:rank]) @ vt[:rank] / q.sqrt()[:, None]
    projected = weight.double() @ vt[:rank].t() @ vt[:rank]
    found = factors.whitened(weight, evidence.rows, None, rank)
    ours = (found.left @ found.right).double()
    assert torch.allclose(scaled, projected, atol=1e-10)
    assert torch.allclose(ours, projected, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_weighted_low_rank_is_optimal(rank):
    """It leaves the energy of the components left out, and descent from other starts finds nothing below."""
    weight, evidence = table(80, 16)
    found = factors.whitened(weight, evidence.rows, None)
    least = float(found.values[rank:].square().sum()) / 2
    some = found.first(rank)
    assert evidence.loss(weight - some.left @ some.right) == pytest.approx(least, rel=1e-3)
    for seed in range(3):
        right = torch.randn(rank, 16, generator=torch.Generator().manual_seed(seed)).double()
        for _ in range(50):
            # Alternating least squares, in which the weights only matter for the right factor.
            left = torch.linalg.lstsq(right.t(), weight.double().t()).solution.t()
            heavy = evidence.rows.double()[:, None] * left
            right = torch.linalg.solve(heavy.t() @ left, heavy.t() @ weight.double())
        assert evidence.loss(weight - (left @ right).float()) > least * (1 - 1e-4)


def test_ranks_are_proportional_to_mean_counts_and_within_the_coefficients():
    weight = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    evidence = Evidence(torch.tensor([1.0, 2.0, 4.0, 8.0]).repeat_interleave(100).flip(0), None)
    grouping = grouped(weight, evidence, 8, 4, 0)
    assert grouping.member.bincount().tolist() == [100] * 4
    assert grouping.member.tolist() == sorted(grouping.member.tolist())
    rare = grouping.ranks[-1]
    for rank, times in zip(grouping.ranks, (8, 4, 2, 1), strict=True):
        assert times * rare <= rank < times * (rare + 1)
    assert 0.9 * 8 * 464 < coefficients(grouping, 64) <= 8 * 464


def test_frequent_blocks_are_kept_whole_where_factors_would_take_as_much():
    weight, evidence = table()
    grouping = grouped(weight, evidence, 8, 6, 0)
    break_even = 100 * 24 / 124
    assert grouping.ranks[0] == 24
    assert all(rank == 24 or rank < break_even for rank in grouping.ranks)
    assert coefficients(grouping, 24) <= 8 * 624
    frequent = product(weight, evidence, grouping)[grouping.member == 0]
    assert torch.equal(frequent, weight[grouping.member == 0])


@pytest.mark.parametrize("rank", [4, 8, 14])
def test_blocks_beat_weighted_svd_and_refinement_beats_blocks(rank):
    weight, evidence = table()
    parts = factors.factors(weight, evidence, rank)
    plain = factors.factors(weight, Evidence(torch.ones(600), None), rank)
    losses = [evidence.loss(weight - found.left @ found.right) for found in (plain, parts)]
    for rounds in (0, 1, 6):
        grouping = grouped(weight, evidence, rank, 4, rounds)
        assert coefficients(grouping, 24) <= rank * 624
        losses.append(evidence.loss(weight - product(weight, evidence, grouping)))
    assert losses == sorted(losses, reverse=True)
    assert losses[3] < 0.98 * losses[2] < 0.98 * losses[1]


def test_refinement_finds_planted_blocks():
    """Two subspaces and counts that tell little of them: rows move until every one is in its own."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.rand(400, generator=generator) < 0.5
    bases = torch.randn(2, 4, 32, generator=generator)
    weight = (torch.randn(400, 1, 4, generator=generator) @ bases[kind.long()])[:, 0]
    noise = 0.01 * torch.rand(400, generator=generator)
    evidence = Evidence(1 + noise + 0.05 * kind * (torch.rand(400, generator=generator) < 0.9), None)
    before, after = (grouped(weight, evidence, 5, 2, rounds) for rounds in (0, 20))
    lost = [evidence.loss(weight - product(weight, evidence, grouping)) for grouping in (before, after)]
    assert lost[1] < 0.01 * lost[0]
    assert float(((after.member == 0) == kind).float().mean().sub(0.5).abs().add(0.5)) > 0.97


def test_the_moment_of_columns_decides_what_is_near(evidence_of):
    """With evidence of both sides the loss falls in its own units, whether or not the moment has full rank."""
    weight, counts = table()
    seen = evidence_of(600, 24).columns
    low = torch.linalg.qr(torch.randn(24, 6, generator=torch.Generator().manual_seed(3))).Q
    for columns in (seen, low @ low.t()):
        evidence = Evidence(counts.rows, columns)
        losses = [
            evidence.loss(weight - product(weight, evidence, grouped(weight, evidence, 4, 4, rounds)))
            for rounds in (0, 6)
        ]
        assert losses[1] <= losses[0] * (1 + 1e-5) + 1e-6
        assert losses[0] < evidence.loss(weight)


@pytest.mark.parametrize("counts", ["zero", "equal", "one row"])
def test_counts_that_tell_nothing(counts):
    weight, _ = table(100, 12)
    rows = {"zero": torch.zeros(100), "equal": torch.ones(100), "one row": torch.eye(100)[7]}[counts]
    form = get_method("groupreduce").encode(weight, {"rank": 6, "blocks": 4, "bits": 6}, Evidence(rows, None))
    assert bool(torch.isfinite(form.dense()).all())
    error = (weight - form.dense())[rows > 0] if counts == "one row" else weight - form.dense()
    assert float(error.norm()) < 0.6 * float(weight.norm())


@pytest.mark.parametrize("shape", [(900, 32), (120, 200)])
def test_settings_fall_in_size(shape, evidence_of, size):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.05
    evidence, method = evidence_of(*shape), get_method("groupreduce")
    sizes = [size(form) for form in method.encode_all(weight, method.settings(weight, evidence), evidence)]
    assert all(after < 1.05 * before for before, after in pairwise(sizes))
    assert sizes[-1] < sizes[0] / 2


def test_bits_buy_nearness_until_truncation_is_left():
    weight, evidence = table()
    exact = evidence.loss(weight - product(weight, evidence, grouped(weight, evidence, 12, 4, 6)))
    losses = []
    for bits in (2, 4, 6, 10):
        form = get_method("groupreduce").encode(weight, {"rank": 12, "blocks": 4, "bits": bits}, evidence)
        assert isinstance(form, RowBlocks) and any(isinstance(block, LowRank) for block in form.blocks)
        losses.append(evidence.loss(weight - form.dense()))
    assert losses == sorted(losses, reverse=True)
    assert exact <= losses[-1] < 1.02 * exact


def test_blocks_below_the_step_are_left_out():
    """One step serves all blocks: what counts for next to nothing takes no bytes, and the rest no harm."""
    weight, _ = table()
    rows = torch.where(torch.arange(600) < 300, 1.0, 1e-7)
    form = get_method("groupreduce").encode(weight, {"rank": 8, "blocks": 2, "bits": 4}, Evidence(rows, None))
    assert isinstance(form, RowBlocks) and isinstance(form.blocks[1], Grid)
    assert not bool(form.dense()[300:].any())
    assert float((weight - form.dense())[:300].norm()) < 0.3 * float(weight[:300].norm())


def test_settings_share_the_grouping_and_change_nothing_by_it():
    weight, evidence = table()
    method = get_method("groupreduce")
    settings = [{"rank": rank, "blocks": 4, "bits": bits} for rank in (8, 12) for bits in (2, 4)]
    together = [form.dense() for form in method.encode_all(weight, iter(settings), evidence)]
    alone = [method.encode(weight, setting, evidence).dense() for setting in settings]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_rounds_are_a_knob():
    weight, evidence = table()
    setting = {"rank": 8, "blocks": 4, "bits": 8}
    cut, refined = (GroupReduce(rounds=rounds).encode(weight, setting, evidence) for rounds in (0, 6))
    assert evidence.loss(weight - refined.dense()) < evidence.loss(weight - cut.dense())


def test_only_tables_of_tokens_are_accepted():
    method = get_method("groupreduce")
    for kind in ("embedding", "head", "linear", "convolution"):
        site = Site("w", kind, (64, 8), torch.float32, Layout())
        assert method.accepts(site) == (kind in ("embedding", "head"))


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ({"rank": 0, "blocks": 4, "bits": 4}, "rank is 0"),
        ({"rank": 25, "blocks": 4, "bits": 4}, "rank is 25.*1 to 24"),
        ({"rank": 8, "blocks": 0, "bits": 4}, "blocks is 0"),
        ({"rank": 8, "blocks": 257, "bits": 4}, "blocks is 257.*1 to 256"),
        ({"rank": 8, "blocks": 4, "bits": 17}, "bits is 17"),
        ({"rank": 8, "bits": 4}, "no 'blocks'"),
        ({"rank": 1, "blocks": 4, "bits": 4}, "4 blocks takes 696 coefficients, but rank 1 allows 624"),
    ],
)
def test_unusable_settings_are_named(setting, word):
    weight, evidence = table()
    with pytest.raises(RequestError, match=f"groupreduce.*{word}"):
        get_method("groupreduce").encode(weight, setting, evidence)


def test_exact_blocks_hold_the_factors_as_found():
    weight, evidence = table()
    grouping = grouped(weight, evidence, 8, 4, 2)
    form = RowBlocks(grouping.member, exact(grouping.blocks(weight, evidence)))
    assert torch.allclose(form.dense(), product(weight, evidence, grouping))
    assert [type(block).__name__ for block in form.blocks][-1] == "LowRank"
