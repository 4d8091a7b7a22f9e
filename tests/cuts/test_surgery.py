"""Tensors get other shapes, and layers state them."""

import doctest

import pytest
import torch
from torch import nn

import octavo.cuts.asked
import octavo.cuts.choosing
import octavo.cuts.surgery
from octavo.cuts import Slice, Units, best, resize, skeleton, trimmed, without
from octavo.cuts.chains import chain_units
from octavo.cuts.decoder import observe
from octavo.cuts.modegpt import MoDeGPT
from octavo.cuts.scores.magnitude import WeightMagnitude
from octavo.cuts.scoring import output_energies
from octavo.errors import RequestError


@pytest.mark.parametrize("module", [octavo.cuts.asked, octavo.cuts.choosing, octavo.cuts.surgery])
def test_examples_say_what_happens(module):
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


def channels(count, *slices):
    places = torch.arange(count)[:, None]
    return Units("channels", "channel", count, tuple(Slice(name, dim, places) for name, dim in slices))


def test_channels_of_convolutions_go_with_their_norms_and_readers():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1), nn.LayerNorm(5)
    ).eval()
    net[1].running_mean.normal_()
    kept = torch.tensor([True, False, True, True, False, True])
    hanging = [(f"{n}.{leaf}", 0) for n in (0, 1, 2) for leaf in ("weight", "bias")]
    units = channels(6, *hanging, ("1.running_mean", 0), ("1.running_var", 0), ("3.weight", 1))
    thin, images = without(net, [units], {"channels": kept}), torch.randn(2, 3, 9, 9)
    assert thin[2].groups == thin[3].in_channels == thin[1].num_features == 4 and net[0].out_channels == 6
    quiet = without(net, [], {})
    with torch.no_grad():
        quiet[3].weight[:, ~kept] = 0
        assert torch.allclose(thin(images), quiet(images), atol=1e-5)


def test_a_tensor_that_two_layers_share_is_cut_in_both():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    net[1].weight = net[0].weight
    thin = without(net, [channels(4, ("0.weight", 1))], {"channels": torch.arange(4) < 3})
    assert thin[0].weight is thin[1].weight and thin[1].in_features == thin[0].embedding_dim == 3
    assert thin(torch.tensor([1, 5])).shape == (2, 9)


def test_linear_layers_of_gpt2_hold_their_inputs_first():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(8, 5)
    net = nn.Sequential(conv1d)
    thin = without(net, [channels(8, ("0.weight", 1), ("0.bias", 0))], {"channels": torch.arange(8) < 2})
    assert thin(torch.ones(3, 5)).shape == (3, 2) and thin[0].nf == 2


@pytest.mark.parametrize(
    ("layer", "tensors", "says"),
    [
        (nn.Linear(3, 4), {"0.weight": torch.ones(2, 3)}, "bias has 4 entries for a weight of 2 rows"),
        (nn.Conv2d(4, 4, 1, groups=2), {"0.weight": torch.ones(2, 2, 1, 1)}, "in 2 groups cannot be cut"),
        (nn.ConvTranspose2d(4, 4, 1), {"0.weight": torch.ones(2, 4, 1, 1)}, "ConvTranspose2d cannot be cut"),
        (nn.Embedding(5, 4, padding_idx=0), {"0.weight": torch.ones(3, 4)}, "padding row cannot be cut"),
        (nn.Linear(3, 4), {"0.gain": torch.ones(2)}, "no parameter or buffer '0.gain'"),
    ],
)
def test_what_would_break_a_layer_is_refused(layer, tensors, says):
    with pytest.raises(RequestError, match=says):
        resize(nn.Sequential(layer), tensors)


def test_a_skeleton_has_other_shapes_and_leaves_the_model_alone():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    made = skeleton(net, {"0.weight": (2, 3), "0.bias": (2,), "1.weight": (2, 2), "1.bias": (2,)})
    assert made(torch.ones(3)).shape == (2,) and net[0].out_features == 4
    assert torch.equal(made[1].bias, net[1].bias)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan"), None])
def test_shares_out_of_range_are_refused(share):
    with pytest.raises(RequestError, match="must be from 0 to below 1"):
        best({"a": torch.ones(3)}, {"a": share})


def test_units_that_hang_on_no_tensor_are_refused():
    """Nothing would go, and nobody would notice."""
    net, empty = nn.Sequential(nn.Linear(3, 4)), Units("0", "neuron", 4, ())
    for act in (without, trimmed):
        with pytest.raises(RequestError, match="'0' names no tensor that loses its neurons, so nothing would go"):
            act(net, [empty], {"0": torch.arange(4) < 2})


def test_the_work_of_a_cut_is_linear_in_tensors():
    """A state dict is made as often for many layers as for few."""

    def made(count):
        net, calls = nn.Sequential(*(nn.Linear(4, 4) for _ in range(count))), []
        net.register_state_dict_pre_hook(lambda *_: calls.append(1))
        units = chain_units(net)
        calls.clear()
        without(net, units, {part.name: torch.arange(4) < 3 for part in units})
        return len(calls)

    assert made(9) == made(3) > 0


def test_one_unit_stays_and_scores_must_be_finite():
    assert best({"a": torch.tensor([1.0, 2.0, 2.0])}, 0.9)["a"].tolist() == [False, True, False]
    with pytest.raises(RequestError, match="score is not finite"):
        best({"a": torch.tensor([1.0, float("nan")])}, 0.5)


def test_slices_as_forms_hold_what_is_left_and_scores_say_what_goes():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=44,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, :11] = 0
            layer.mlp.gate_proj.weight[:11] = 1.0
    units = MoDeGPT().units(model)
    moments = observe(model, [{"input_ids": torch.randint(0, 64, (8, 16))}])
    for scores in (WeightMagnitude().scores(model, units, None), output_energies(model, moments)):
        assert {name: len(value) for name, value in scores.items()} == {part.name: part.count for part in units}
        kept = best(scores, 0.25)
        assert not kept["model.layers.1:mlp"][:11].any() and kept["model.layers.1:mlp"][11:].all()
        forms = trimmed(model, units, kept)
        assert len(forms) == 14 and forms["model.layers.0.mlp.down_proj.weight"].inner.weight.shape == (32, 33)
        weight = model.model.layers[0].self_attn.o_proj.weight
        dense = forms["model.layers.0.self_attn.o_proj.weight"].dense()
        gone = (dense == 0).all(0)
        assert int(gone.sum()) == 8 and torch.equal(dense[:, ~gone], weight[:, ~gone])
