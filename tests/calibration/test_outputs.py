"""Trees of outputs, and which mask is theirs."""

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from octavo.calibration.outputs import described, leaves, mask_for, part, parts

Pair = namedtuple("Pair", "first second")


@dataclass
class Box:
    corner: torch.Tensor
    inner: dict


def test_leaves_are_the_floating_tensors_that_every_example_has():
    x = torch.randn(4, 3)
    result = {
        "loss": torch.tensor(1.0),
        "box": Box(x, {"scores": [x[:, 0], x.long()], "none": None}),
        "levels": Pair(x[:2], SimpleNamespace(mask=x.half())),
        "past_key_values": (x, x),
        "hidden_states": (x,),
        "empty": torch.zeros(4, 0),
    }
    assert list(leaves(result, 4)) == ["box.corner", "box.inner.scores.0", "levels.second.mask"]
    assert list(leaves((x, [x]), 4)) == ["0", "1.0"]
    assert leaves(x, 4)[""] is x


def test_parts_have_names():
    x = torch.randn(4, 3)
    assert part({"logits": x}, "logits") is x and part(SimpleNamespace(logits=x), "logits") is x
    assert part(x, "real") is None and part((x, x), "logits") is None
    assert list(parts(Pair(x, x))) == ["first", "second"] and parts(x) == {}
    assert described({"a": x, "b": None}) == "dict (a)" and described(x) == "Tensor"


class Model(nn.Module):
    def __init__(self, main="input_ids", paired=False):
        super().__init__()
        self.main_input_name = main
        self.config = SimpleNamespace(is_encoder_decoder=paired)


MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
OTHER = torch.tensor([[1, 0, 0], [1, 1, 1]])
STATES = torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    ("model", "batch", "name", "expected"),
    [
        (nn.Linear(2, 2), {"attention_mask": MASK}, "", MASK),
        (Model(), {"attention_mask": MASK}, "logits", MASK),
        (Model(), {"attention_mask": MASK[:, :2]}, "logits", None),
        (Model(), (MASK,), "logits", None),
        (Model("input_values"), {"attention_mask": MASK}, "logits", None),
        (Model(), {"attention_mask": MASK}, "vision_model_output.last_hidden_state", None),
        (Model(), {"attention_mask": MASK}, "text_model_output.last_hidden_state", MASK),
        (Model(paired=True), {"attention_mask": MASK}, "logits", None),
        (Model(paired=True), {"attention_mask": MASK, "decoder_attention_mask": OTHER}, "logits", OTHER),
        (Model(paired=True), {"attention_mask": MASK, "labels": OTHER * 100 - 100}, "logits", OTHER.bool()),
        (Model(paired=True), {"attention_mask": MASK}, "encoder_last_hidden_state", MASK),
        (Model("input_features", True), {"attention_mask": MASK}, "encoder_last_hidden_state", None),
        (nn.Linear(2, 2), {"attention_mask": MASK, "decoder_input_ids": MASK}, "logits", None),
    ],
)
def test_masks_are_those_of_their_own_side(model, batch, name, expected):
    found = mask_for(name, STATES, model, batch)
    assert found is expected or torch.equal(found, expected)
