"""The ranking loss: it is what its formula says, and its gradient acts."""

import pytest
import torch
from torch import nn

from octavo.errors import RequestError
from octavo.training import few_misses, fit, ranking_loss


def test_it_is_the_formula():
    scores, positive = torch.tensor([2.0, -1.0, 0.5, 1.0, -3.0]), torch.tensor([1, 1, 1, 0, 0])
    assert float(ranking_loss(scores, positive)) == pytest.approx((0 + 2.0**2 + 0.5**2) / 3)


def test_the_gradient_lifts_positives_and_lowers_the_hardest_negative():
    scores = torch.tensor([2.0, -1.0, 0.5, 1.0, -3.0], requires_grad=True)
    ranking_loss(scores, torch.tensor([1, 1, 1, 0, 0])).backward()
    rising = -scores.grad
    assert rising[0] == 0 and rising[1] > rising[2] > 0 > rising[3] and rising[4] == 0
    # What positives gain the hardest negative loses.
    assert float(rising.sum()) == pytest.approx(0)
    with torch.no_grad():
        for _ in range(100):
            scores.grad = None
            with torch.enable_grad():
                ranking_loss(scores, torch.tensor([1, 1, 1, 0, 0])).backward()
            scores -= 0.5 * scores.grad
    assert scores[:3].min() > scores[3:].max() - 1e-3


@pytest.mark.parametrize("positive", [torch.zeros(3), torch.ones(3)])
def test_a_batch_of_one_class_has_no_ranking(positive):
    scores = torch.randn(3, requires_grad=True)
    value = ranking_loss(scores, positive)
    value.backward()
    assert value.item() == 0 and bool((scores.grad == 0).all())


def test_weights_count_errors_on_positives():
    model, batch = nn.Sequential(nn.Linear(2, 1)), (torch.randn(64, 2), (torch.arange(64) < 6).float())
    plain, weighted = (float(few_misses(weight)(model, batch)) for weight in (1.0, 3.0))
    scores = model(batch[0]).flatten()
    more = -2 * torch.nn.functional.logsigmoid(scores[:6]).sum() / 64
    assert weighted - plain == pytest.approx(float(more), rel=1e-4)
    ranked = float(few_misses(1.0, 0.5)(model, batch))
    assert ranked - plain == pytest.approx(0.5 * float(ranking_loss(scores.sigmoid(), batch[1])), rel=1e-3)


def test_a_rare_class_is_missed_less():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 4, generator=generator)
    y = (x[:, 0] + torch.randn(1024, generator=generator) > 2.2).float()
    missed = []
    for loss in (few_misses(), few_misses(8.0, 0.3)):
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        fit(model, lambda epoch: list(zip(x.split(128), y.split(128), strict=True)), loss, epochs=10, lr=3e-2)
        missed.append(float((model(x).flatten()[y == 1] <= 0).float().mean()))
    assert missed[1] < missed[0] - 0.2


@pytest.mark.parametrize("choices", [{"weight": 0.0}, {"weight": float("inf")}, {"ranking": -1.0}])
def test_weights_must_make_sense(choices):
    with pytest.raises(RequestError, match="few misses"):
        few_misses(**choices)
