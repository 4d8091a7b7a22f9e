"""N2N: chains as data, rewards, candidates that are tried once, and policies that learn to find small nets."""

import pytest
import torch
from torch import nn

from octavo.errors import RequestError
from octavo.methods.policies import Credit
from octavo.training import accuracy, cross_entropy, fit
from octavo.training.chain_nets import ChainNet, ConvLayer
from octavo.training.n2n import (
    RemovalPolicy,
    ShrinkagePolicy,
    Trials,
    above_limit,
    lessons,
    random_search,
    reward,
    searched,
    taught,
)

NET = ChainNet(1, (ConvLayer(8), ConvLayer(8, kernel=5), ConvLayer(8, stride=2), ConvLayer(12, pooled=True)), 3)


IMAGES = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(0))
SCORE = [(IMAGES, (IMAGES.mean((1, 2, 3)) > 0).long())]


def trials(net=NET, **options):
    torch.manual_seed(0)
    teacher = net.module()
    fit(teacher, lambda epoch: SCORE, cross_entropy, epochs=6, lr=3e-2)
    return Trials(teacher, IMAGES.split(24), SCORE, starts=1, **options)


def test_a_description_builds_a_net_and_is_read_back_from_it():
    module = NET.module()
    assert ChainNet.of(module) == NET and hash(ChainNet.of(module)) == hash(NET)
    assert NET.parameters == sum(p.numel() for p in module.parameters())
    assert module(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert ChainNet.of(nn.ModuleList([module[:6], nn.Dropout(), module[6:]])) == NET


def test_layers_go_but_not_those_that_shrink_the_image():
    assert [layer.channels for layer in NET.kept([True, False, False, False]).layers] == [8, 8, 12]
    assert [layer.channels for layer in NET.shrunk([0.5, 0.01, 1.0, 0.25]).layers] == [4, 1, 8, 3]
    with pytest.raises(RequestError, match="2 answers for 4 layers"):
        NET.kept([True, False])
    with pytest.raises(RequestError, match="a net without a layer"):
        ChainNet(1, NET.layers[:1], 3).kept([False])


def chain(*pools, norm=None, mean=None, linear=None, **options):
    """A convolution and a linear layer, with what a chain may or may not have."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, bias=False, **options), norm or nn.BatchNorm2d(2), nn.ReLU(), *pools,
        mean or nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear or nn.Linear(2, 3),
    )  # fmt: skip


def test_pools_of_equal_effect_are_read_alike():
    for pool in (nn.MaxPool2d(2), nn.MaxPool2d((2, 2), stride=(2, 2))):
        assert ChainNet.of(chain(pool)).layers == (ConvLayer(2, pooled=True),)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (nn.Sequential(nn.Linear(3, 3)), "after 0 convolutions it has Linear"),
        (nn.Sequential(nn.Conv2d(1, 2, 3)), "is not the convolution of a chain"),
        (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.ReLU()), "is followed by BatchNorm2d and ReLU"),
        (NET.module()[:-1], "after 4 convolutions it has AdaptiveAvgPool2d"),
        (chain(nn.MaxPool2d(2, stride=1)), "is not the pooling of a chain"),
        (chain(nn.MaxPool2d(3, stride=2)), "is not the pooling of a chain"),
        (chain(nn.MaxPool2d(2, padding=1)), "is not the pooling of a chain"),
        (chain(nn.MaxPool2d(2, dilation=2)), "is not the pooling of a chain"),
        (chain(nn.MaxPool2d(2, ceil_mode=True)), "give nn.MaxPool2d"),
        (chain(mean=nn.AdaptiveAvgPool2d(2)), r"leaves 2 pixels; a chain takes the mean of all"),
        (chain(linear=nn.Linear(2, 3, bias=False)), "has no bias"),
        (chain(norm=nn.BatchNorm2d(2, affine=False)), "needs weights and running statistics"),
        (chain(padding_mode="reflect"), "is not the convolution of a chain"),
    ],
)
def test_what_is_no_chain_is_refused(module, says):
    with pytest.raises(RequestError, match=says):
        ChainNet.of(module)


def test_rewards():
    assert reward(0.0, 1.0) == 0 and reward(1.0, 0.9) == pytest.approx(0.9)
    assert reward(0.9, 1.0) == pytest.approx(0.99), "a tenth of the parameters gives nearly all of it"
    assert above_limit(0.5, 0) == 0.5 and above_limit(0.5, 15) == above_limit(0.5, 40) == -1
    assert above_limit(0.5, 5) == pytest.approx((2 / 3) ** 4 * 1.5 - 1)


def test_a_candidate_is_tried_once_and_valued_by_what_it_saves():
    known = trials(limit=500)
    small, large = NET.shrunk([0.25] * 4), NET
    first = known.of(small)
    assert known.of(small) == first and len(known.tried) == 1
    gone = 1 - small.parameters / NET.parameters
    assert first.reward == pytest.approx(reward(gone, first.accuracy / accuracy(known.teacher, known.score)))
    assert known.of(large, 0).reward == 0 and known.of(large, 15).reward == -1


def test_students_learn_the_outputs_of_the_teacher():
    module = NET.module().eval()
    images = torch.randn(4, 1, 8, 8)
    logits = module(images).detach()
    assert taught(module, (images, logits)).item() == pytest.approx(0, abs=1e-6)
    assert taught(module, (images, logits + 3)).item() == pytest.approx(0, abs=1e-6), "only differences count"
    (pair,) = lessons(module, [images])
    assert torch.equal(pair[1], logits) and taught(module, (images, logits * 2)).item() > 0


def test_policies_know_the_probability_of_what_they_draw():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    net, logs = RemovalPolicy().draw(NET, generator)
    assert logs.shape == (4,) and bool((logs <= 0).all()) and logs[2:].tolist() == [0, 0], "these two must stay"
    assert set(net.layers) <= set(NET.layers)
    net, logs = ShrinkagePolicy().draw(NET, generator)
    assert logs.shape == (4,) and len(net.layers) == 4
    assert all(a.channels <= b.channels for a, b in zip(net.layers, NET.layers, strict=True))


def test_a_search_finds_small_nets_its_policies_go_on_elsewhere_and_random_search_has_as_many():
    known = trials()
    found = searched(known, removals=3, shrinkages=4, rollouts=3, rates=(0.1, 0.1))
    assert len(found.drawn) <= 21 and len(found.rewards) == 7
    assert found.evaluations == len(known.tried) and found.best.net.parameters < NET.parameters
    assert searched(known, removals=3, shrinkages=4, rollouts=3, rates=(0.1, 0.1)).drawn == found.drawn
    shared = searched(known, removals=3, shrinkages=4, rollouts=3, rates=(0.1, 0.1), credit=Credit.SHARED)
    assert shared.drawn != found.drawn
    other = searched(known, removals=0, shrinkages=1, rollouts=2, start=found)
    assert len(other.drawn) == 2 and other.shrinkage is not found.shrinkage
    nets = random_search(known, 6)
    assert len({trial.net for trial in nets}) == 6
    with pytest.raises(RequestError, match="different nets, not 3; ask for fewer"):
        random_search(trials(ChainNet(1, (ConvLayer(1, pooled=True),), 3)), 3)


def test_trials_need_batches_and_a_trained_teacher():
    wrong = [(IMAGES, torch.full((48,), 2))]
    with pytest.raises(RequestError, match="has nothing right on what candidates are scored on; train it first"):
        Trials(trials().teacher, IMAGES.split(24), wrong)
    with pytest.raises(RequestError, match="give at least one of each"):
        Trials(NET.module(), [], [])


def test_a_net_above_the_limit_teaches_the_policies_but_never_wins():
    options = {"removals": 0, "shrinkages": 1, "rollouts": 8}
    free = searched(trials(), **options)
    # Policies have patience with such nets at first, so that the same one has the highest reward again.
    known = trials(limit=free.best.net.parameters - 1)
    found = searched(known, **options)
    assert found.drawn[0].net == free.drawn[0].net and not all(trial.fits for trial in found.drawn)
    assert max(found.drawn, key=lambda trial: trial.reward).net == free.best.net
    assert found.best.fits and found.best.net.parameters <= known.limit
    with pytest.raises(RequestError, match=r"the smallest net that was drawn has \d+ parameters, which is above"):
        _ = searched(trials(limit=1), **options).best
