"""Pooling: what the module of sentence-transformers gives, for every mode, side of padding and prompt."""

import pytest
import torch

from octavo.calibration.objective import Cosine
from octavo.calibration.pooling import MODES, modes_of, pooled
from octavo.errors import RequestError

Pooling = pytest.importorskip("sentence_transformers.sentence_transformer.modules").Pooling
RIGHT = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
MASKS = {"none": None, "right": RIGHT, "left": RIGHT.flip(1)}


@pytest.mark.parametrize("pooling", [*MODES, "cls+mean", "mean+mean_sqrt_len_tokens+max"])
@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("prompt", [0, 2])
def test_every_mode_is_that_of_sentence_transformers(pooling, padding, prompt):
    states, mask = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0)), MASKS[padding]
    theirs = Pooling(5, pooling_mode=tuple(pooling.split("+")), include_prompt=False)
    features = {
        "token_embeddings": states,
        "prompt_length": prompt,
        **({} if mask is None else {"attention_mask": mask}),
    }
    expected = theirs(features)["sentence_embedding"]
    assert torch.equal(pooled(states, mask, modes_of(pooling), prompt), expected)


def test_half_precision_is_summed_in_single_precision():
    states = torch.randn(3, 6, 5).bfloat16()
    for mode in MODES:
        theirs = Pooling(5, pooling_mode=mode)({"token_embeddings": states, "attention_mask": RIGHT})
        assert torch.equal(pooled(states, RIGHT, (mode,)), theirs["sentence_embedding"])


def test_means_without_padding_are_those_of_torch():
    states = torch.randn(3, 6, 5)
    assert torch.equal(pooled(states, None, ("mean",)), states.mean(1))


@pytest.mark.parametrize("pooling", ["middle", "cls+", "CLS"])
def test_unknown_modes_are_refused(pooling):
    with pytest.raises(RequestError, match="lasttoken"):
        Cosine(pooling)
