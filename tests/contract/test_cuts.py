"""The contract of every cut: it passes by being registered, on those of the models below that it knows."""

import pytest
import torch
from torch import nn

import octavo
from octavo.cuts import CUTS, best, check_kept, left, saved, skeleton
from octavo.errors import RequestError

transformers = pytest.importorskip("transformers")


def _language(kind, **more):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.2, **more,
    )  # fmt: skip
    return getattr(transformers, f"{kind}{'Model' if kind == 'Bert' else 'ForCausalLM'}")(config)


#: Small models of the kinds that cuts may know; one that knows another kind adds it here.
MODELS = {
    "perceptron": lambda: nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 5),
    ),
    "llama": lambda: _language("Llama", num_key_value_heads=2),
    "llama-with-biases": lambda: _language("Llama", num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: _language("Qwen2", num_key_value_heads=2),
    "bert": lambda: _language("Bert"),
}  # fmt: skip


def inputs(name):
    generator = torch.Generator().manual_seed(3)
    if name == "perceptron":
        return torch.randn(12, 16, generator=generator)
    if name == "convolutions":
        return torch.randn(12, 3, 10, 10, generator=generator)
    return {"input_ids": torch.randint(0, 64, (12, 16), generator=generator)}


def parts(batch):
    if isinstance(batch, dict):
        return [{"input_ids": part} for part in batch["input_ids"].split(4)]
    return list(batch.split(4))


@torch.no_grad()
def outputs(model, name):
    batch = inputs(name)
    result = model(**batch) if isinstance(batch, dict) else model(batch)
    return result[0] if isinstance(result, tuple) or hasattr(result, "keys") else result


def known():
    """Every cut with every model that it knows."""
    pairs = []
    for name, cls in CUTS.all().items():
        fits = []
        for model in MODELS:
            try:
                cls().units(MODELS[model]())
            except RequestError:
                continue
            fits.append(model)
        assert fits, f"the cut {name!r} knows none of the models of this test; add one"
        pairs += [(name, model) for model in fits]
    return pairs


@pytest.fixture(params=known(), ids="-".join)
def case(request):
    name, kind = request.param
    torch.manual_seed(0)
    model, cut = MODELS[kind]().eval(), CUTS.get(name)()
    for parameter in (p for n, p in model.named_parameters() if n.endswith("bias")):
        nn.init.normal_(parameter, std=0.3)
    units, evidence = cut.units(model), cut.observe(model, parts(inputs(kind)))
    return kind, model, cut, units, evidence


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_units_have_names_of_their_own_and_places_that_no_other_of_their_kind_has(case):
    _, model, _, units, _ = case
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert units and len({part.name for part in units}) == len(units)
    taken = set()
    for part in units:
        assert part.count > 0 and part.kind and part.slices
        for piece in part.slices:
            assert len(piece.places) == part.count
            places = piece.places.flatten().tolist()
            assert all(0 <= place < shapes[piece.tensor][piece.dim] for place in places)
            mine = {(piece.tensor, piece.dim, place) for place in places}
            assert len(mine) == len(places) and not mine & taken
            taken |= mine


def test_scores_are_finite_and_the_same_again(case):
    _, model, cut, units, evidence = case
    before = state(model)
    scores = cut.scores(model, units, evidence)
    assert {name: tuple(value.shape) for name, value in scores.items()} == {p.name: (p.count,) for p in units}
    assert all(bool(torch.isfinite(value).all()) for value in scores.values())
    again = cut.scores(model, units, evidence)
    assert all(torch.equal(scores[name], again[name]) for name in scores)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_is_removed_is_gone_and_the_model_given_stays(case):
    kind, model, cut, units, evidence = case
    before, reference = state(model), outputs(model, kind)
    kept = best(cut.scores(model, units, evidence), cut.shares(units, evidence, 0.4))
    thinner = cut.apply(model, kept, evidence)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    small, gone = thinner.state_dict(), 0
    for name, masks in left(model, units, kept).items():
        if small[name].shape != before[name].shape:
            assert tuple(small[name].shape) == tuple(int(mask.sum()) for mask in masks), name
            continue
        for dim, mask in enumerate(masks):
            rest = small[name].index_select(dim, (~mask).nonzero()[:, 0])
            assert not rest.any(), f"{name} has something left where units were removed"
    gone = saved(model, units, kept)
    assert 0.2 < gone / saved_at_most(model, units) < 0.7
    assert bool(torch.isfinite(outputs(thinner, kind)).all()) and not torch.equal(outputs(thinner, kind), reference)


def saved_at_most(model, units):
    one = {part.name: torch.arange(part.count) < 1 for part in units}
    return saved(model, units, one)


def test_nothing_changes_where_all_is_kept(case):
    kind, model, cut, units, evidence = case
    whole = cut.apply(model, {part.name: torch.ones(part.count, dtype=torch.bool) for part in units}, evidence)
    assert torch.equal(outputs(whole, kind), outputs(model, kind))


def test_high_scores_are_worth_more_than_low_ones(case):
    kind, model, cut, units, evidence = case
    if not cut.needs_data:
        pytest.skip("weights alone may be wrong about what is worth more")
    scores, reference = cut.scores(model, units, evidence), outputs(model, kind)
    lost = [
        float((outputs(cut.apply(model, best(signed, 0.5), evidence), kind) - reference).norm())
        for signed in (scores, {name: -value for name, value in scores.items()})
    ]
    assert lost[0] < lost[1]


def test_a_cut_model_is_saved_and_loaded_in_its_shapes(case, tmp_path):
    kind, model, cut, units, evidence = case
    thinner = cut.apply(model, best(cut.scores(model, units, evidence), 0.5), evidence)
    octavo.compress(thinner, ratio=1.5, methods=["entropy", "keep"], preset="data-free").save(tmp_path / "thin")
    shapes = octavo.Artifact(tmp_path / "thin").loadable_shapes()
    again = octavo.load(tmp_path / "thin", into=skeleton(model, shapes))
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in thinner.state_dict().items()}
    expected = outputs(thinner, kind)
    assert float((outputs(again.eval(), kind) - expected).norm()) < 0.2 * float(expected.norm())


def test_what_cannot_be_kept_is_refused(case):
    _, model, cut, units, evidence = case
    first = units[0]
    wrong = {
        "names no units": {"nothing": torch.ones(3, dtype=torch.bool)},
        "give bools of shape": {first.name: torch.ones(first.count)},
        "one for each": {first.name: torch.ones(first.count + 1, dtype=torch.bool)},
        "keep at least one": {first.name: torch.zeros(first.count, dtype=torch.bool)},
    }
    for says, kept in wrong.items():
        with pytest.raises(RequestError, match=says):
            check_kept(units, kept)
        with pytest.raises(RequestError, match=says):
            cut.apply(model, kept, evidence)
