"""A budget of memory: what was stated is held, by whatever model runs, and the artifact says so."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import octavo
from octavo.cli import app
from octavo.errors import BudgetError, RequestError
from octavo.runtimes.packed import PackedWeight, held_bytes, kernels_of
from octavo.verification.verifying import PackedRun

WORDS, WIDTH = 512, 64
BATCHES = [
    {"input_ids": torch.randint(0, WORDS, (8, 16), generator=torch.Generator().manual_seed(seed))} for seed in range(4)
]

MODELS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    ),
    "bert": lambda: BertModel(
        BertConfig(
            vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64,
        )
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def folded(request, tmp_path_factory):
    """A folder of a tiny model, its artifact of a sixth of the memory, and the report."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    MODELS[request.param]().save_pretrained(folder / "source")
    done = octavo.compress(folder / "source", ratio=6, target="memory", data=BATCHES)
    return folder, done, done.save(folder / "out")


def test_the_budget_is_used_and_what_was_stated_is_held(folded):
    folder, done, report = folded
    assert 0.98 * done.budget.bytes <= done.built.counted <= done.budget.bytes
    assert done.ratio >= 6
    model = octavo.load(folder / "out", packed=True)
    held = sum(
        part.nbytes
        for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
        for part in (tensor.kernel.tensors() if isinstance(tensor, PackedWeight) else [tensor])
    )
    assert held == held_bytes(model) == report["running"]["held"]
    assert abs(held - done.built.counted) <= 0.001 * held
    assert report["budget"]["target"] == "memory" and report["running"]["stated"] == done.built.counted


def test_the_packed_model_gives_the_outputs_of_the_decoded_one(folded):
    folder, _, report = folded
    found = octavo.verify(folder / "out").packed
    assert 0 < found.error <= found.allowed < 0.1
    assert report["running"]["quality"] == pytest.approx(report["quality"]["value"], rel=0.1, abs=1e-4)
    decoded, packed = octavo.load(folder / "out").eval(), octavo.load(folder / "out", packed=True)
    with torch.inference_mode():
        exact, out = (next(iter(model(**BATCHES[0]).values())).float() for model in (decoded, packed))
    assert packed.dtype == torch.bfloat16
    assert float((out - exact).norm() / exact.norm()) < 0.05


def test_the_report_names_the_kernels_and_both_speeds(folded):
    folder, _, report = folded
    running = report["running"]
    assert any(name.startswith("int4") for name in running["kernels"])
    sites = kernels_of(octavo.load(folder / "out", packed=True))
    assert {name: len(found) for name, found in sites.items()} == running["kernels"]
    assert running["speed"]["packed"] > 0 and running["speed"]["dense"] > 0
    assert bool(running["note"]) == (running["speed"]["packed"] > running["speed"]["dense"])
    card = (folder / "out" / "README.md").read_text()
    assert "in memory" in card and "of memory" in card and "weight\\_int4pack" in card


def test_a_model_writes_the_same_from_packed_codes(folded):
    folder, *_ = folded
    packed = octavo.load(folder / "out", packed=True)
    if not packed.can_generate():
        return
    written = packed.generate(BATCHES[0]["input_ids"][:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert written.shape == (1, 20)


def test_inspect_and_verify_state_both_sizes(folded):
    folder, done, _ = folded
    shown = json.loads(CliRunner().invoke(app, ["inspect", str(folder / "out"), "--json"]).stdout)
    assert shown["resident"] == done.built.counted and shown["bytes"] == done.built.bytes
    verified = CliRunner().invoke(app, ["verify", str(folder / "out")])
    assert verified.exit_code == 0 and f"{done.built.counted:,} stated" in verified.stdout


def test_evaluate_measures_the_packed_model(folded):
    folder, _, report = folded
    found = octavo.evaluate(folder / "out", against=folder / "source", data=BATCHES, packed=True)
    assert found.mean == pytest.approx(report["running"]["quality"], rel=0.5, abs=1e-3)
    with pytest.raises(RequestError, match="not an artifact, so it cannot run packed"):
        octavo.evaluate(folder / "source", against=folder / "source", data=BATCHES, packed=True)


class Net(nn.Module):
    """A table tied to a head, a convolution and two layers."""

    def __init__(self):
        super().__init__()
        self.table, self.conv = nn.Embedding(256, WIDTH), nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.up, self.down = nn.Linear(WIDTH, 256), nn.Linear(256, WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)
        self.head.weight = self.table.weight

    def forward(self, index):
        hidden = self.table(index)
        hidden = hidden + self.conv(hidden.transpose(1, 2)).transpose(1, 2)
        return self.head((hidden + self.down(torch.relu(self.up(hidden))))[:, -1])


DATA = [torch.randint(0, 256, (16, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


def test_any_module_runs_packed(net, tmp_path):
    done = octavo.compress(net, ratio=6, target="memory", data=DATA, objective="kl")
    done.save(tmp_path / "out", report=False)
    packed = octavo.load(tmp_path / "out", into=Net(), packed=True)
    assert held_bytes(packed) == done.built.counted <= done.budget.bytes
    # Everything but the weights keeps its dtype.
    assert packed.up.bias.dtype == torch.float32 and packed(DATA[0]).dtype == torch.float32
    decoded = octavo.load(tmp_path / "out", into=Net())
    torch.testing.assert_close(packed(DATA[0]), decoded(DATA[0]).detach(), rtol=0.05, atol=0.3)


def test_artifacts_made_for_disk_run_packed_too(net, tmp_path):
    done = octavo.compress(net, ratio=6, data=DATA, objective="kl", preset="fast")
    done.save(tmp_path / "out", report=False)
    packed = octavo.load(tmp_path / "out", into=Net(), packed=True)
    decoded = octavo.load(tmp_path / "out", into=Net())
    assert held_bytes(packed) < held_bytes(decoded) / 2
    torch.testing.assert_close(packed(DATA[0]), decoded(DATA[0]).detach(), rtol=0.05, atol=0.3)
    assert octavo.Artifact(tmp_path / "out").resident is None


def test_bare_tensors_stay_packed(net, tmp_path):
    octavo.compress(net, ratio=6, target="memory", preset="data-free").save(tmp_path / "out", report=False)
    state = octavo.load(tmp_path / "out", packed=True)
    assert isinstance(state["up.weight"], PackedWeight) and isinstance(state["up.bias"], torch.Tensor)
    assert state["head.weight"] is state["table.weight"]


def test_what_cannot_be_held_is_refused_before_work(net):
    with pytest.raises(BudgetError, match=r"this source needs at least .* bytes in memory") as refused:
        octavo.compress(net, ratio=12, target="memory", data=DATA, objective="kl")
    done = octavo.compress(net, ratio=refused.value.limit, target="memory", data=DATA, objective="kl")
    assert done.built.counted <= done.budget.bytes


def test_bad_requests_say_what_to_do(net, tmp_path):
    with pytest.raises(RequestError, match=r"'tape' is not known; choose from .*memory"):
        octavo.compress(net, ratio=4, target="tape")
    with pytest.raises(RequestError, match="'entropy' has no setting that runs from memory; choose from gptq"):
        octavo.compress(net, ratio=4, target="memory", methods=["entropy"])
    octavo.profile(net, tmp_path / "measured", target="memory", preset="data-free")
    plan = octavo.plan(tmp_path / "measured", ratio=6)
    assert plan.bytes <= plan.budget.bytes and plan.budget.target == "memory"
    plan.save(tmp_path / "plan.yaml")
    with pytest.raises(RequestError, match="counts bytes for memory, not for disk"):
        octavo.compress(net, plan=tmp_path / "plan.yaml", preset="data-free")
    done = octavo.compress(net, plan=tmp_path / "plan.yaml", target="memory", preset="data-free")
    assert done.built.counted == plan.bytes


def test_a_pinned_site_keeps_its_form_and_is_counted(net):
    done = octavo.compress(
        net, ratio=4, target="memory", data=DATA, objective="kl", keep={"up.*": "rtn:bits=3,group=20"}
    )
    assert done.built.plan.points["up.weight"].setting == {"bits": 3, "group": 20}
    # No kernel takes groups of 16 columns: codes are held as bytes.
    assert done.built.plan.points["up.weight"].bytes >= 256 * 64


@pytest.mark.parametrize("data", [BATCHES, None])
@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_experts_that_are_one_tensor_while_they_run_are_counted_as_that(kind, data, tmp_path):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path / "source")
    request = {"data": data, "preset": "fast"} if data else {"preset": "data-free"}
    with pytest.raises(BudgetError, match="at most"):
        octavo.compress(tmp_path / "source", ratio=6, target="memory", **request)
    done = octavo.compress(tmp_path / "source", ratio=2.4, target="memory", **request)
    done.save(tmp_path / "out")
    found = octavo.verify(tmp_path / "out").packed
    assert found.held == found.stated <= done.budget.bytes


@pytest.mark.parametrize("kind", ["file", "module", "sharded"])
def test_what_has_no_model_to_run_is_verified_by_what_it_holds(kind, net, tmp_path):
    tensors = {f"{name}.weight": torch.randn(64, 48) for name in ("first", "second")} | {"bias": torch.randn(64)}
    source = net
    if kind == "file":
        source = tmp_path / "bare.safetensors"
        save_file(tensors, source)
    elif kind == "sharded":
        source = tmp_path / "model.safetensors.index.json"
        shards = {name: f"model-{k + 1:05d}-of-00003.safetensors" for k, name in enumerate(tensors)}
        for name, shard in shards.items():
            save_file({name: tensors[name]}, tmp_path / shard)
        source.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    done = octavo.compress(source, ratio=3, target="memory", preset="data-free")
    report = done.save(tmp_path / "out")
    # Bytes are counted, and nothing is said that was not.
    assert report["running"]["held"] == report["running"]["stated"] == done.built.counted
    assert "not measured of memory" not in (tmp_path / "out" / "README.md").read_text()
    packed = octavo.verify(tmp_path / "out").packed
    assert packed == PackedRun(stated=done.built.counted, held=done.built.counted)
    for words in (["verify"], ["verify", "--json"], ["inspect"]):
        result = CliRunner().invoke(app, [*words, str(tmp_path / "out")])
        assert result.exit_code == 0, result.output
    said = CliRunner().invoke(app, ["verify", str(tmp_path / "out")]).output
    assert "no model" in " ".join(said.split())
