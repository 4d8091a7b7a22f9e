"""What the source of each codec claims, on small tensors."""

import pytest
import torch

from octavo import coding
from octavo.errors import ArtifactError, RequestError
from octavo.flows import FLOWS
from octavo.flows.updates.fitness import Fitness, perturbations
from octavo.flows.updates.kmeans import KMeansLevels
from octavo.flows.updates.powersgd import PowerSGD
from octavo.flows.updates.qsgd import QSGD
from octavo.flows.updates.sign import Sign
from octavo.flows.updates.sketch import Sketch
from octavo.flows.updates.ternary import Ternary
from octavo.flows.updates.threshold import Threshold


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def carried(codec, tensors, budget):
    plan = codec.fit([tensors], budget)
    return codec.decode(codec.encode(tensors, codec.start(plan)), codec.start(plan))


def share(sent, found):
    return float((sent - found).square().sum() / sent.square().sum())


@pytest.mark.parametrize("name", [name for name in FLOWS.names() if getattr(FLOWS.get(name)(), "feedback", False)])
def test_an_update_whose_rest_leaves_float32_is_refused_and_others_are_sent(name):
    codec, sent, later = FLOWS.get(name)(), {"a": normal(70, 70).clamp(-1, 1) * 3e38}, {"a": torch.zeros(70, 70)}
    plan = codec.fit([sent], 2000)
    sender, untouched = codec.start(plan), codec.start(plan)
    try:
        codec.encode(sent, sender)
        assert sender.missing.isfinite().all()
    except RequestError as error:
        assert "what is left of 'a' leaves float32" in str(error)
        assert codec.encode(later, sender) == codec.encode(later, untouched)


def test_threshold_sends_what_exceeds_it_in_multiples():
    sent = normal(4000)
    found = carried(Threshold(feedback=False), {"a": sent}, 700)["a"]
    there = found != 0
    assert sent[there].abs().min() >= sent[~there].abs().max()
    levels = found[there].abs().unique()
    assert len(levels) > 1 and torch.allclose(levels.diff(), levels.diff()[0].expand(len(levels) - 1), rtol=1e-4)


def test_qsgd_has_levels_of_a_share_of_each_norm():
    sent = {"a": normal(1500), "b": 100 * normal(1500, seed=1)}
    found = carried(QSGD(), sent, 1500)
    steps = {name: float(tensor.abs()[tensor != 0].min()) for name, tensor in found.items()}
    for name, tensor in found.items():
        codes = tensor / steps[name]
        assert torch.allclose(codes, codes.round(), atol=1e-3)
        assert bool(((tensor - sent[name]).abs() <= 1.001 * steps[name]).all())
    assert steps["a"] / steps["b"] == pytest.approx(float(sent["a"].norm() / sent["b"].norm()), rel=1e-4)


def test_ternary_with_all_bytes_has_the_scale_of_its_source():
    sent = normal(1000)
    found = carried(Ternary(), {"a": sent}, 4000)["a"]
    assert set(found.unique().tolist()) == {-float(sent.abs().max()), 0.0, float(sent.abs().max())}
    assert bool((found * sent >= 0).all())
    few = carried(Ternary(), {"a": sent}, 160)["a"]
    assert len(few.abs().unique()) == 2 and float(few.abs().max()) > 2 * float(sent.abs().max())


@pytest.mark.parametrize("codec", [QSGD(), Ternary()], ids=["qsgd", "ternary"])
@pytest.mark.parametrize("scale", [1e-37, 1.0, 3e38])
def test_entries_that_are_a_whole_norm_can_be_received_at_any_budget(codec, scale):
    """Of thousands of largest entries some draw nearly one, which must not lift their code beyond the largest."""
    signs = normal(3000).sign()
    sent = {str(number): scale * (0.5 + number / 6000) * sign for number, sign in enumerate(signs)}
    for budget in (1 << 14, 1 << 20):
        plan = codec.fit([sent], budget)
        sender, receiver = codec.start(plan), codec.start(plan)
        for _ in range(3):
            found = codec.decode(codec.encode(sent, sender), receiver)
            assert all(bool(torch.isfinite(tensor)) for tensor in found.values())
    # With all bytes, the largest code stands for the whole norm.
    assert all(float(found[name]) == pytest.approx(float(sent[name]), rel=1e-4) for name in sent)


def test_sign_has_one_bit_an_entry_and_the_mean_magnitude():
    sent = normal(8000)
    codec = Sign(feedback=False)
    plan = codec.fit([{"a": sent}], 1100)
    payload = codec.encode({"a": sent}, codec.start(plan))
    assert len(payload) < 1080
    found = codec.decode(payload, codec.start(plan))["a"]
    assert torch.allclose(found, sent.sign() * sent.abs().mean())


def test_kmeans_finds_clusters():
    g = torch.Generator().manual_seed(0)
    centres = torch.tensor([-3.0, 2.0])
    which = torch.randint(2, (300,), generator=g)
    sent = torch.zeros(3000)
    sent[torch.randperm(3000, generator=g)[:300]] = centres[which] + 0.01 * normal(300)
    found = carried(KMeansLevels(centroids=(2,), feedback=False), {"a": sent}, 4000)["a"]
    assert len(found.unique()) == 3
    assert torch.allclose(found.unique(), torch.tensor([-3.0, 0.0, 2.0]), atol=0.02) and share(sent, found) < 1e-4
    with pytest.raises(RequestError, match="centroids is"):
        KMeansLevels(centroids=(0,))
    with pytest.raises(RequestError, match="iterations is"):
        KMeansLevels(iterations=0)


def test_low_rank_is_found_and_vectors_ride_along():
    low = normal(80, 3) @ normal(3, 60, seed=1)
    sent = {
        "m": low,
        "conv": (normal(16, 2, seed=2) @ normal(2, 75, seed=3)).view(16, 3, 5, 5),
        "v": normal(40, seed=4),
    }
    found = carried(PowerSGD(ranks=(4,), feedback=False), sent, 1500)
    assert all(share(sent[name], found[name]) < 0.01 for name in sent)
    assert torch.linalg.matrix_rank(found["m"]) <= 4
    for wrong in ({"ranks": ()}, {"ranks": (256,)}, {"rounds": 0}):
        with pytest.raises(RequestError, match="powersgd: "):
            PowerSGD(**wrong)


def test_a_sketch_brings_its_share_of_any_update():
    flat, spike = normal(4096), torch.zeros(4096)
    spike[7] = 1.0
    for sent in (flat, spike):
        codec = Sketch(part=1024, feedback=False)
        state = codec.start(codec.fit([{"a": sent}], 1 << 20))
        # A quarter of the directions, finely quantized.
        prepared = codec.prepare(sent, state.plan.schema, {"levels": 127}, 3)
        parts = [memoryview(part) for part in codec.pack(prepared, state.plan.schema, 1024, {"levels": 127})]
        assert share(sent, codec.unpack(parts, state.plan.schema, 3)) == pytest.approx(0.75, abs=0.05)
        # Another step sees other directions.
        assert share(sent, codec.unpack(parts, state.plan.schema, 4)) > 0.9
    assert share(flat, carried(Sketch(part=1024, feedback=False), {"a": flat}, 1 << 20)["a"]) < 1e-3
    for part in (0, 1000, 2.0):
        with pytest.raises(RequestError, match="part is"):
            Sketch(part=part)


@pytest.mark.parametrize(("estimator", "cosine"), [("single", 0.03), ("paired", 0.22), ("corrected", 0.22)])
def test_fitness_without_pairs_is_drowned_by_the_lengths_of_perturbations(estimator, cosine):
    """Of 512 numbers for 10,000 elements, the cosine is the root of N / (N + d), unless pairs are missing."""
    sent, codec = normal(10_000), Fitness(part=10_000, estimator=estimator, spread=20.0)
    schema = codec.fit([{"a": sent}], 20_000).schema
    parts = codec.pack(codec.prepare(sent, schema, {"levels": 127}, 0), schema, 512, {"levels": 127})
    found = codec.unpack([memoryview(part) for part in parts], schema, 0)
    assert float(torch.cosine_similarity(sent, found, dim=0)) == pytest.approx(cosine, abs=0.03)


def test_perturbations_are_drawn_from_the_step_and_normal():
    drawn = perturbations(100, 301, 7)
    assert torch.equal(drawn[:10], perturbations(10, 301, 7)) and not torch.equal(drawn, perturbations(100, 301, 8))
    assert float(drawn.mean()) == pytest.approx(0, abs=0.02) and float(drawn.std()) == pytest.approx(1, abs=0.02)
    for wrong in ({"part": 1}, {"estimator": "best"}, {"spread": 0.0}):
        with pytest.raises(RequestError, match="fitness: "):
            Fitness(**wrong)


def test_a_payload_of_fitness_draws_no_more_than_fits_in_memory():
    """Codes that are all zero take few bytes, and a part of a million elements would have a million perturbations."""
    codec, sent = Fitness(part=1 << 20), normal(1 << 20)
    schema = codec.fit([{"a": sent}], 1000).schema
    assert codec.most(schema) == 8
    parts = [
        memoryview(part) for part in codec.pack(codec.prepare(sent, schema, {"levels": 7}, 0), schema, 8, {"levels": 7})
    ]
    assert len(codec.unpack(parts, schema, 0)) == 1 << 20
    parts[0] = memoryview(coding.encode(torch.zeros(1 << 20, dtype=torch.int8)))
    with pytest.raises(ArtifactError, match="1048576 numbers of 8"):
        codec.unpack(parts, schema, 0)


def test_the_same_share_of_every_tensor_is_sent_layer_by_layer():
    sent = {"large": 100 * normal(3000), "small": normal(1000, seed=1)}
    counts = {}
    for layerwise in (False, True):
        found = carried(KMeansLevels(False, (2,), layerwise=layerwise), sent, 200)
        counts[layerwise] = {name: int(torch.count_nonzero(tensor)) for name, tensor in found.items()}
    assert counts[False]["small"] == 0
    assert counts[True]["large"] == pytest.approx(3 * counts[True]["small"], abs=2)
