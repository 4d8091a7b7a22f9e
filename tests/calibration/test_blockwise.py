"""Block by block a model gives the evidence and the measurements that it gives in memory, and needs only one block."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from octavo.allocation.workspace import Workspace
from octavo.calibration.blocks import Blocks
from octavo.calibration.blockwise import Blockwise
from octavo.calibration.inputs import choose_objective, model_of
from octavo.errors import RequestError
from octavo.sources.files import from_path

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
KINDS = {
    # Grouped-query attention everywhere; layers that differ in their masks; fused projections; a tied embedding.
    "llama": (transformers.LlamaForCausalLM, {**SIZES, "num_key_value_heads": 2}),
    "llama-tied": (transformers.LlamaForCausalLM, {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen": (transformers.Qwen3ForCausalLM, {**SIZES, "num_key_value_heads": 2, "head_dim": 8}),
    "gemma": (
        transformers.Gemma3ForCausalLM,
        {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4, "layer_types": WINDOWS},
    ),
    "phi": (transformers.Phi3ForCausalLM, {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    ),
    "bert": (transformers.BertModel, SIZES),
}


def write(kind: str, folder: Path) -> Path:
    cls, sizes = KINDS[kind]
    torch.manual_seed(0)
    module = cls(cls.config_class(**sizes)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    module.save_pretrained(folder)
    return folder


def padded_batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(count):
        mask = torch.ones(4, 12, dtype=torch.long)
        mask[1, 8:] = 0
        batches.append({"input_ids": torch.randint(1, 96, (4, 12), generator=generator), "attention_mask": mask})
    return batches


@pytest.fixture(scope="module", params=KINDS)
def ways(request, tmp_path_factory):
    """A model's source, and it as a whole and block by block with the evidence of each."""
    folder = tmp_path_factory.mktemp(request.param)
    write(request.param, folder / "model")
    result = {}
    for name in ("whole", "blocks"):
        source = from_path(folder / "model")
        sites, _ = source.sites()
        room = Workspace(folder / name, {}, resume=False)
        objective = choose_objective(source, None)
        model = model_of(source, blockwise=name == "blocks")
        calibration = model.calibrate(sites, padded_batches(), objective, room, seed=5)
        result[name] = (source, sites, model, objective, calibration, room.evidence)
    return result


def test_evidence_is_that_of_the_whole_model(ways):
    (_, sites, _, _, one, whole), (_, _, _, _, two, blocks) = ways["whole"], ways["blocks"]
    assert set(whole) == set(blocks) == {site.name for site in sites}
    assert (one.tokens, one.sequences, one.warnings) == (two.tokens, two.sequences, two.warnings)
    for site in sites:
        a, b = whole[site.name], blocks[site.name]
        assert a.samples == b.samples and len(a.terms) == len(b.terms)
        torch.testing.assert_close(a.rows, b.rows, rtol=1e-4, atol=1e-9)
        assert (a.columns is None) == (b.columns is None)
        if a.columns is not None:
            torch.testing.assert_close(a.columns, b.columns, rtol=1e-4, atol=1e-6 * float(a.columns.abs().max()))


@pytest.mark.parametrize("way", ["whole", "blocks"])
def test_products_in_bfloat16_give_nearly_the_same_evidence(ways, way, tmp_path):
    _, sites, model, objective, _, evidence = ways[way]
    exact = {site.name: evidence[site.name] for site in sites}
    room = Workspace(tmp_path / "coarse", {}, resume=False)
    model.calibrate(sites, padded_batches(), objective, room, seed=5, coarse=True)
    for site in sites:
        one, two = exact[site.name], room.evidence[site.name]
        assert one.samples == two.samples
        # Labels are drawn from nearly the same distribution, and a few of them are others.
        assert float(two.rows.sum()) == pytest.approx(float(one.rows.sum()), rel=0.3)
        if one.columns is not None:
            assert float(two.columns.trace()) == pytest.approx(float(one.columns.trace()), rel=0.3)
            assert float(torch.linalg.eigvalsh(two.columns).min()) > 0


def test_measurements_are_those_of_the_whole_model(ways):
    source, sites, whole, objective, *_ = ways["whole"]
    blocks = ways["blocks"][2]
    generator = torch.Generator().manual_seed(0)
    weights = {site.name: source.read(site.name) for site in sites}
    weights = {name: w + 0.05 * w.std() * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    one = whole.measure(padded_batches(), objective, weights)
    two = blocks.measure(padded_batches(), objective, weights)
    assert bool((one > 0).all())
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-9)
    assert blocks.measure(padded_batches(), objective, {}).tolist() == [0.0] * 12


def test_outputs_are_those_of_the_whole_model(ways):
    _, _, whole, objective, *_ = ways["whole"]
    for one, two in zip(
        whole.outputs(padded_batches(), objective),
        ways["blocks"][2].outputs(padded_batches(), objective),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_one_block_is_in_memory_at_a_time(tmp_path):
    source = from_path(write("llama", tmp_path / "model"))
    largest = 0
    read = source.read

    def counted(name: str) -> torch.Tensor:
        nonlocal largest
        assert source.module is not None
        largest = max(largest, sum(1 for parameter in source.module.parameters() if not parameter.is_meta))
        return read(name)

    source.read = counted
    model = model_of(source, blockwise=True)
    assert isinstance(model, Blockwise)
    sites, _ = source.sites()
    objective = choose_objective(source, None)
    around = 3  # embedding, last norm and head
    before = sum(1 for parameter in source.module.parameters() if not parameter.is_meta)
    model.calibrate(sites, padded_batches(), objective, Workspace(tmp_path / "room", {}, resume=False))
    model.measure(padded_batches(), objective, {})
    assert largest - before <= around
    assert sum(1 for parameter in source.module.parameters() if not parameter.is_meta) == before


class Killed(Exception):
    pass


@pytest.mark.parametrize("step", [1, 2, 4, 5, 6, 8])
def test_a_run_that_was_killed_goes_on_with_the_same_numbers(step, tmp_path):
    source = from_path(write("gemma", tmp_path / "model"))
    sites, _ = source.sites()
    objective = choose_objective(source, None)

    def run(folder: str, resume: bool, stop: int | None = None) -> dict:
        steps = []

        def progress(done: int, total: int) -> None:
            steps.append(done)
            if done == stop:
                raise Killed

        room = Workspace(tmp_path / folder, {}, resume=resume)
        model_of(source, blockwise=True).calibrate(sites, padded_batches(), objective, room, progress=progress)
        assert steps[-1] == 2 * 3 + 3
        return room.evidence

    with pytest.raises(Killed):
        run("killed", False, step)
    again, straight = run("killed", True), run("straight", False)
    for name in straight:
        assert torch.equal(again[name].rows, straight[name].rows)
        if straight[name].columns is not None:
            assert torch.equal(again[name].columns, straight[name].columns)


def test_evidence_of_sites_that_read_the_same_is_stored_once(tmp_path):
    source = from_path(write("llama", tmp_path / "model"))
    sites, _ = source.sites()
    room = Workspace(tmp_path / "room", {}, resume=False)
    model_of(source, blockwise=True).calibrate(sites, padded_batches(), choose_objective(source, None), room)
    with safe_open(tmp_path / "room" / "evidence" / "00001.safetensors", framework="pt") as file:
        square = [name for name in file.keys() if len(file.get_slice(name).get_shape()) == 2]  # noqa: SIM118
    assert len(square) == 4  # of attention, of its output, of gate and up, of down
    found = room.evidence
    query, value = (found[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qv")
    assert query.columns is value.columns and query.cache is value.cache


def test_blocks_are_the_list_that_holds_most_weights():
    sizes = {**SIZES, "num_local_experts": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}
    module = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    found = Blocks.find(module)
    assert found is not None and found.prefix == "model.layers" and len(found.list) == 2
    assert Blocks.find(torch.nn.Linear(3, 3)) is None


def test_a_model_that_is_no_chain_is_refused(tmp_path):
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
    torch.manual_seed(0)
    transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained(tmp_path / "model")
    source = from_path(tmp_path / "model")
    model = model_of(source, blockwise=True)
    sites, _ = source.sites()
    with pytest.raises(RequestError, match="cannot be run block by block"):
        model.calibrate(
            sites, padded_batches(), choose_objective(source, None), Workspace(tmp_path / "room", {}, resume=False)
        )
