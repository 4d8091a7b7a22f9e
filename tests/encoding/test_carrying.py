"""A plan of `octavo plan` is carried out within its budget; an edited one to the letter, or refused with what would fit."""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import octavo
from octavo.allocation.budget import USED
from octavo.allocation.plans import EDITED, MIXED, read_plan
from octavo.cli import app

WORDS = 120
TOKENS = [torch.randint(0, WORDS, (8, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
BATCHES = [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)} for tokens in TOKENS]
IMAGES = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def bert(folder):
    config = BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "bert")
    return folder / "bert", {"data": BATCHES}


def llama(folder):
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    return folder / "llama", {"data": BATCHES}


def bare(folder):
    tensors = {"first.weight": torch.randn(96, 64), "second.weight": torch.randn(64, 96), "bias": torch.randn(64)}
    save_file(tensors, folder / "bare.safetensors")
    return folder / "bare.safetensors", {}


def net(folder):
    layers = [nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32 * 16, 40)).eval(), {"data": IMAGES, "objective": "kl"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A source, what it is compressed with, and its profile; each made once."""
    made = {}

    def make(kind, **more):
        key = (kind.__name__, repr(more))
        if key not in made:
            folder = tmp_path_factory.mktemp(kind.__name__)
            torch.manual_seed(0)
            source, request = kind(folder)
            octavo.profile(source, folder / "measured", **request, **more)
            made[key] = source, request, folder / "measured"
        return made[key]

    return make


def reachable(profile, count):
    """So many ratios from barely above one to nearly the largest that ``plan`` accepts."""
    with pytest.raises(octavo.BudgetError) as refused:
        octavo.plan(profile, ratio=1e6)
    most = refused.value.limit
    return [1.25 * (most / 1.25) ** (k / (count - 1)) for k in range(count)]


def counted(folder):
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix == ".safetensors" or file.name == "octavo.json")  # fmt: skip


def check(source, request, profile, ratio, folder, **more):
    octavo.plan(profile, ratio=ratio).save(folder / "plan.yaml", overwrite=True)
    done = octavo.compress(source, plan=folder / "plan.yaml", **request, **more)
    report = done.save(folder / f"out {ratio}", report=False)
    used = counted(folder / f"out {ratio}")
    assert done.budget.asked == f"ratio {ratio:g}"
    assert used <= done.budget.bytes and report["source"]["bytes"] / used >= ratio
    assert used >= USED * done.budget.bytes or report["artifact"]["note"]
    return used / done.budget.bytes


def test_ten_ratios_of_a_bert_are_met(measured, tmp_path):
    source, request, profile = measured(bert, preset="fast")
    shares = [check(source, request, profile, ratio, tmp_path) for ratio in reachable(profile, 10)]
    assert min(shares) >= USED


@pytest.mark.parametrize("kind", [llama, bare, net])
def test_other_sources_meet_theirs(measured, tmp_path, kind):
    source, request, profile = measured(kind, preset="fast")
    for ratio in reachable(profile, 4)[1:]:
        check(source, request, profile, ratio, tmp_path)


@pytest.mark.parametrize("methods", [["rtn"], ["svd"], ["gptq", "keep"], ["activation-svd"]])
def test_methods_without_a_continuous_setting_meet_theirs(measured, tmp_path, methods):
    source, request, profile = measured(bare, methods=methods)
    for ratio in reachable(profile, 4):
        check(source, request, profile, ratio, tmp_path)


def test_a_profile_at_hand_is_used(measured, tmp_path):
    source, request, profile = measured(bert, preset="fast")
    for ratio in reachable(profile, 3):
        check(source, request, profile, ratio, tmp_path, workspace=profile, resume=True, preset="fast")


def test_a_budget_of_memory_is_met(measured, tmp_path):
    source, request, profile = measured(bare, target="memory")
    for ratio in reachable(profile, 4):
        octavo.plan(profile, ratio=ratio).save(tmp_path / "plan.yaml", overwrite=True)
        done = octavo.compress(source, plan=tmp_path / "plan.yaml", target="memory", **request)
        assert done.built.counted <= done.budget.bytes and done.ratio >= ratio


def test_what_was_pinned_is_not_moved(measured, tmp_path):
    source, request, profile = measured(bare, preset="fast", keep={"first*": "entropy:step=0.01"})
    octavo.plan(profile, ratio=6).save(tmp_path / "plan.yaml", overwrite=True)
    done = octavo.compress(source, plan=tmp_path / "plan.yaml", **request)
    assert done.built.plan.points["first.weight"].setting == {"step": 0.01}
    assert USED * done.budget.bytes <= done.built.counted <= done.budget.bytes
    with pytest.raises(
        octavo.RequestError, match=r"plan\.yaml: site 'first\.weight' has entropy step=0\.01, and --keep"
    ):
        octavo.compress(source, plan=tmp_path / "plan.yaml", keep={"first*": "float16"}, **request)


def edited(file, change):
    data = yaml.safe_load(file.read_text())
    change(data)
    file.write_text(yaml.safe_dump(data))


def test_only_choices_and_the_budget_make_a_plan_an_edited_one(measured, tmp_path):
    _, _, profile = measured(bare, preset="fast")
    file, sites = tmp_path / "plan.yaml", ["first.weight", "second.weight"]
    octavo.plan(profile, ratio=5).save(file, overwrite=True)
    assert read_plan(file, sites).label == MIXED
    for change in (
        lambda data: data["sites"]["first.weight"].update(bytes=1, loss=0),
        lambda data: data.update(sites=dict(reversed(data["sites"].items()))),
    ):
        edited(file, change)
        assert read_plan(file, sites).label == MIXED
    for change in (
        lambda data: data["sites"]["first.weight"]["setting"].update(step=0.5),
        lambda data: data.update(budget=data["budget"] + 1),
        lambda data: data.pop("digest"),
    ):
        octavo.plan(profile, ratio=5).save(file, overwrite=True)
        edited(file, change)
        assert read_plan(file, sites).label == EDITED


def test_an_edited_plan_is_kept_as_it_is(measured, tmp_path):
    source, request, profile = measured(bare, preset="fast")
    octavo.plan(profile, ratio=5).save(tmp_path / "plan.yaml", overwrite=True)
    edited(tmp_path / "plan.yaml", lambda data: data["sites"]["first.weight"].update(method="rtn", setting={"bits": 2, "group": 16}))  # fmt: skip
    wanted = read_plan(tmp_path / "plan.yaml", ["first.weight", "second.weight"]).points
    done = octavo.compress(source, plan=tmp_path / "plan.yaml", **request)
    for name, point in done.built.plan.points.items():
        assert (point.method, point.setting) == (wanted[name].method, wanted[name].setting)
    assert done.built.counted < USED * done.budget.bytes


@pytest.mark.parametrize(
    "choice",
    [("rtn", {"bits": 8, "group": 16}), ("keep", {"dtype": "float32"}), ("entropy", {"step": 1e-5})],
    ids=lambda choice: choice[0],
)
def test_an_edited_plan_that_does_not_fit_says_where_and_what_would(measured, tmp_path, choice):
    source, request, profile = measured(bare, preset="fast")
    file = tmp_path / "plan.yaml"
    octavo.plan(profile, ratio=5).save(file, overwrite=True)
    edited(file, lambda data: data["sites"]["first.weight"].update(method=choice[0], setting=choice[1]))
    with pytest.raises(octavo.RequestError) as refused:
        octavo.compress(source, plan=file, **request)
    said = str(refused.value)
    total, excess, budget = map(
        int, re.search(r"takes (\d+) bytes, (\d+) more than its budget of (\d+)", said).groups()
    )
    assert str(file) in said and total == budget + excess
    assert re.search(r"'first\.weight' takes \d+ bytes, but the plan states \d+", said)
    # What the error says would fit, does.
    edited(file, lambda data: data.update(budget=total))
    done = octavo.compress(source, plan=file, **request)
    assert done.built.counted == total
    # And its words are not those of the old budget.
    assert done.budget.asked == f"size {total}"


def test_a_coarser_setting_that_is_named_fits(measured, tmp_path):
    source, request, profile = measured(bare, preset="fast")
    file = tmp_path / "plan.yaml"
    octavo.plan(profile, ratio=5).save(file, overwrite=True)
    edited(file, lambda data: data["sites"]["first.weight"]["setting"].update(step=data["sites"]["first.weight"]["setting"]["step"] * 0.6))  # fmt: skip
    with pytest.raises(octavo.RequestError, match="would fit") as refused:
        octavo.compress(source, plan=file, **request)
    site, method, step = re.search(r"'([\w.]+)' (\w+) step=([\d.e-]+) \(\d+ bytes\) would fit", str(refused.value)).groups()  # fmt: skip
    edited(file, lambda data: data["sites"][site].update(method=method, setting={"step": float(step)}))
    done = octavo.compress(source, plan=file, **request)
    assert done.built.counted <= done.budget.bytes


def test_a_plan_of_another_source_says_so_and_claims_no_ratio(measured, tmp_path):
    _, request, profile = measured(bare, preset="fast")
    octavo.plan(profile, ratio=5).save(tmp_path / "plan.yaml", overwrite=True)
    torch.manual_seed(1)
    other, _ = bare(tmp_path)
    done = octavo.compress(other, plan=tmp_path / "plan.yaml", **request)
    assert done.budget.asked == f"size {done.budget.bytes}"
    assert USED * done.budget.bytes <= done.built.counted <= done.budget.bytes
    assert any("made for another source" in note for note in done.opened.notes)


def test_the_three_commands_of_the_guide(measured, tmp_path):
    source, _, _ = measured(bare, preset="fast")
    for words in (
        ("profile", source, "--preset", "fast", "--out", tmp_path / "measured"),
        ("plan", tmp_path / "measured", "--ratio", "7", "--out", tmp_path / "plan.yaml"),
        ("compress", source, "--plan", tmp_path / "plan.yaml", "--out", tmp_path / "out"),
        ("compress", source, "--plan", tmp_path / "plan.yaml", "--profile", tmp_path / "measured", "--out", tmp_path / "again"),
    ):  # fmt: skip
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
    for out in ("out", "again"):
        budget = json.loads((tmp_path / out / "report.json").read_text())["budget"]
        assert budget["asked"] == "ratio 7"
        assert USED * budget["bytes"] <= counted(tmp_path / out) <= budget["bytes"]
