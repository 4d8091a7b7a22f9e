"""Moments of what layers read, and models changed layer by layer."""

import copy
import doctest

import pytest
import torch
from torch import nn

import octavo.calibration.layerwise
from octavo.calibration.blocks import Blocks
from octavo.calibration.evidence import Evidence
from octavo.calibration.layerwise import change_layers, input_moments
from octavo.calibration.objective import KL, Squared
from octavo.errors import RequestError
from octavo.methods import get_method
from octavo.methods.factorize.corrections import compensated_blocks


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.blocks = nn.Linear(8, 16), nn.ModuleList([Block(), Block(), Block()])

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def chain():
    torch.manual_seed(0)
    return Chain().eval(), [torch.randn(32, 8) for _ in range(3)]


def test_the_example_says_what_happens():
    assert doctest.testmod(octavo.calibration.layerwise, extraglobs={"torch": torch}).failed == 0


def test_moments_are_those_of_the_tokens_that_are_no_padding():
    layer, flow = nn.Embedding(10, 4), nn.Linear(4, 2)
    batch = {"input_ids": torch.arange(6).view(2, 3), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    with input_moments({"flow": flow}, [batch]) as moments:
        flow(layer(batch["input_ids"]))
    seen = layer.weight[[0, 1, 3]].double()
    assert torch.allclose(moments["flow"], seen.t() @ seen) and not flow._forward_pre_hooks


@pytest.mark.parametrize("in_order", [True, False])
def test_layers_are_visited_in_order_with_what_they_read(chain, in_order):
    model, batches = chain
    whole, changed = torch.cat(batches), copy.deepcopy(model)
    moments = {}

    def halved(name, layer, moment):
        moments[name] = moment
        return layer.weight / 2

    change_layers(changed, Squared(), batches, halved, layers=2, in_order=in_order)
    assert list(moments) == ["0.up.weight", "0.down.weight", "1.up.weight", "1.down.weight"]
    before = model.first(whole)
    read = changed.blocks[0](before) if in_order else model.blocks[0](before)
    assert torch.allclose(moments["1.up.weight"].float(), read.t() @ read, rtol=1e-4)
    assert torch.equal(changed.blocks[1].up.weight, model.blocks[1].up.weight / 2)
    assert torch.equal(changed.blocks[2].up.weight, model.blocks[2].up.weight)
    with pytest.raises(RequestError, match="has no chain of blocks"):
        change_layers(nn.Sequential(nn.Linear(2, 2)), Squared(), batches, halved)


def test_corrections_that_know_the_inputs_lose_less(chain):
    model, batches = chain
    forms = {}
    for name, weight in model.blocks.named_parameters():
        if name.endswith("weight"):
            forms[name] = get_method("rtn").encode(
                weight.detach(), {"bits": 2, "group": 8}, Evidence(torch.ones(len(weight)), None)
            )

    @torch.no_grad()
    def loss(found):
        made = copy.deepcopy(model)
        for name, form in found.items():
            made.blocks.get_parameter(name).data = form.dense()
        return float((made(torch.cat(batches)) - model(torch.cat(batches))).norm())

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = [loss(forms)]
    for known in (lambda moment: None, lambda moment: moment):
        losses.append(loss(compensated_blocks(model, Squared(), batches, forms, 3, 8, known=known)))
    assert losses == sorted(losses, reverse=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_block_of_a_model_with_a_cache_gives_the_same_each_time(attention):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model, batch = transformers.LlamaForCausalLM(config).eval(), {"input_ids": torch.arange(24).reshape(2, 12)}
    model.set_attn_implementation(attention)
    blocks = Blocks.find(model)
    blocks.check(KL(), batch)
    states, calls = blocks.prelude(KL(), batch)
    other = blocks.run(0, -states, calls[0])
    # A cache would hold the keys of the states before.
    once = blocks.run(0, states, calls[0])
    assert torch.equal(blocks.run(0, -states, calls[0]), other)
    after = blocks.run(1, once, calls[1])
    assert torch.allclose(blocks.postlude(KL(), batch, after), KL().outputs(model, batch), atol=1e-5)
    assert model.config.use_cache
