"""Depth, merged heads and the search over shapes."""

import doctest

import pytest
import torch

pytest.importorskip("transformers")
import sys
from pathlib import Path

import octavo.cuts.depth
import octavo.cuts.layers
from octavo.calibration.objective import KL
from octavo.cuts import best, saved
from octavo.cuts.depth import losses_without, without_run
from octavo.cuts.merging import merged_heads
from octavo.cuts.searching import shares_near
from octavo.cuts.structured import Structured
from octavo.errors import RequestError

sys.path.insert(0, str(Path(__file__).parent))
from small_transformers import batch_of, outputs_of, small


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


def test_the_last_heads_that_stay_take_the_residual_of_the_first_that_go():
    model = small("bert")
    units = Structured(("head",)).units(model)[:1]
    name = units[0].name
    scores = {name: torch.tensor([3.0, 1.0, 4.0, 2.0])}
    kept = best(scores, 0.25)
    before = model.encoder.layer[0].attention.self.key.weight.detach().view(4, 8, 32)
    merged = merged_heads(model, units, kept, scores).encoder.layer[0].attention.self.key.weight.view(4, 8, 32)
    # Ranked 2, 0, 3, 1: head 1 goes, and head 3 is the last that stays.
    assert torch.allclose(merged[3], 2 * before[3] - before[1])
    assert torch.equal(merged[[0, 1, 2]], before[[0, 1, 2]])


def test_keys_that_queries_share_are_left_alone():
    model = small("llama")
    units = Structured(("head",)).units(model)[:1]
    scores = {units[0].name: torch.tensor([1.0, 2.0])}
    merged = merged_heads(model, units, best(scores, 0.5), scores).model.layers[0].self_attn
    own = model.model.layers[0].self_attn
    assert torch.equal(merged.k_proj.weight, own.k_proj.weight)
    assert torch.allclose(merged.q_proj.weight[16:], 2 * own.q_proj.weight[16:] - own.q_proj.weight[:16])


def test_shapes_of_about_the_size_asked_for_are_found():
    model = small("llama")
    units = Structured(("head", "neuron", "layer")).units(model)
    whole = sum(parameter.numel() for parameter in model.parameters())
    grid = {"head": (0.0, 0.5), "neuron": (0.0, 0.25, 0.5), "layer": (0.0, 0.34)}
    found = list(shares_near(model, units, round(0.7 * whole), grid, 0.1))
    assert 0 < len(found) < 12
    for shares in found:
        kept = best({part.name: torch.arange(part.count) for part in units}, shares)
        assert abs(whole - saved(model, units, kept) - 0.7 * whole) <= 0.1 * 0.7 * whole
    with pytest.raises(RequestError, match="no shares of the kind 'layer'"):
        list(shares_near(model, units, whole, {"head": (0,), "neuron": (0,)}))
    assert outputs_of(model, batch_of("llama")).shape == (6, 12, 61)
