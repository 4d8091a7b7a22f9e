"""Depth: the run of layers that goes."""

import doctest

import pytest
import torch

pytest.importorskip("transformers")
import sys
from pathlib import Path

import octavo.cuts.depth
import octavo.cuts.layers
from octavo.calibration.objective import KL
from octavo.cuts.depth import losses_without, without_run
from octavo.cuts.structured import Structured
from octavo.errors import RequestError

sys.path.insert(0, str(Path(__file__).parent))
from small_transformers import batch_of, small


@pytest.mark.parametrize("module", [octavo.cuts.depth, octavo.cuts.layers])
def test_examples_say_what_happens(module):
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


def test_the_run_of_layers_that_loses_least_goes():
    model, batch = small("llama"), batch_of("llama")
    with torch.no_grad():
        # The last layer adds next to nothing.
        model.model.layers[2].self_attn.o_proj.weight *= 1e-3
        model.model.layers[2].mlp.down_proj.weight *= 1e-3
    (layers,) = Structured(("layer",)).units(model)
    losses = losses_without(model, layers, 1, [batch], KL())
    kept = without_run(layers, losses)
    assert losses.shape == (3,) and kept["model.layers:layer"].tolist() == [True, True, False]
    thinner = Structured(("layer",), "magnitude", compensate=False)
    thinner = thinner.apply(model, kept, thinner.observe(model, [batch]))
    assert float(losses[2]) == pytest.approx(
        float(KL().measure(thinner, [batch], KL().reference(model, [batch])).mean()), abs=1e-6
    )
    with pytest.raises(RequestError, match="3 of 3 units of the kind 'layer' cannot go"):
        losses_without(model, layers, 3, [batch], KL())
