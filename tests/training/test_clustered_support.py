"""The three-layer prior: messages against all chains, and updates against the bound that they maximise."""

import itertools
import math

import pytest
import torch
from torch.distributions import Bernoulli, Gamma

from octavo.errors import RequestError
from octavo.training.clustered_support import Precisions, SupportPrior, evidence, extrinsic, inferred, precisions

PRIOR = SupportPrior(density=0.2, run=3.0, quiet=(1.0, 0.01))


def by_enumeration(own, prior):
    """The extrinsic log-odds of one row from all its chains."""
    moves = {(1, 1): 1 - prior.leaving, (1, 0): prior.leaving, (0, 1): prior.entering, (0, 0): 1 - prior.entering}
    sums = torch.zeros(len(own), 2, dtype=torch.float64)
    for chain in itertools.product((0, 1), repeat=len(own)):
        weight = prior.density if chain[0] else 1 - prior.density
        for pair in itertools.pairwise(chain):
            weight *= moves[pair]
        for place, state in enumerate(chain):
            others = sum(float(own[k]) for k in range(len(own)) if k != place and chain[k])
            sums[place, state] += weight * math.exp(others)
    return (sums[:, 1] / sums[:, 0]).log()


def test_messages_are_those_of_all_chains():
    own = 2 * torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([by_enumeration(row, PRIOR) for row in own])
    assert torch.allclose(extrinsic(own, PRIOR), expected, atol=1e-10)
    assert torch.allclose(extrinsic(own[:, :1], PRIOR), torch.full((3, 1), PRIOR.odds, dtype=torch.float64))


def test_runs_as_short_as_chance_are_independence():
    own = torch.randn(2, 9, dtype=torch.float64)
    chance = SupportPrior(density=0.2, run=1 / 0.8)
    assert torch.allclose(extrinsic(own, chance), extrinsic(own, SupportPrior(density=0.2, run=None)))


def test_density_and_runs_are_those_of_the_chain():
    assert PRIOR.entering * (1 - PRIOR.density) == pytest.approx(PRIOR.leaving * PRIOR.density)
    assert 1 / PRIOR.leaving == pytest.approx(3.0)


def bound(squares, support, known, odds):
    """The part of the evidence lower bound that precisions and support change."""
    rho, s = Gamma(known.shape, known.rate), Bernoulli(support)
    expected = 0.5 * known.log_mean - 0.5 * known.mean * squares + s.entropy() + rho.entropy()
    for share, (shape, rate) in ((support, PRIOR.active), (1 - support, PRIOR.quiet)):
        log_density = shape * math.log(rate) - math.lgamma(shape) + (shape - 1) * known.log_mean - rate * known.mean
        expected = expected + share * log_density
    return expected + support * odds - torch.nn.functional.softplus(odds)


def test_each_update_maximises_the_bound():
    generator = torch.Generator().manual_seed(1)
    squares = torch.rand(4, 5, dtype=torch.float64, generator=generator).mul(6).sub(4).exp()
    support = torch.rand(4, 5, dtype=torch.float64, generator=generator)
    odds = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    known = Precisions(torch.ones_like(squares), torch.ones_like(squares))
    last = bound(squares, support, known, odds)
    for _ in range(3):
        known = precisions(squares, support, PRIOR)
        now = bound(squares, support, known, odds)
        assert bool((now >= last - 1e-12).all())
        for shape, rate in ((1.1, 1.0), (0.9, 1.0), (1.0, 1.1), (1.0, 0.9)):
            moved = bound(squares, support, Precisions(shape * known.shape, rate * known.rate), odds)
            assert bool((moved < now).all())
        support = (odds + evidence(known, PRIOR)).sigmoid()
        last = bound(squares, support, known, odds)
        assert bool((last >= now - 1e-12).all())
        for moved in (0.9 * support, 0.9 * support + 0.1):
            assert bool((bound(squares, moved, known, odds) < last + 1e-12).all())


def test_the_moments_of_precisions():
    known = Precisions(torch.tensor([2.5]), torch.tensor([0.7]))
    drawn = Gamma(2.5, 0.7).sample((200_000,))
    assert float(known.mean) == pytest.approx(float(drawn.mean()), rel=0.02)
    assert float(known.log_mean) == pytest.approx(float(drawn.log().mean()), abs=0.02)


def test_neighbours_decide_about_weights_of_the_same_size():
    large, middling, small = 4.0, 0.42, 1e-4
    row = torch.tensor([[small] * 6 + [large, middling, large] + [small] * 6 + [middling] + [small] * 6])
    clustered, alone = (
        inferred(row, SupportPrior(0.2, run, quiet=(1.0, 0.001))).support[0] > 0.5 for run in (4.0, None)
    )
    assert bool(clustered[7]) and not bool(clustered[15]), "the one in the run stays, the single one goes"
    assert bool(alone[7]) == bool(alone[15])
    assert not clustered[:6].any() and not alone[:6].any() and clustered[6] and clustered[8]


def test_extreme_weights_give_finite_beliefs():
    squares = torch.tensor([[0.0, 1e-30, 1e12, 0.0], [1e12, 1e12, 1e12, 1e12], [0.0, 0.0, 0.0, 0.0]])
    found = inferred(squares, SupportPrior(1e-3, 50.0, quiet=(1.0, 1e-6)), rounds=8)
    assert all(bool(torch.isfinite(part).all()) for part in (found.support, found.odds, found.precisions.mean))
    assert bool((found.support[1] > 0.5).all()) and bool((found.support[2] < 0.5).all())


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"density": 0.0}, "density is 0.0"),
        ({"density": 0.5, "run": 1.5}, "have runs of 2"),
        ({"run": math.inf}, "run is inf"),
        ({"quiet": (1.0, 1.0)}, "mean precision"),
        ({"active": (0.0, 1.0)}, "must be positive"),
    ],
)
def test_a_prior_that_makes_no_sense_is_refused(knobs, says):
    with pytest.raises(RequestError, match=says):
        SupportPrior(**knobs)
