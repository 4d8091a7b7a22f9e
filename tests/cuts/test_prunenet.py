"""PruneNet: draws and their probabilities, what the policy learns, its file, and compressing without data."""

import itertools
from dataclasses import replace

import pytest
import torch

import octavo
from octavo.cuts import best
from octavo.cuts.prunenet import PruneNet, kolmogorov_smirnov, rows_of, spectrum
from octavo.cuts.row_policy import RowPolicy, concrete, described, drawn
from octavo.errors import RequestError

transformers = pytest.importorskip("transformers")


def decoder(seed=0):
    """A decoder in which a third of the neurons has long rows, and the rest hardly any."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:64] *= 0.05
    return model


@pytest.fixture(scope="module")
def trained():
    model = decoder()
    cut = PruneNet(share=0.4, norms=True, rate=1e-2)
    return model, cut, cut.units(model), cut.observe(model, [])


def test_the_probability_of_a_draw_is_that_of_drawing_one_after_another():
    odds = torch.tensor([0.0, 1.0, -0.5])
    weights, counts = odds.exp(), {}
    generator, total = torch.Generator().manual_seed(0), 1000
    for _ in range(total):
        rows, log = drawn(odds, 2, generator)
        first, second = rows.tolist()
        exact = weights[first] / weights.sum() * weights[second] / (weights.sum() - weights[first])
        assert float(log.exp()) == pytest.approx(float(exact), rel=1e-5)
        counts[first, second] = counts.get((first, second), 0) + 1
    for first, second in itertools.permutations(range(3), 2):
        exact = weights[first] / weights.sum() * weights[second] / (weights.sum() - weights[first])
        assert counts[first, second] / total == pytest.approx(float(exact), abs=0.06)


def test_noisy_scores_are_above_a_half_as_often_as_the_odds_say():
    odds = torch.full((20_000,), 0.8)
    scores = concrete(odds, torch.Generator().manual_seed(0))
    assert bool(((scores > 0) & (scores < 1)).all())
    assert float((scores > 0.5).float().mean()) == pytest.approx(float(odds[0].sigmoid()), abs=0.01)


def test_spectra_and_their_distance():
    stats = pytest.importorskip("scipy.stats")
    one, other = torch.randn(30, 12), torch.randn(9, 12)
    assert torch.allclose(spectrum(one).flip(0), torch.linalg.svdvals(one.double()))
    assert len(spectrum(other)) == 9
    expected = stats.ks_2samp(spectrum(one).numpy(), spectrum(other).numpy()).statistic
    assert kolmogorov_smirnov(spectrum(one), spectrum(other)) == pytest.approx(expected)
    assert kolmogorov_smirnov(spectrum(one), spectrum(one)) == 0


def test_a_linear_policy_gives_a_row_and_its_negative_opposite_odds_but_not_with_norms():
    rows = torch.randn(10, 6)
    plain = RowPolicy(torch.randn(6), 0.0, 6)
    assert torch.allclose(plain.odds(rows), -plain.odds(-rows), atol=1e-6)
    long = RowPolicy(torch.tensor([0.0] * 6 + [1.0]), 0.0, 6)
    assert torch.allclose(long.odds(rows), long.odds(-rows))
    assert int(long.odds(rows).argmax()) == int(rows.norm(dim=1).argmax())
    assert bool(torch.isfinite(described(torch.zeros(3, 6), norms=True)).all())


def distances(model, cut, policy):
    """Mean distance of the spectra of what it draws, over seeds and layers."""
    found = []
    for seed in range(5):
        kept = best(replace(cut, seed=seed).scores(model, cut.units(model), policy), 0.4)
        for part in cut.units(model):
            rows = rows_of(model, part)
            found.append(kolmogorov_smirnov(spectrum(rows), spectrum(rows[kept[part.name]])))
    return sum(found) / len(found)


def test_it_learns_from_the_weights_alone_to_keep_the_rows_that_make_the_spectrum(trained):
    model, cut, units, policy = trained
    for part in units:
        odds = policy.odds(rows_of(model, part))
        assert float(odds[64:].mean()) > float(odds[:64].mean()) + 0.3, "long rows over short ones"
    even = RowPolicy(torch.zeros(32), 0.0, 32)
    assert distances(model, cut, policy) < 0.9 * distances(model, cut, even)


@pytest.mark.parametrize("options", [{}, {"baseline": False, "exact": False}])
def test_without_norms_and_as_released_it_is_a_function_of_rows_alone(options):
    model, cut = decoder(), PruneNet(episodes=3, **options)
    policy = cut.observe(model)
    assert policy.direction.shape == (32,)
    scores = cut.scores(model, cut.units(model), policy)
    assert all(bool(torch.isfinite(values).all()) for values in scores.values())
    other = replace(cut, seed=1).scores(model, cut.units(model), policy)
    assert not any(torch.equal(scores[name], other[name]) for name in scores), "rows are drawn"


def test_one_policy_serves_other_ratios_and_is_read_back(trained, tmp_path):
    model, _, units, policy = trained
    policy.save(tmp_path / "policy.safetensors")
    again = PruneNet(policy=str(tmp_path / "policy.safetensors"), norms=True)
    found = again.observe(model, [])
    assert torch.equal(found.direction, policy.direction) and (found.offset, found.width) == (policy.offset, 32)
    scores = again.scores(model, units, found)
    less, more = best(scores, 0.2), best(scores, 0.5)
    assert all(bool((less[name] | ~more[name]).all()) for name in more), "what stays at 50% stays at 20%"
    thinner = again.apply(model, more, found)
    assert thinner.config.intermediate_size == 48 and rows_of(thinner, again.units(thinner)[0]).shape == (48, 32)


def test_the_same_seed_gives_the_same_policy_and_depth_weighs_layers(trained):
    model, cut, _, policy = trained
    assert torch.equal(cut.observe(model, []).direction, policy.direction)
    assert not torch.equal(replace(cut, depth=2.0).observe(model, []).direction, policy.direction)


def test_a_model_is_compressed_without_any_data(tmp_path):
    decoder().save_pretrained(tmp_path / "source")
    for given, preset in ((tmp_path / "source", "data-free"), (decoder(), "default")):
        done = octavo.compress(given, ratio=1.3, methods=["prunenet:episodes=4"], preset=preset, progress=False)
        report = done.save(tmp_path / preset)
        (level,) = done.cut.levels
        assert report.artifact.ratio >= 1.3 and level.weights > 0 and level.alone is level.quality is None
        assert octavo.verify(tmp_path / preset)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "data-free")
    assert loaded.config.intermediate_size < 96
    assert not octavo.Artifact(tmp_path / "data-free").sites, "nothing is encoded"


def test_rows_are_those_of_the_matrix_that_writes_neurons_whichever_way_it_lies():
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    (part,) = PruneNet().units(model)
    assert torch.equal(rows_of(model, part), model.transformer.h[0].mlp.c_fc.weight.t())
    gated = decoder()
    assert torch.equal(rows_of(gated, PruneNet().units(gated)[0]), gated.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(RequestError, match="prunenet knows the neurons of transformers only"):
        PruneNet().units(torch.nn.Linear(4, 4))


def test_with_data_it_is_measured(tmp_path):
    data = [{"input_ids": torch.randint(0, 64, (8, 16))} for _ in range(4)]
    done = octavo.compress(decoder(), ratio=1.3, data=data, methods=[PruneNet(episodes=2)], progress=False)
    assert done.built.quality > 0


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"methods": ["prunenet", "entropy"]}, "beside other methods the best level of prunenet is found by measuring"),
        ({"methods": ["prunenet:policy=nothing.safetensors"]}, "holds no policy over rows"),
        ({"methods": ["prunenet:share=1.0"]}, "share is 1.0; it must be between 0 and 1"),
        ({"methods": ["prunenet:episodes=0"]}, "episodes is 0; it must be above 0"),
    ],
)
def test_what_cannot_be_done_is_refused(asked, says):
    with pytest.raises(RequestError, match=says):
        octavo.compress(decoder(), ratio=1.3, progress=False, **asked)


def test_weights_that_are_not_finite_are_named(trained):
    _, cut, units, policy = trained
    model = decoder()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    for act in (lambda: cut.observe(model), lambda: cut.scores(model, units, policy)):
        with pytest.raises(RequestError, match=r"'model.layers.1.mlp.up_proj.weight' has values that are not finite"):
            act()


def test_bare_tensors_and_policies_of_another_width_are_refused(tmp_path, trained):
    from safetensors.torch import save_file

    save_file({"w": torch.randn(64, 64)}, tmp_path / "bare.safetensors")
    with pytest.raises(RequestError, match="prunenet needs a model whose units it knows"):
        octavo.compress(tmp_path / "bare.safetensors", ratio=1.3, methods=["prunenet"], progress=False)
    *_, policy = trained
    with pytest.raises(RequestError, match="trained on rows of length 32"):
        policy.odds(torch.zeros(4, 16))
    save_file({"direction": torch.zeros(4)}, tmp_path / "other.safetensors")
    with pytest.raises(RequestError, match="holds no policy over rows"):
        RowPolicy.load(tmp_path / "other.safetensors")
