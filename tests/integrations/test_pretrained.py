"""Models of transformers that are given in memory, in every dtype: what is stated, and what verify says of it."""

import pytest
import torch

import octavo

T = pytest.importorskip("transformers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_models_of_every_dtype_are_verified(dtype, tmp_path):
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(
        T.LlamaConfig(
            vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1,
        )
    ).to(dtype)  # fmt: skip
    batch = {"input_ids": torch.randint(6, 200, (24, 12))}
    done = octavo.compress(model, ratio=3, data=[batch], preset="fast")
    report = done.save(tmp_path / "out")
    loaded, objective = T.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype), done.job.objective
    held = done.job.held_data
    found = float(objective.measure(loaded.eval(), held, objective.reference(model.eval(), held)).mean())
    assert report["quality"]["value"] == pytest.approx(found, rel=1e-3)
    assert octavo.verify(tmp_path / "out")["outputs_match"] is True
