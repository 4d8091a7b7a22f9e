"""Attention over short sequences: the same numbers in another way, and PyTorch's own setting comes back."""

import torch
from torch.nn.functional import scaled_dot_product_attention as attend

from octavo.sources.batches import tokens_alone
from octavo.system.attention import SHORT, attention_for

enabled = torch.backends.cuda.flash_sdp_enabled


def test_outputs_and_gradients_are_the_same():
    queries, keys, values = torch.randn(3, 2, 4, 20, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 1, 20, 20).masked_fill_(torch.arange(20) > 15, -1e9)

    def computed():
        wanted = queries.clone().requires_grad_(True)
        outputs = attend(wanted, keys, values, attn_mask=mask)
        outputs.square().sum().backward()
        return outputs, wanted.grad

    usual = computed()
    with attention_for(20):
        plain = computed()
    assert "Flash" not in type(plain[0].grad_fn).__name__
    for one, other in zip(usual, plain, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_the_setting_comes_back():
    before = enabled()
    with attention_for(None), attention_for(SHORT + 1):
        assert enabled() == before
    with attention_for(SHORT):
        with attention_for(3):
            assert not enabled()
        assert not enabled()
    assert enabled() == before


def test_only_batches_of_tokens_have_a_length():
    tokens = torch.zeros(2, 7, dtype=torch.long)
    assert tokens_alone({"input_ids": tokens, "attention_mask": tokens.bool()}) == 7
    assert tokens_alone({"input_ids": tokens, "pixel_values": torch.zeros(2, 3, 8, 8)}) is None
    assert tokens_alone({"input_ids": tokens, "inputs": torch.zeros(2, 900)}) is None
    assert tokens_alone(tokens) is None and tokens_alone({}) is None
