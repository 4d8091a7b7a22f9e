"""Batch normalisation goes into the layer before it where the graph allows, and nowhere else."""

import copy
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations
from transformers import ResNetConfig, ResNetForImageClassification

import octavo

FOLDED = "folded into the preceding layer"


def seasoned(module):
    """A module in evaluation whose normalisations look as if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
            part.running_mean.normal_(generator=generator)
            # Variances over many octaves, as those of depthwise layers.
            part.running_var.normal_(generator=generator).mul_(2).exp_()
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.affine:
            part.weight.data.uniform_(0.3, 2, generator=generator)
            part.bias.data.normal_(generator=generator)
    return module.eval()


def images(count=48, channels=3, size=8):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """Convolutions that are normalised, and a head."""

    def __init__(self, width=48):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.first = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.two, self.second = nn.Conv2d(width, width, 3), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 10)

    def between(self, x):
        return x

    def forward(self, x):
        x = torch.relu(self.first(self.between(self.one(x))))
        x = torch.relu(self.second(self.between(self.two(x))))
        return self.head(x.mean((2, 3)))


class Apart(Net):
    """The same function, with something between that no fold can go through."""

    def between(self, x):
        return x + 0


class Residual(Net):
    def forward(self, x):
        one = self.one(x)
        x = torch.relu(self.first(one)) + one
        return self.head(torch.relu(self.second(self.two(x) + 0)).mean((2, 3)))


class Returned(Net):
    """What the layer gives is an output, too."""

    def forward(self, x):
        two = self.two(torch.relu(self.first(self.one(x) + 0)))
        return {"logits": self.head(torch.relu(self.second(two)).mean((2, 3))), "states": two}


class Detached(Net):
    """A use that no gradient shows."""

    def forward(self, x):
        one = self.one(x)
        x = torch.relu(self.first(one)) + one.detach()
        return self.head(torch.relu(self.second(self.two(x) + 0)).mean((2, 3)))


class Twice(Net):
    """One layer and one normalisation, run twice."""

    def forward(self, x):
        x = torch.relu(self.first(self.one(x) + 0))
        for _ in range(2):
            x = torch.relu(self.second(self.two(x)))
        return self.head(x.mean((2, 3)))


class Shared(Net):
    """A normalisation that follows two layers."""

    def forward(self, x):
        x = torch.relu(self.first(self.one(x)))
        return self.head(torch.relu(self.first(self.two(x))).mean((2, 3)))


class Borrowed(Net):
    """A weight that is used outside of its layer."""

    def forward(self, x):
        x = torch.relu(self.first(self.one(x) + 0))
        x = torch.relu(self.second(self.two(x)))
        return self.head(x.mean((2, 3)) + self.two.weight.mean((1, 2, 3)))


class Tied(Net):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.third = nn.Identity(), nn.Conv2d(48, 48, 3, padding=1, bias=False)
        self.third.weight = self.two.weight

    def forward(self, x):
        x = torch.relu(self.second(self.two(torch.relu(self.one(x)))))
        return self.head(torch.relu(self.third(x)).mean((2, 3)))


class Parametrized(Net):
    def __init__(self):
        super().__init__()
        self.first = nn.Identity()
        self.two = parametrizations.weight_norm(self.two)


class OfTheBatch(Net):
    """Normalisations without statistics of their own."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(48, track_running_stats=False)
        self.second = nn.BatchNorm2d(48, track_running_stats=False)


def pair(layer, norm, *after):
    torch.manual_seed(0)
    return nn.Sequential(layer, norm, nn.ReLU(inplace=True), *after)


PAIRS = {
    "convolution": lambda: (pair(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Flatten()), images()),
    "with a bias": lambda: (pair(nn.Conv2d(3, 64, 3, bias=True), nn.BatchNorm2d(64, eps=0.3), nn.Flatten()), images()),
    "depthwise": lambda: (pair(nn.Conv2d(64, 128, 3, groups=64), nn.BatchNorm2d(128), nn.Flatten()), images(48, 64, 4)),
    "transposed": lambda: (
        pair(nn.ConvTranspose2d(16, 24, 3, groups=4, stride=2), nn.BatchNorm2d(24), nn.Flatten()),
        images(48, 16, 4),
    ),
    "one dimension": lambda: (pair(nn.Conv1d(16, 40, 3), nn.BatchNorm1d(40), nn.Flatten()), torch.randn(48, 16, 9)),
    "three dimensions": lambda: (
        pair(nn.Conv3d(4, 24, 3), nn.BatchNorm3d(24), nn.Flatten()),
        torch.randn(48, 4, 4, 4, 4),
    ),
    "linear": lambda: (pair(nn.Linear(24, 64), nn.BatchNorm1d(64)), torch.randn(48, 24)),
    "linear without bias": lambda: (pair(nn.Linear(24, 64, bias=False), nn.BatchNorm1d(64)), torch.randn(48, 24)),
    "without gain": lambda: (pair(nn.Linear(24, 64), nn.BatchNorm1d(64, affine=False)), torch.randn(48, 24)),
    "a dead channel": lambda: (dead(), images()),
}


def dead():
    module = pair(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Flatten())
    module[0].weight.data[3], module[1].running_var[3] = 0, 0
    return module


def compressed(module, data, path, ratio=1.2, **choices):
    """The report, and the same kind of module with what was read from the disk."""
    choices = {"preset": "fast", "methods": ["keep"], **choices}
    done = octavo.compress(module, ratio=ratio, data=data, **choices)
    report = done.save(path, report=False)
    loaded = octavo.load(path, into=copy.deepcopy(module))
    return report, loaded


def notes(report):
    return [note for note in report["calibration"]["warnings"] if FOLDED in note]


@pytest.mark.parametrize("kind", PAIRS)
def test_a_layer_takes_the_normalisation_in(kind, tmp_path):
    torch.manual_seed(3)
    module, data = PAIRS[kind]()
    seasoned(module)
    if kind == "a dead channel":
        module[1].running_var[3] = 0
    before = copy.deepcopy(module.state_dict())
    report, loaded = compressed(module, [data], tmp_path / "out", objective="squared")
    assert len(notes(report)) == 1
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    norm, old = loaded[1], module[1]
    assert torch.allclose(norm.running_var, torch.full_like(norm.running_var, 1 - norm.eps))
    if norm.affine:
        assert not norm.running_mean.any() and bool((norm.weight == 1).all())
    assert loaded[0].bias is None or not loaded[0].bias.any()
    with torch.no_grad():
        wanted = old(module[0](data))
        error = (norm(loaded[0](data)) - wanted).norm() / wanted.norm()
    assert error < 2e-3
    assert report["quality"]["value"] < 1e-5


@pytest.mark.parametrize(
    "kind", [Apart, Residual, Returned, Detached, Twice, Shared, Borrowed, Tied, Parametrized, OfTheBatch]
)
def test_what_others_read_is_left_alone(kind):
    module = seasoned(kind())
    if kind is OfTheBatch:
        module.second.bias.data.zero_()
    objective = (
        octavo.calibration.objective.Loss(lambda m, x: m(x)["logits"].square().sum(1)) if kind is Returned else "kl"
    )
    done = octavo.compress(module, ratio=1.2, data=[images()], objective=objective, preset="fast", methods=["keep"])
    assert not any(FOLDED in note for note in done.opened.notes)
    assert kind is Returned or done.built.quality < 1e-3


def test_what_was_to_be_ignored_is_left_alone(tmp_path):
    module = seasoned(Net())
    report, loaded = compressed(module, [images()], tmp_path / "out", ratio=1.02, ignore=["two.weight"])
    assert notes(report)[0].startswith("1 batch normalisation was")
    assert torch.equal(loaded.two.weight, module.two.weight)
    assert not torch.allclose(loaded.one.weight, module.one.weight, rtol=0.1)


class Separable(nn.Module):
    """Depthwise and pointwise convolutions, whose normalisations have about as many numbers as their weights."""

    def __init__(self, between=nn.Identity):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 64, 3, bias=False), nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 96, 1, bias=False)]
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.BatchNorm2d(layer.out_channels) for layer in layers)
        self.between, self.head = between(), nn.Linear(96, 10)

    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.relu(norm(self.between(layer(x))))
        return self.head(x.mean((2, 3)))


class PlusZero(nn.Module):
    """What changes nothing, and what no fold can go through."""

    def forward(self, x):
        return x + 0


def test_fewer_bytes_and_no_less_quality(tmp_path):
    """Beside the same function with something between layers and normalisations."""
    folded, plain = (
        compressed(seasoned(Separable(kind)), [images(128)], tmp_path / kind.__name__, ratio=5, methods=None)[0]
        for kind in (nn.Identity, PlusZero)
    )
    sizes = [sum(row["bytes"] for row in report["kept"] if "norms" in row["name"]) for report in (folded, plain)]
    assert notes(folded) and not notes(plain)
    assert sizes[0] < 0.5 * sizes[1]
    assert folded["quality"]["value"] < 0.7 * plain["quality"]["value"]
    assert folded["source"]["fingerprint"] == plain["source"]["fingerprint"]


def test_quality_is_that_of_the_loaded_module_against_the_original(tmp_path):
    module, data = seasoned(Net()), images(96)
    done = octavo.compress(module, ratio=10, data=[data], preset="default")
    report = done.save(tmp_path / "out", report=False)
    loaded = octavo.load(tmp_path / "out", into=Net().eval())
    (held,) = done.opened.held_data
    with torch.no_grad():
        old, new = module(held).log_softmax(1), loaded(held).log_softmax(1)
    # So small a divergence is a sum of terms that cancel: its last digits are those of float32.
    found = float((old.exp() * (old - new)).sum(1, dtype=torch.float64).mean())
    assert report["quality"]["value"] == pytest.approx(found, rel=1e-3, abs=1e-7)


def test_without_data_a_graph_must_be_traced(tmp_path):
    report, loaded = compressed(seasoned(Net()), None, tmp_path / "plain", preset="data-free")
    assert notes(report)[0].startswith("2 batch")
    assert bool((loaded.first.weight == 1).all())
    module, data = seasoned(Net()), images()
    with torch.no_grad():
        assert (loaded(data) - module(data)).norm() < 0.05 * module(data).norm()


class Branching(Net):
    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)


class Hooked(Net):
    def __init__(self):
        super().__init__()
        for layer in (self.one, self.two):
            layer.register_forward_hook(lambda module, args, output: output * 2)


@pytest.mark.parametrize("kind", [Apart, Residual, Returned, Detached, Twice, Shared, Branching, Hooked])
def test_without_data_nothing_is_guessed(kind):
    done = octavo.compress(seasoned(kind()), ratio=1.2, preset="data-free", methods=["keep"])
    assert not any(FOLDED in note for note in done.opened.notes)


def test_linear_layers_need_data_since_channels_may_be_positions(tmp_path):
    module = seasoned(nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40)))
    data = torch.randn(48, 40, 40)
    for name, given in (("with", [data]), ("without", None)):
        choices = {"objective": "squared", "preset": "fast"} if given else {"preset": "data-free"}
        report, loaded = compressed(module, given, tmp_path / name, **choices)
        assert not notes(report)
        with torch.no_grad():
            assert (loaded(data) - module(data)).norm() < 0.1 * module(data).norm()


def test_a_run_is_resumed_with_the_same_bytes(tmp_path):
    files = []
    for resume in (False, True):
        done = octavo.compress(
            seasoned(Net()), ratio=8, data=[images()], preset="fast", workspace=tmp_path / "room", resume=resume
        )
        done.save(tmp_path / f"{resume}", report=False)
        files.append((tmp_path / f"{resume}" / "model.safetensors").read_bytes())
    assert files[0] == files[1]


_FRESH = """
import sys, torch, octavo
from transformers import AutoModelForImageClassification
model, info = AutoModelForImageClassification.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
torch.save(model.eval()(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])
"""


def test_a_folder_loads_with_from_pretrained(tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=5)
    model = seasoned(ResNetForImageClassification(config))
    model.save_pretrained(tmp_path / "model")
    data = images(48, 3, 32)
    batches = [{"pixel_values": batch} for batch in data.split(16)]
    done = octavo.compress(tmp_path / "model", ratio=4, data=batches, preset="fast", objective="kl")
    report = done.save(tmp_path / "out", report=False)
    assert notes(report)[0].startswith("6 batch")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    name = "resnet.embedder.embedder.normalization.running_var"
    assert stored[name].dtype == torch.uint8 and stored[name].numel() < 64
    torch.save(data, tmp_path / "data.pt")
    words = [str(tmp_path / name) for name in ("out", "data.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", _FRESH, *words], check=True, timeout=120)
    with torch.no_grad():
        old = model(data).logits.log_softmax(1)
    new = torch.load(tmp_path / "logits.pt").log_softmax(1)
    assert float((old.exp() * (old - new)).sum(1).mean()) < 10 * report["quality"]["value"] + 1e-6
