"""The public surface with a model on an accelerator: tensors stay where the caller put them. Skipped where there is none."""

import copy
from contextlib import suppress

import pytest
import torch
from torch import nn

import octavo
from octavo.cuts import CUTS, best
from octavo.errors import RequestError
from octavo.flows import FLOWS, Schema
from octavo.training import REGIMENS, cross_entropy, fit

transformers = pytest.importorskip("transformers")

DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
pytestmark = pytest.mark.skipif(DEVICE is None, reason="there is no accelerator")


def perceptron():
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 32))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(216, 64), nn.ReLU(), nn.Linear(64, 4),
    )  # fmt: skip


def recurrent():
    return nn.LSTM(32, 48, batch_first=True)


def language(kind):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.2, **({} if kind == "Bert" else {"num_key_value_heads": 2}),
    )  # fmt: skip
    return getattr(transformers, f"{kind}{'Model' if kind == 'Bert' else 'ForCausalLM'}")(config)


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def words():
    ids = torch.randint(0, 96, (96, 16), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


#: Models and what they are called with.
MODELS = {
    "perceptron": (perceptron, lambda: drawn(96, 64)),
    "convolutions": (convolutions, lambda: drawn(96, 2, 6, 6)),
    "recurrent": (recurrent, lambda: drawn(96, 5, 32)),
    "llama": (lambda: language("Llama"), words),
    "bert": (lambda: language("Bert"), words),
}


def model_of(name):
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def batches(name, where):
    given = MODELS[name][1]()
    if isinstance(given, dict):
        columns = {key: value.split(8) for key, value in given.items()}
        return [{key: value[k].to(where) for key, value in columns.items()} for k in range(12)]
    return [part.to(where) for part in given.split(8)]


@torch.no_grad()
def outputs(model, name, where):
    batch = batches(name, where)[0]
    found = model(**batch) if isinstance(batch, dict) else model(batch)
    return found[0] if isinstance(found, tuple) or hasattr(found, "keys") else found


def close(ours, theirs, share=2e-2):
    return float((ours.cpu().float() - theirs.cpu().float()).norm()) <= share * float(theirs.float().norm())


@pytest.mark.parametrize("preset", ["data-free", "fast", "default"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_compressed_where_it_is(name, preset, tmp_path):
    model = model_of(name).to(DEVICE)
    data = {} if preset == "data-free" else {"data": batches(name, DEVICE)}
    done = octavo.compress(model, ratio=4, preset=preset, progress=False, **data)
    done.save(tmp_path / "out")
    assert done.ratio >= 4 and {tensor.device.type for tensor in model.state_dict().values()} == {DEVICE.type}
    there = octavo.load(tmp_path / "out", into=model_of(name).to(DEVICE))
    here = octavo.load(tmp_path / "out", into=model_of(name))
    assert {tensor.device.type for tensor in there.state_dict().values()} == {DEVICE.type}
    assert close(outputs(there, name, DEVICE), outputs(here, name, "cpu"))


@pytest.mark.parametrize("name", ["perceptron", "llama"])
def test_packed_weights_say_that_they_need_a_cpu_and_factors_stay_dense(name, tmp_path):
    options = {"data": batches(name, "cpu"), "progress": False, "preset": "fast"}
    octavo.compress(model_of(name), ratio=3, target="memory", **options).save(tmp_path / "out")
    with pytest.raises(RequestError, match="packed weights run on a CPU"):
        octavo.load(tmp_path / "out", into=model_of(name).to(DEVICE), packed=True)
    dense = octavo.load(tmp_path / "out", into=model_of(name))
    factored = octavo.load(tmp_path / "out", into=model_of(name).to(DEVICE), factors=True)
    assert close(outputs(factored, name, DEVICE), outputs(dense, name, "cpu"))


def test_the_source_teaches_where_it_is(tmp_path):
    model, data = model_of("perceptron").to(DEVICE), [part for k in range(20) for part in batches("perceptron", DEVICE)]
    done = octavo.compress(
        model, ratio=12, data=data, preset="fast", recover="distill", minutes=0.1, progress=False
    )  # fmt: skip
    assert done.recovery.after <= done.recovery.before
    done.save(tmp_path / "out")


def known():
    """Every cut with every model that it knows."""
    found = []
    for cut in CUTS.names():
        for name in MODELS:
            with suppress(RequestError):
                CUTS.get(cut)().units(model_of(name))
                found.append((cut, name))
    return found


@pytest.mark.parametrize(("cut", "name"), known() if DEVICE is not None else [])
def test_units_are_removed_where_the_model_is(cut, name):
    model, removal = model_of(name).to(DEVICE), CUTS.get(cut)()
    units, evidence = removal.units(model), removal.observe(model, batches(name, DEVICE))
    thinner = removal.apply(model, best(removal.scores(model, units, evidence), 0.7), evidence)
    assert {tensor.device.type for tensor in thinner.state_dict().values()} == {DEVICE.type}
    assert bool(torch.isfinite(outputs(thinner, name, DEVICE)).all())


@pytest.mark.parametrize("regimen", ["none", *REGIMENS.names()])
def test_a_regimen_acts_where_the_model_is(regimen, tmp_path):
    model = model_of("convolutions").to(DEVICE)
    images = drawn(96, 2, 6, 6).to(DEVICE)
    labels = images[:, 0].unflatten(1, (2, 3)).unflatten(3, (2, 3)).mean((2, 4)).flatten(1).argmax(1)
    data = list(zip(images.split(32), labels.split(32), strict=True))
    chosen = None if regimen == "none" else REGIMENS.get(regimen).suited_to(model)
    losses = fit(model, lambda epoch: data, cross_entropy, epochs=4, lr=1e-2, regimen=chosen)
    assert losses[-1] < losses[0] and {t.device.type for t in model.state_dict().values()} == {DEVICE.type}
    left = None if chosen is None else chosen.hand_over(model)
    if left is not None and left.kept:
        return  # Units are to be removed first, which the tests of cuts show.
    octavo.save(model if left is None else (model, left), tmp_path / "out", progress=False)
    again = octavo.load(tmp_path / "out", into=model_of("convolutions").to(DEVICE))
    assert bool(torch.isfinite(outputs(again, "convolutions", DEVICE)).all())


@pytest.mark.parametrize("name", FLOWS.names())
def test_a_flow_carries_what_is_there(name):
    flow = FLOWS.get(name)()
    sample = {"weight": drawn(96, 130).to(DEVICE), "half": drawn(33, 7, 3).to(DEVICE, torch.bfloat16)}
    plan = flow.fit([sample], Schema.of(sample).nbytes // 8)
    payload = flow.encode(sample, flow.start(plan))
    here = {key: value.cpu() for key, value in sample.items()}
    assert close(
        flow.decode(payload, flow.start(plan))["weight"],
        flow.decode(flow.encode(here, flow.start(plan)), flow.start(plan))["weight"],
        0.2,
    )


def test_a_delta_is_of_a_base_that_is_there(tmp_path):
    base = model_of("perceptron").to(DEVICE)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight.add_(0.01 * drawn(96, 64).to(DEVICE))
    octavo.compress(tuned, base=base, ratio=4, preset="data-free", progress=False).save(tmp_path / "delta")
    again = octavo.load(tmp_path / "delta", base=base, into=copy.deepcopy(base))
    assert close(again.state_dict()["0.weight"], tuned.state_dict()["0.weight"], 0.1)


@pytest.mark.parametrize("backend", ["gloo", None])
def test_gradients_are_sent_from_where_they_are(backend):
    dist = torch.distributed
    dist.init_process_group(
        backend or dist.get_default_backend_for_device(DEVICE), store=dist.HashStore(), rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(perceptron().to(DEVICE), bucket_cap_mb=0.02)
        sync = octavo.updates.compress_ddp(model, ratio=10)
        for _ in range(2):
            model.zero_grad()
            model(drawn(96, 64).to(DEVICE)).square().mean().backward()
        assert 0 < sync.sent <= sync.budget
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(gradient.device.type == DEVICE.type and bool(gradient.isfinite().all()) for gradient in gradients)
        assert any(bool(gradient.any()) for gradient in gradients)
    finally:
        dist.destroy_process_group()
