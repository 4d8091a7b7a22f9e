"""Policy gradients: exact in expectation, steadier with a baseline, and they find the best arm of a bandit."""

import itertools

import pytest
import torch

from octavo.errors import RequestError
from octavo.methods.policies import Credit, Reinforce, Rollout

#: Rewards of six arms, all positive; the fifth is the best.
ARMS = torch.tensor([1.0, 2.0, 1.5, 0.5, 3.0, 2.5]) + 10


def pulled(logits, count, generator):
    arms = torch.multinomial(logits.detach().softmax(0), count, replacement=True, generator=generator)
    noise = 0.3 * torch.randn(count, generator=generator)
    logs = logits.log_softmax(0)
    return [Rollout(int(a), logs[a].view(1), (ARMS[a] + e).view(1)) for a, e in zip(arms, noise, strict=True)]


def test_the_best_arm_of_a_bandit_is_found():
    generator, logits = torch.Generator().manual_seed(0), torch.zeros(len(ARMS), requires_grad=True)
    learner = Reinforce(torch.optim.Adam([logits], lr=0.1))
    for _ in range(80):
        learner.update(pulled(logits, 5, generator))
    assert float(logits.detach().softmax(0)[int(ARMS.argmax())]) > 0.9


def test_a_baseline_makes_gradients_steadier():
    spreads = []
    for memory in (0.9, None):
        generator, steps = torch.Generator().manual_seed(0), []
        logits = torch.zeros(len(ARMS), requires_grad=True)
        learner = Reinforce(torch.optim.SGD([logits], lr=1e-6), memory=memory)
        for _ in range(40):
            before = logits.detach().clone()
            learner.update(pulled(logits, 5, generator))
            steps.append(logits.detach() - before)
        spreads.append(float(torch.stack(steps[1:]).std(0).norm()))
    assert spreads[0] < 0.3 * spreads[1]


def test_with_shared_credit_a_bad_rollout_is_reinforced_with_the_good():
    steps = []
    for credit in (Credit.TO_GO, Credit.SHARED):
        logits = torch.zeros(2, requires_grad=True)
        learner = Reinforce(torch.optim.SGD([logits], lr=1.0), credit)
        learner.baseline = torch.tensor([4.0])
        logs = logits.sigmoid().log()
        learner.update([Rollout(n, logs[[n]], torch.tensor([reward])) for n, reward in enumerate((10.0, 2.0))])
        steps.append(logits.tolist())
    # Half of each advantage, 6 and -2, and half of it again by the slope; shared is the mean of both.
    assert steps == [[1.5, -0.5], [0.5, 0.5]]


@pytest.mark.parametrize("baseline", [None, torch.tensor([0.7, -2.0])])
def test_in_expectation_it_is_the_gradient_of_the_expected_reward(baseline):
    # Two steps of two choices each; the second reward depends on both.
    logits, paid = torch.tensor([[0.3, -0.2], [0.1, 0.5]]), torch.tensor([[1.0, 4.0], [2.0, -1.0]])
    first = torch.tensor([0.5, -1.5])
    exact = logits.clone().requires_grad_()
    chances = exact.softmax(1)
    (chances[0] @ first + chances[0] @ paid @ chances[1]).backward()
    total = torch.zeros_like(logits)
    for a, b in itertools.product(range(2), range(2)):
        moved = logits.clone().requires_grad_()
        learner = Reinforce(torch.optim.SGD([moved], lr=1.0), memory=None if baseline is None else 0.5)
        learner.baseline = baseline
        logs = moved.log_softmax(1)
        drawn = Rollout((a, b), torch.stack([logs[0, a], logs[1, b]]), torch.stack([first[a], paid[a, b]]))
        learner.update([drawn])
        total += (logs[0, a] + logs[1, b]).detach().exp() * (moved.detach() - logits)
    assert torch.allclose(total, exact.grad, atol=1e-6)


def test_a_choice_with_its_own_credit_ignores_later_rewards():
    logits = torch.zeros(2, requires_grad=True)
    Reinforce(torch.optim.SGD([logits], lr=1.0), Credit.OWN, None).update(
        [Rollout("", logits.sigmoid().log(), torch.tensor([0.0, 8.0]))]
    )
    assert logits.tolist() == [0.0, 4.0]


def test_the_baseline_is_the_running_mean_and_the_first_update_takes_its_own():
    logits = torch.zeros(1, requires_grad=True)
    learner = Reinforce(torch.optim.SGD([logits], lr=1.0), memory=0.75)
    learner.update([Rollout("", logits.sigmoid().log(), torch.tensor([4.0]))])
    assert logits.item() == 0 and learner.baseline.item() == 4
    learner.update([Rollout("", logits.sigmoid().log(), torch.tensor([8.0]))])
    assert logits.item() == 2 and learner.baseline.item() == 5


def test_what_cannot_be_learned_from_is_refused():
    logits = torch.zeros(1, requires_grad=True)
    learner = Reinforce(torch.optim.SGD([logits], lr=1.0))
    one, two = (Rollout("", logits.expand(n), torch.ones(n)) for n in (1, 2))
    for rollouts, says in (
        ([], "an update has none"),
        ([one, two], "number 1 has logarithms of shape"),
        ([Rollout("", logits, torch.tensor([float("nan")]))], "is not finite; give every outcome a number"),
    ):
        with pytest.raises(RequestError, match=says):
            learner.update(rollouts)
    with pytest.raises(RequestError, match="from 0 to below 1"):
        Reinforce(learner.optimizer, memory=1.0)
