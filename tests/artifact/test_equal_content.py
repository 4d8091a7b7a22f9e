"""Tensors of equal content, and of other content with the same checksum, are written and read as what they are."""

import zlib

import pytest
import torch
from torch import nn

import octavo


class Three(nn.Module):
    """Two layers side by side, and one behind."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 48, bias=False), nn.Linear(64, 48, bias=False), nn.Linear(48, 48)

    def forward(self, x):
        return self.c(self.a(x) + self.b(x))


def colliding(content):
    """Other bytes with the same CRC-32: those of its polynomial are added, which changes the remainder by nothing."""
    polynomial = 0x104C11DB7
    bits = [polynomial >> (32 - place) & 1 for place in range(33)]
    mask = bytes(sum(bit << k for k, bit in enumerate(bits[at : at + 8])) for at in range(0, 33, 8))
    changed = bytearray(content)
    for place, byte in enumerate(mask):
        changed[place] ^= byte
    return bytes(changed)


def pair(kind):
    """Two matrices in float16 that are no copies of one, or that are."""
    torch.manual_seed(0)
    one = torch.randn(48, 64).half()
    if kind == "zero":
        return torch.zeros(48, 64), torch.zeros(48, 64)
    if kind == "equal":
        return one.float(), one.float()
    other = torch.frombuffer(bytearray(colliding(one.numpy().tobytes())), dtype=torch.float16).reshape(48, 64)
    assert other.isfinite().all() and not torch.equal(one, other)
    assert zlib.crc32(one.numpy().tobytes()) == zlib.crc32(other.numpy().tobytes())
    return one.float(), other.float()


@pytest.mark.parametrize("keep", ["float16", "bfloat16", "rtn:bits=4,group=16"])
@pytest.mark.parametrize("kind", ["zero", "equal", "colliding"])
def test_a_pair_of_matrices(kind, keep, tmp_path):
    module = Three().eval()
    one, other = pair(kind)
    module.a.weight.data, module.b.weight.data = one.clone(), other.clone()
    data = [torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    done = octavo.compress(module, ratio=1.3, data=data, objective="squared", keep={"[ab].*": keep}, preset="fast")
    done.save(tmp_path / "out")
    assert octavo.verify(tmp_path / "out").weights_match
    found = octavo.load(tmp_path / "out")
    if keep == "float16":
        assert torch.equal(found["a.weight"], one) and torch.equal(found["b.weight"], other)
    assert torch.equal(found["a.weight"], found["b.weight"]) == (kind != "colliding")


@pytest.mark.parametrize("kind", ["zero", "colliding"])
def test_tensors_that_are_no_sites(kind, tmp_path):
    module = Three().eval()
    module.register_buffer("left", pair(kind)[0].half().flatten())
    module.register_buffer("right", pair(kind)[1].half().flatten())
    octavo.compress(module, ratio=1.3, preset="data-free").save(tmp_path / "out")
    found = octavo.load(tmp_path / "out")
    assert octavo.verify(tmp_path / "out").weights_match
    assert torch.equal(found["left"], module.left) and torch.equal(found["right"], module.right)
