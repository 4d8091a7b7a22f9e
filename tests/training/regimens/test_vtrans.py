"""VTrans: masks that meet a stated size, and a cut model that computes what the masked one did."""

import pytest
import torch
from torch import nn

from octavo.cuts import Slice, Units, without
from octavo.cuts.chains import chain_units
from octavo.cuts.transformer_units import COLUMN, HEAD, NEURON, anatomy, transformer_units
from octavo.errors import RequestError
from octavo.training import cross_entropy, fit
from octavo.training.losses import outputs_of
from octavo.training.regimens.vtrans import VTrans


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))


def task(epoch):
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(25):
        x = torch.randn(64, 12, generator=generator)
        yield x, (x[:, :3].sum(1) > 0).long() + 2 * (x[:, 3:6].sum(1) > 0).long()


def right(model):
    x, y = next(iter(task(99)))
    return float((model(x).argmax(1) == y).float().mean())


def weights(model):
    return sum(weight.numel() for weight in model.parameters())


@pytest.fixture(scope="module")
def learned():
    model = perceptron()
    fit(model, task, cross_entropy, epochs=4, lr=1e-2)
    return model.state_dict()


def compressed(learned, **knobs):
    model = perceptron()
    model.load_state_dict(learned)
    units = chain_units(model)
    regimen = VTrans(units, 0.4, rate=0.15, **knobs)
    fit(model, task, cross_entropy, epochs=9, lr=3e-3, regimen=regimen)
    return model, units, regimen


def test_the_stated_size_is_met_and_the_cut_net_computes_the_same(learned):
    model, units, regimen = compressed(learned)
    x, _ = next(iter(task(99)))
    masked = model(x)
    kept = regimen.hand_over(model).kept
    thin = without(model, units, kept)
    assert torch.allclose(thin(x), masked, atol=1e-5) and torch.allclose(model(x), masked, atol=1e-5)
    assert weights(thin) <= 0.4 * weights(model) and regimen.found == pytest.approx(0.4, abs=0.08)
    assert right(thin) > 0.9
    assert all(torch.equal(mask, kept[name]) for name, mask in regimen.kept(model).items())


def test_with_masks_alone_weights_stay_until_they_are_fixed(learned):
    model, units, regimen = compressed(learned, only_masks=True, tuned=0.0)
    kept = regimen.kept(model)
    mask, own = kept["0"], model.state_dict()
    assert torch.equal(own["0.weight"], learned["0.weight"])
    assert all(weight.requires_grad for weight in model.parameters()), "they can be trained on"
    # The means of the masks are in the layer that reads the units: one factor a column.
    ratios = own["2.weight"][kept["2"]][:, mask] / learned["2.weight"][kept["2"]][:, mask]
    assert torch.allclose(ratios, ratios[:1].expand_as(ratios), rtol=1e-3)
    assert weights(without(model, units, kept)) <= 0.4 * weights(model)


def transformer(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "GPT2":
        sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24, "pad_token_id": 0}
    elif kind == "Llama":
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 24, "pad_token_id": 0}
    else:
        sizes |= {"intermediate_size": 24, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = getattr(transformers, f"{kind}Config")(num_labels=3, initializer_range=0.3, **sizes)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config)


def sequences(epoch):
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(8):
        ids = torch.randint(1, 40, (8, 6), generator=generator)
        yield {"input_ids": ids}, ids[:, 0] % 3


@pytest.mark.parametrize("kind", ["Bert", "GPT2", "Llama"])
def test_cut_transformers_compute_what_masked_ones_did(kind):
    """Columns of the residual stream among the units, so that norms have other statistics."""
    model = transformer(kind)
    units = transformer_units(anatomy(model), (HEAD, NEURON, COLUMN))
    regimen = VTrans(units, 0.6, pressure=0.1, rate=0.3)
    fit(model, sequences, cross_entropy, epochs=5, lr=1e-3, regimen=regimen)
    batch, _ = next(iter(sequences(9)))
    with torch.no_grad():
        masked = outputs_of(model, batch)
        kept = regimen.kept(model)
        thin = without(model, units, kept)
        found = outputs_of(thin, batch)
    columns = next(mask for name, mask in kept.items() if name.endswith(COLUMN))
    assert not bool(columns.all()) and bool(columns.any())
    assert torch.allclose(found, masked, atol=1e-4 * float(masked.abs().max()))
    assert weights(thin) <= 0.6 * weights(model)


def test_masks_are_drawn_for_examples_and_shared_by_positions():
    model = transformer("Bert")
    units = transformer_units(anatomy(model), (NEURON,))
    regimen = VTrans(units, 0.9)
    regimen.begin(model, 10)
    for mask in regimen.state()["masks"].values():
        mask["log_variance"].fill_(-1.0)
    seen = []
    layer = model.bert.encoder.layer[0].output.dense
    layer.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    regimen.before_step(0)
    ids = torch.full((3, 5), 7)
    with torch.no_grad():
        model.train()(input_ids=ids)
        model.eval()(input_ids=ids)
    ratio = seen[0] / seen[1]
    large = seen[1].abs() > 1e-3
    assert all(
        torch.allclose(row[keep], row[:1].expand_as(row)[keep], rtol=1e-2)
        for row, keep in zip(ratio, large, strict=True)
    )
    assert float((ratio[0, 0] - ratio[1, 0])[large[0, 0]].abs().min()) > 0


@pytest.mark.parametrize(
    ("share", "knobs", "says"),
    [
        (1.0, {}, "share is 1.0"),
        (0.5, {"warmup": 0.7, "tuned": 0.4}, "together must be below 1"),
    ],
)
def test_unusable_knobs_are_named(share, knobs, says):
    with pytest.raises(RequestError, match=says):
        VTrans([], share, **knobs)


def test_what_cannot_be_reached_or_masked_is_refused():
    model = perceptron()
    with pytest.raises(RequestError, match=r"share is 0\.01, but with one unit at every place 0\.\d+ of the weights"):
        VTrans(chain_units(model), 0.01).begin(model, 10)
    rows = Units("rows", "token", 4, (Slice("4.weight", 0, torch.arange(4)[:, None]),))
    with pytest.raises(RequestError, match="no layer reads 'rows'"):
        fit(model, task, cross_entropy, regimen=VTrans([*chain_units(model), rows], 0.95))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules()), "masks are gone"
