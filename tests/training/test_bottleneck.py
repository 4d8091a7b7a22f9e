"""The bound of Gaussian masks against its definition, and expected sizes against models that are really cut."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from octavo.cuts import Slice, Units, without
from octavo.cuts.chains import chain_units
from octavo.errors import RequestError
from octavo.training.bottleneck import UnitSizes, divergence, noise_ratio, soft_mask

MEANS, VARIANCES = torch.tensor([1.0, 0.3, -2.0, 0.05]), torch.tensor([1e-4, 0.5, 3.0, 0.2])


def test_the_bound_is_the_divergence_to_the_nearest_zero_mean_gaussian():
    """By search over the prior's variance, and with that variance by integration."""
    found = divergence(MEANS, VARIANCES.log())
    q = Normal(MEANS[:, None], VARIANCES.sqrt()[:, None])
    grid = torch.logspace(-6, 2, 20_001)
    searched = kl_divergence(q, Normal(0.0, grid.sqrt())).min(1).values
    assert torch.allclose(found, searched, atol=1e-4)
    for mean, variance, value in zip(MEANS.double(), VARIANCES.double(), found, strict=True):
        own, prior = Normal(mean, variance.sqrt()), Normal(0.0, (mean**2 + variance).sqrt())
        x = mean + torch.linspace(-8, 8, 40_001, dtype=torch.float64) * variance.sqrt()
        integral = torch.trapezoid(own.log_prob(x).exp() * (own.log_prob(x) - prior.log_prob(x)), x)
        assert float(value) == pytest.approx(float(integral), abs=1e-4)


def test_a_unit_is_pruned_where_noise_outweighs_its_mean():
    ratio = noise_ratio(MEANS, VARIANCES.log())
    assert torch.equal(ratio >= 0, MEANS.square() <= VARIANCES)
    assert torch.allclose(divergence(MEANS, VARIANCES.log()), 0.5 * torch.log1p(torch.exp(-ratio)), atol=1e-6)
    assert soft_mask(torch.tensor([-9.0, 0.0, 9.0])).tolist() == pytest.approx([1.0, 0.5, 0.0], abs=1e-6)


def test_a_mask_of_zero_has_no_information():
    assert float(divergence(torch.zeros(1), torch.zeros(1))) == pytest.approx(0, abs=1e-6)
    mean = torch.zeros(1, requires_grad=True)
    divergence(mean, torch.zeros(1)).backward()
    assert math.isfinite(float(mean.grad))


def test_sizes_are_those_of_cut_models():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(64, 6),
        nn.Linear(6, 3),
    )  # fmt: skip
    units = chain_units(net)
    sizes = UnitSizes(net, units)
    assert sizes.total == sum(weight.numel() for weight in net.parameters())
    for seed in range(3):
        torch.manual_seed(seed)
        kept = {part.name: torch.rand(part.count).argsort() < part.count - 2 for part in units}
        cut = sum(weight.numel() for weight in without(net, units, kept).parameters())
        assert float(sizes.left({name: mask.float() for name, mask in kept.items()})) == cut


def test_sizes_have_gradients_where_probabilities_do():
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    (part,) = chain_units(net)
    kept = torch.full((4,), 0.5, requires_grad=True)
    size = UnitSizes(net, [part]).left({part.name: kept})
    size.backward()
    assert float(size.detach()) == 10 and kept.grad.tolist() == [5.0] * 4


def test_units_that_overlap_are_refused():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    twice = [Units(name, "neuron", 4, (Slice("0.weight", 0, torch.arange(4)[:, None]),)) for name in ("a", "b")]
    with pytest.raises(RequestError, match=r"some overlap in dimension 0 of '0\.weight'"):
        UnitSizes(net, twice)


def test_units_are_read_once_however_many_tensors_there_are():
    class Counted(list):
        reads = 0

        def __iter__(self):
            self.reads += 1
            return super().__iter__()

    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(9)])
    units = Counted(chain_units(net))
    UnitSizes(net, units)
    assert len(units) == 8 and units.reads == 1
