"""The optimal brain surgeon under a curvature: exact counts, survivors of least loss, and its place among simpler ones."""

import pytest
import torch

from octavo.calibration.curvature import kronecker
from octavo.errors import RequestError
from octavo.methods.factorize.fisher_svd import fitted
from octavo.methods.prune.surgeon import pruned


@pytest.fixture(scope="module")
def layer():
    """A matrix and a curvature that is no product of moments."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(300, 10, generator=generator) @ torch.randn(10, 10, generator=generator)
    g = torch.randn(300, 6, generator=generator) * a[:, :1].abs()
    curvature = kronecker(g.t() @ g / 300, a.t() @ a / 300).corrected(g[:, :, None] * a[:, None])
    return torch.randn(6, 10, generator=generator), curvature


@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.7])
def test_survivors_are_those_of_least_loss(layer, zeros):
    weight, curvature = layer
    form = pruned(weight, curvature, zeros)
    matrix, mask = form.dense(), form.dense() != 0
    assert int((~mask).sum()) == round(zeros * weight.numel())
    # No gradient is left in what remains, so no other survivors lose less.
    gradient = curvature.times(matrix.double() - weight.double())
    assert float((gradient * mask).abs().max()) < 1e-4 * float(curvature.times(weight.double()).abs().max())


def test_the_curvature_beats_simpler_weights_of_errors(layer):
    weight, curvature = layer
    kinds = (
        curvature,
        curvature.simplified(),
        curvature.simplified(outputs=False),
        curvature.simplified(inputs=False, outputs=False),
    )
    torch.testing.assert_close(kinds[1].values, curvature.output_values[:, None] * curvature.input_values)
    assert bool((kinds[3].values == 1).all())
    for make in (pruned, fitted):
        losses = [curvature.loss(weight - make(weight, kind, 0.5).dense()) for kind in kinds]
        assert losses[0] == min(losses) and losses[3] == max(losses)


def test_shares_that_cannot_be_pruned_are_refused(layer):
    with pytest.raises(RequestError, match=r"zeros: is 1\.0; give a share from 0 to below 1"):
        pruned(*layer, 1.0)
