"""The way through, end to end, on small real things."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import octavo
from octavo.errors import BudgetError, RequestError


def network():
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(inplace=True),
        nn.Conv2d(24, 48, 3, padding=1, stride=2), nn.BatchNorm2d(48), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(48 * 16, 192), nn.ReLU(), nn.Linear(192, 10),
    )  # fmt: skip


@pytest.fixture(scope="session")
def digits():
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return images[:1300], torch.tensor(data.target)[:1300], images[1300:], torch.tensor(data.target)[1300:]


@pytest.fixture(scope="session")
def trained(digits):
    torch.manual_seed(0)
    module, (images, labels, *_) = network(), digits
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
    for _ in range(3):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(images[batch]), labels[batch]).backward()
            optimizer.step()
    return module.eval()


def accuracy(module, images, labels):
    with torch.no_grad():
        return float((module.eval()(images).argmax(1) == labels).float().mean())


def on_disk(folder):
    return sum(
        file.stat().st_size for file in folder.iterdir() if file.suffix == ".safetensors" or file.name == "octavo.json"
    )


@pytest.fixture(scope="session")
def compressed(trained, digits, tmp_path_factory):
    result = {}
    for ratio in (8, 16):
        path = tmp_path_factory.mktemp("digits") / "out"
        done = octavo.compress(trained, ratio=ratio, data=list(digits[0][:256].split(64)), preset="fast")
        result[ratio] = done, done.save(path), path
    return result


@pytest.mark.parametrize("ratio", [8, 16])
def test_a_convolutional_network_meets_its_budget(compressed, trained, ratio):
    done, report, path = compressed[ratio]
    original = sum(t.numel() * t.element_size() for t in trained.state_dict().values())
    assert done.budget.bytes == int(original / ratio)
    assert 0.98 * original / ratio <= on_disk(path) <= original / ratio
    assert report["artifact"]["bytes"] == on_disk(path) == octavo.Artifact(path).bytes == done.built.bytes
    assert done.ratio >= ratio


@pytest.mark.parametrize("ratio, lost", [(8, 0.02), (16, 0.05)])
def test_a_convolutional_network_keeps_its_accuracy(compressed, trained, digits, ratio, lost):
    *_, images, labels = digits
    before = accuracy(trained, images, labels)
    assert before > 0.85
    assert accuracy(octavo.load(compressed[ratio][2], into=network()), images, labels) >= before - lost


@pytest.mark.parametrize("ratio", [8, 16])
def test_what_is_loaded_is_what_was_measured(compressed, trained, digits, ratio):
    done, report, path = compressed[ratio]
    fresh = octavo.load(path, into=network()).eval()
    held, wanted = done.opened.held_data, done.opened.objective
    reference = wanted.reference(trained, held)
    assert report["quality"]["value"] == float(wanted.measure(fresh, held, reference).mean())
    assert report["quality"]["value"] == pytest.approx(done.built.quality, rel=0.1)
    for name, value in fresh.state_dict().items():
        assert value.dtype == trained.state_dict()[name].dtype


@pytest.mark.parametrize("ratio", [8, 16])
def test_never_worse_than_uniform(compressed, ratio):
    done, report, _ = compressed[ratio]
    if done.rival is not None:
        assert done.built.quality <= done.rival.quality
        assert done.rival.bytes <= done.budget.bytes
    assert done.rival is not None or done.built.plan.label != "mixed" or report["uniform"] is None


def test_a_family_that_won_no_site_is_told_with_its_figures(trained, digits, tmp_path):
    """A report names every family that was tried: with the sites it won, or with how far behind it was."""
    data, methods = list(digits[0][:128].split(64)), ["entropy", "magnitude", "svd", "keep"]
    done = octavo.compress(trained, ratio=8, data=data, methods=methods)
    report = done.save(tmp_path / "out", report=False)
    assert {*report["families"], *report["unused"]} - {"keep"} == {"quantize", "prune", "factorize"}
    assert not set(report["families"]) & set(report["unused"]) and report["unused"]
    for found in report["unused"].values():
        assert 0 < found["sites"] <= len(report["sites"])
        if found["times"]:
            assert found["times"][0] <= found["times"][1] and found["nearest"] in done.built.plan.points


def test_a_family_may_have_methods_with_nothing_to_offer():
    """Tables of large nets are looked at by a sample before anything else, and not every method has a setting there."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(40_000, 16), nn.Flatten(), nn.Linear(64, 4))
    batches = [torch.randint(0, 40_000, (32, 4)) for _ in range(2)]
    with pytest.raises(BudgetError, match="at most"):
        octavo.compress(module, ratio=1e6, data=batches, objective="squared", methods=["factorize"])


def test_the_model_that_was_compressed_is_unchanged(digits):
    torch.manual_seed(0)
    module = network().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    octavo.compress(module, ratio=4, data=[digits[0][:64]], preset="fast", methods=["entropy"])
    assert module.training and all(child.training for child in module.modules())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


@pytest.mark.parametrize("preset", ["fast", "default"])
def test_statistics_of_a_module_in_training_mode_stay(tmp_path, preset):
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Linear(64, 16)

        def forward(self, x):
            hidden = self.first(x)
            # Read beside the norm, so that it cannot be folded.
            return self.last(torch.relu(self.norm(hidden)) + hidden)

    torch.manual_seed(0)
    module = Skipping()
    for _ in range(3):
        module(torch.randn(32, 16) * 2 + 1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    done = octavo.compress(module, ratio=3, data=[torch.randn(32, 16)], objective="squared", preset=preset)
    done.save(tmp_path / "out")
    assert module.training and all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert octavo.verify(tmp_path / "out")


def test_same_seed_same_bytes(trained, digits, tmp_path):
    data = list(digits[0][:64].split(32))
    files = []
    for name in ("one", "two"):
        octavo.compress(trained, ratio=8, data=data, preset="fast", methods=["entropy"], seed=7).save(
            tmp_path / name, report=False
        )
        files.append([(tmp_path / name / f).read_bytes() for f in ("model.safetensors", "octavo.json")])
    assert files[0] == files[1]


def test_an_unreachable_ratio_names_one_that_works(trained, digits):
    request = {"data": [digits[0][:64]], "preset": "fast", "methods": ["entropy"]}
    with pytest.raises(BudgetError) as caught:
        octavo.compress(trained, ratio=5000, **request)
    assert f"{caught.value.limit:g}" in str(caught.value)
    done = octavo.compress(trained, ratio=caught.value.limit, **request)
    assert done.built.bytes <= done.budget.bytes


def test_every_ratio_up_to_the_largest_is_reached():
    # Few bytes: the entries of forms in the manifest take as many as their content, and differ between methods.
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))
    request = {"data": [torch.randn(64, 128)], "objective": "squared"}
    for ratio in (50, 60, 70, 80):
        done = octavo.compress(module, ratio=ratio, **request)
        assert done.built.bytes <= done.budget.bytes


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    torch.manual_seed(0)
    tensors = {
        "embed.weight": torch.randn(400, 128) * 0.05,
        "dense.weight": torch.randn(256, 256) * torch.rand(256, 1),
        "dense.bias": torch.randn(256),
        "conv.weight": torch.randn(64, 64, 3, 3) * 0.02,
        "steps": torch.arange(7),
    }
    path = tmp_path_factory.mktemp("bare") / "bare.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("ratio", [8, 16])
def test_bare_tensors_are_compressed_without_data(bare, ratio, tmp_path):
    done = octavo.compress(bare, ratio=ratio, preset="fast")
    done.save(tmp_path / "out", report=False)
    original = load_file(bare)
    total = sum(t.numel() * t.element_size() for t in original.values())
    assert 0.98 * total / ratio <= on_disk(tmp_path / "out") <= total / ratio
    state = octavo.load(tmp_path / "out")
    assert set(state) == set(original) and torch.equal(state["steps"], original["steps"])
    for name in ("embed.weight", "dense.weight", "conv.weight"):
        correlation = np.corrcoef(state[name].flatten(), original[name].flatten())[0, 1]
        assert correlation > (0.95 if ratio == 8 else 0.8), name
    with pytest.raises(RequestError, match="no model to run"):
        octavo.compress(bare, ratio=ratio, data=["text"] * 20)


def test_shards_compress_as_the_whole(bare, tmp_path):
    tensors = load_file(bare)
    names = sorted(tensors)
    (tmp_path / "shards").mkdir()
    weight_map = {}
    for part, chosen in enumerate((names[:2], names[2:]), 1):
        file = f"model-{part:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, tmp_path / "shards" / file)
        weight_map.update(dict.fromkeys(chosen, file))
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    done = [
        octavo.compress(source, ratio=8, preset="fast", methods=["entropy"]) for source in (bare, tmp_path / "shards")
    ]
    done[1].save(tmp_path / "out")
    state = octavo.load(tmp_path / "out")
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in tensors.items()
    }
    assert done[1].opened.source.original_bytes == done[0].opened.source.original_bytes
    assert done[1].budget.least <= on_disk(tmp_path / "out") <= done[1].budget.bytes
    # The order of the tensors decides which one takes up the last bytes of the budget, and no more than that.
    assert done[1].built.quality == pytest.approx(done[0].built.quality, rel=0.02)


def test_ignored_sites_are_left_as_they_are(bare, tmp_path):
    done = octavo.compress(bare, ratio=2.5, preset="fast", ignore=["conv.*"], methods=["entropy"])
    report = done.save(tmp_path / "out", report=False)
    assert torch.equal(octavo.load(tmp_path / "out")["conv.weight"], load_file(bare)["conv.weight"])
    assert set(done.built.packed) == {"embed.weight", "dense.weight"}
    (row,) = (row for row in report["kept"] if row["name"] == "conv.weight")
    assert "conv.*" in row["reason"]


def test_kept_sites_get_what_was_asked_for(bare, tmp_path):
    keep = {"conv.*": "float16", "embed*": "rtn:bits=4,group=64"}
    done = octavo.compress(bare, ratio=4, preset="fast", keep=keep, methods=["entropy"])
    done.save(tmp_path / "out", report=False)
    points = done.built.plan.points
    assert (points["conv.weight"].method, points["conv.weight"].setting) == ("keep", {"dtype": "float16"})
    assert (points["embed.weight"].method, points["embed.weight"].setting) == ("rtn", {"bits": 4, "group": 64})
    assert points["dense.weight"].method == "entropy"
    original, state = load_file(bare), octavo.load(tmp_path / "out")
    assert torch.equal(state["conv.weight"], original["conv.weight"].half().float())
    rows = state["embed.weight"].unflatten(1, (2, 64))
    assert max(len(group.unique()) for row in rows for group in row) <= 16


@pytest.mark.parametrize(
    "request_, words",
    [
        ({"ignore": ["nothing*"]}, "nothing"), ({"keep": {"nothing*": "float16"}}, "nothing"),
        ({"keep": {"conv*": "magic"}}, "magic"), ({"keep": {"conv*": "rtn:bits"}}, "rtn:bits"),
        ({"methods": ["magic"]}, "magic"),
        ({"preset": "slow"}, "slow"), ({"ratio": None}, "exactly one"), ({"bits": 3}, "exactly one"),
        ({"ratio": 0.5}, "below 1"),
        ({"ratio": float("nan")}, "nan"), ({"keep": {"conv*": "rtn:bits=99,group=64"}}, "conv.weight"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_requests_are_refused(bare, request_, words):
    with pytest.raises(RequestError, match=words):
        octavo.compress(bare, **{"ratio": 8, "preset": "fast", **request_})


TEXT = "the a cat dog bird sees hears likes red blue old small house tree river and then again never"
WORDS = TEXT.split()


def gpt2_folder(path, tie=True):
    torch.manual_seed(0)
    vocabulary = {word: index for index, word in enumerate(["<eos>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<eos>", pad_token="<eos>"
    ).save_pretrained(path)
    config = GPT2Config(
        vocab_size=600,
        n_positions=64,
        n_embd=96,
        n_layer=2,
        n_head=4,
        tie_word_embeddings=tie,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def sentences():
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, generator.integers(4, 14))) for _ in range(48)]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, sentences):
    folder = tmp_path_factory.mktemp("gpt2")
    source = gpt2_folder(folder / "source")
    done = octavo.compress(source, ratio=8, data=sentences, preset="fast")
    report = done.save(folder / "out")
    return source, done, report, folder / "out"


def test_a_tied_language_model_meets_its_budget(gpt2):
    source, done, report, out = gpt2
    original = sum(t.numel() * t.element_size() for t in load_file(source / "model.safetensors").values())
    assert done.opened.source.original_bytes == original
    assert 0.98 * original / 8 <= on_disk(out) <= original / 8
    assert report["quality"]["metric"] == "KL divergence" and 0 < report["quality"]["value"] < 0.1
    assert done.rival is None or done.built.quality <= done.rival.quality
    assert (out / "tokenizer.json").exists()


def test_transformers_loads_the_artifact_bit_for_bit(gpt2, tmp_path):
    *_, out = gpt2
    tokens = torch.arange(24).reshape(2, 12)
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "import octavo\n"
        "from transformers import AutoModelForCausalLM, AutoModel\n"
        "tokens = torch.arange(24).reshape(2, 12)\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "assert model.lm_head.weight is model.transformer.wte.weight\n"
        "base = AutoModel.from_pretrained(sys.argv[1]).eval()\n"
        "with torch.no_grad():\n"
        "    match = octavo.verify(sys.argv[1]).outputs_match\n"
        "    torch.save([model(tokens).logits, base(tokens).last_hidden_state, match], sys.argv[2])\n"
    )
    done_ = subprocess.run(
        [sys.executable, "-c", script, str(out), str(tmp_path / "o.pt")], capture_output=True, text=True
    )
    assert done_.returncode == 0, done_.stderr
    logits, states, outputs_match = torch.load(tmp_path / "o.pt", weights_only=True)
    module = GPT2LMHeadModel(GPT2LMHeadModel.config_class.from_pretrained(out)).eval()
    state = octavo.Artifact(out).state()
    module.load_state_dict(
        {name if name in module.state_dict() else f"transformer.{name}": t for name, t in state.items()}, strict=False
    )
    module.tie_weights()
    with torch.no_grad():
        assert torch.equal(module(tokens).logits, logits)
        assert torch.equal(module.transformer(tokens).last_hidden_state, states)
    assert outputs_match is True
    assert octavo.verify(out).weights_match is True


def test_an_untied_head_is_a_site_of_its_own(tmp_path, sentences):
    source = gpt2_folder(tmp_path / "source", tie=False)
    done = octavo.compress(source, ratio=8, data=sentences, preset="fast", methods=["entropy"])
    assert done.opened.site("lm_head.weight").kind == "head"
    done.save(tmp_path / "out", report=False)
    loaded = octavo.load(tmp_path / "out")
    assert not torch.equal(loaded.lm_head.weight, loaded.transformer.wte.weight)
    assert 0.98 * done.budget.bytes <= on_disk(tmp_path / "out") <= done.budget.bytes


def test_outputs_are_whole_or_not_there(bare, tmp_path):
    done = octavo.compress(bare, ratio=8, preset="fast", methods=["entropy"])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(RequestError, match="not empty"):
        done.save(tmp_path / "taken")
    with pytest.raises(RequestError, match="Octavo did not write"):
        done.save(tmp_path / "taken", overwrite=True)
    assert (tmp_path / "taken" / "mine.txt").read_text() == "mine"
    (tmp_path / "taken" / "mine.txt").unlink()
    done.save(tmp_path / "taken")
    done.save(tmp_path / "taken", overwrite=True)
    assert octavo.verify(tmp_path / "taken").weights_match is True
    assert sorted(file.name for file in tmp_path.iterdir()) == ["taken"]


def test_empty_tensors_come_back(tmp_path):
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(128, 128))
    module.register_buffer("nothing", torch.empty(0))
    module.register_buffer("no_rows", torch.empty(0, 5, dtype=torch.int64))
    octavo.compress(module, ratio=4, preset="fast").save(tmp_path / "out", report=False)
    state = octavo.load(tmp_path / "out")
    assert state["nothing"].shape == (0,) and state["no_rows"].shape == (0, 5)
    assert state["nothing"].dtype == torch.float32 and state["no_rows"].dtype == torch.int64


def test_tensors_that_share_memory_in_part_come_back(tmp_path):
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(128, 128))
    module.bias = nn.Parameter(torch.randn(64))
    module.register_buffer("first", module.bias.data[:16])
    octavo.compress(module, ratio=4, preset="fast").save(tmp_path / "out", report=False)
    state = octavo.load(tmp_path / "out")
    torch.testing.assert_close(state["first"], state["bias"][:16])
    torch.testing.assert_close(state["bias"], module.bias.data, rtol=2e-3, atol=1e-5)


def test_data_free_preset_needs_no_data(tmp_path):
    """The preset asks the model nothing, not even for a text model's built-in text."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    done = octavo.compress(model, ratio=8, preset="data-free")
    done.save(tmp_path / "out", report=False)
    assert done.run.calibration.sequences == 0
    assert 0.98 <= done.built.bytes / done.budget.bytes <= 1
    restored = octavo.load(tmp_path / "out", into=nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)))
    error = (restored[0].weight - model[0].weight).detach().square().sum() / model[0].weight.detach().square().sum()
    assert float(error) < 0.01


@pytest.mark.parametrize("methods", [["entropy"], ["alds", "entropy"]], ids=str)
def test_a_weight_far_beyond_all_others_ends_no_run(methods, tmp_path):
    """The step that the budget would take is too fine for the code of such a weight."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(96, 64))
    with torch.no_grad():
        net[0].weight[3, 5] = 1e8
    done = octavo.compress(net, ratio=1.5, methods=methods, preset="best", progress=False)
    done.save(tmp_path / "out")
    loaded = octavo.load(tmp_path / "out", into=nn.Sequential(nn.Linear(96, 64)))[0].weight.detach()
    assert done.ratio >= 1.5 and loaded[3, 5] == pytest.approx(1e8, rel=1e-3)
