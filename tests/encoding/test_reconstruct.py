"""Reconstruction on a small network: better on held-back data, within its bytes, and the same in the artifact."""

import copy

import pytest
import torch
from torch import nn

import octavo
from octavo.calibration.objective import Loss
from octavo.forms.scaled import Scaled


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 256), nn.LayerNorm(256), nn.GELU(),
        nn.Linear(256, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(64, 64, generator=generator)
    return [torch.randn(32, 64, generator=generator) @ mixing for _ in range(16)]


@pytest.fixture(scope="module")
def pair(data):
    """The same network with and without; both have the same budget."""
    module = network()
    return {
        preset: octavo.compress(module, ratio=14, data=data, preset=preset, methods=["entropy", "keep"])
        for preset in ("fast", "default")
    }


def test_it_is_better_on_held_back_data_and_within_the_bytes(pair):
    assert pair["default"].built.quality < pair["fast"].built.quality
    assert pair["default"].built.bytes <= pair["default"].budget.bytes


def test_the_artifact_holds_what_was_learned(pair, tmp_path):
    done = pair["default"]
    report = done.save(tmp_path / "out", report=False)
    assert report["artifact"]["bytes"] == done.built.bytes
    artifact = octavo.Artifact(tmp_path / "out")
    learned = artifact.tensor("1.weight")
    assert not torch.allclose(learned.float(), network()[1].weight, atol=1e-4)
    assert torch.equal(learned, done.built.contents.kept["1.weight"].tensor().to(learned.dtype))


def test_the_source_is_left_as_it_was(data):
    module = network().train()
    module[0].weight.requires_grad_(False)
    before, flags = copy.deepcopy(module.state_dict()), [p.requires_grad for p in module.parameters()]
    octavo.compress(module, ratio=14, data=data, methods=["entropy", "keep"])
    assert module.training and [p.requires_grad for p in module.parameters()] == flags
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_the_same_seed_gives_the_same_bytes(data, pair):
    again = octavo.compress(network(), ratio=14, data=data, methods=["entropy", "keep"])
    ours, theirs = again.built.contents, pair["default"].built.contents
    assert {n: e.packed.crc for n, e in ours.entries.items()} == {n: e.packed.crc for n, e in theirs.entries.items()}
    assert {n: k.measured for n, k in ours.kept.items()} == {n: k.measured for n, k in theirs.kept.items()}


def test_what_the_user_leaves_alone_is_not_learned(data):
    done = octavo.compress(
        network(), ratio=8, data=data, methods=["entropy", "keep"], keep={"3.weight": "entropy:step=0.02"}
    )
    assert "gains" not in done.built.packed["3.weight"].parts


def test_a_loss_of_the_users_own_is_not_trained_on(data):
    module = network()
    labelled = [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in data]

    def loss(module, batch):
        return nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")

    done = octavo.compress(module, ratio=14, data=labelled, objective=Loss(loss), methods=["entropy", "keep"])
    kept = done.built.contents.kept["1.weight"]
    assert torch.equal(kept.tensor(), module[1].weight.detach().to(kept.stored))


def test_gains_scale_rows():
    from octavo.forms import Dense

    form = Scaled(Dense(torch.ones(3, 2)), torch.tensor([0, 128, -64], dtype=torch.int16))
    assert torch.allclose(form.dense()[:, 0], torch.tensor([1.0, 2.0, 2**-0.5]))


class Padded(nn.Conv2d):
    """Pads by itself, as EfficientNet's convolutions do, so it is no layer whose inputs calibration can read."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(x, (0, 2, 0, 2)))


@pytest.mark.parametrize("kind", [nn.Conv2d, Padded])
def test_an_image_counts_as_often_as_it_uses_a_weight(kind):
    torch.manual_seed(0)
    net = nn.Sequential(
        kind(3, 32, 3), nn.ReLU(), kind(32, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 16)
    )
    steps = []
    images = torch.randn(48, 3, 16, 16)
    octavo.compress(net.eval(), ratio=5, data=images, progress=lambda what, done, total: steps.append((what, total)))
    # More than a hundred places of every image: 16,384 positions are less than four times all images.
    taken = {total for what, total in steps if what == "reconstruct"}
    assert len(taken) == 1
    assert max(taken) <= 4 * 48 / 4


def test_where_scales_are_stored_anyway_each_gets_a_gain(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=96, tie_word_embeddings=False, initializer_range=0.3)
    transformers.LlamaForCausalLM(config).half().save_pretrained(tmp_path / "source")
    tokens = [{"input_ids": torch.randint(96, (8, 32))} for _ in range(24)]
    asked = {"bits": 6.5, "data": tokens, "target": "compressed-tensors", "progress": False}
    plain, learned = (octavo.compress(tmp_path / "source", preset=preset, **asked) for preset in ("fast", "default"))
    assert learned.built.counted == plain.built.counted
    assert learned.built.quality < 0.99 * plain.built.quality
