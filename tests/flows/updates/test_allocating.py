"""The dynamic programme and the multiplier choose what brute force chooses, and settings are refreshed."""

import copy
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from octavo.errors import RequestError
from octavo.flows.updates.allocating import BINS, least_bytes, least_error
from octavo.flows.updates.mixed import Mixed


def cases():
    """Up to six units with four candidates: more bytes have smaller errors, nearly always."""
    for seed in range(40):
        g = np.random.default_rng(seed)
        count = int(g.integers(1, 7))
        sizes = np.sort(g.integers(1, 400, (count, 4)), 1)
        errors = -np.sort(-g.exponential(1, (count, 4)), 1)
        if seed % 3 == 0:
            errors = g.permuted(errors, axis=1)
        yield sizes, errors, int(g.integers(0, 4))


def all_choices(table):
    return [np.array(chosen) for chosen in product(range(4), repeat=len(table))]


def total(table, chosen):
    return table[np.arange(len(table)), chosen].sum()


def test_fewest_bytes_within_an_error_are_those_of_brute_force():
    for sizes, errors, default in cases():
        bound = errors[:, default].sum()  # that of a uniform setting, which rounding must not make infeasible
        fitting = [chosen for chosen in all_choices(sizes) if total(errors, chosen) <= bound * (1 + 1e-12)]
        best = min(total(sizes, chosen) for chosen in fitting)
        chosen = least_bytes(sizes, errors, bound)
        assert total(sizes, chosen) <= best <= sizes[:, default].sum()
        assert total(errors, chosen) <= bound * (1 + len(sizes) / BINS)


def test_a_bound_that_cannot_be_met_gives_the_least_error():
    sizes, errors, _ = next(cases())
    assert (least_bytes(sizes, errors, errors.min(1).sum() / 2) == errors.argmin(1)).all()
    assert (least_bytes(sizes, np.zeros_like(errors), 0.0) == sizes.argmin(1)).all()


def test_least_error_within_bytes_is_that_of_brute_force():
    for sizes, errors, default in cases():
        room = int(sizes[:, default].sum())
        fitting = [chosen for chosen in all_choices(sizes) if total(sizes, chosen) <= room]
        best = min(total(errors, chosen) for chosen in fitting)
        chosen = least_error(sizes, errors, room)
        assert total(sizes, chosen) <= room and total(errors, chosen) == pytest.approx(best)


def update(seed, low=True):
    """Three matrices: of low rank and noisy, sparse, and faint."""
    g = torch.Generator().manual_seed(seed)
    flat = torch.randn(100, 2, generator=g) @ torch.randn(2, 100, generator=g)
    sparse = torch.zeros(60, 80)
    sparse.view(-1)[torch.randperm(4800, generator=g)[:60]] = 5.0
    faint = 0.01 * torch.randn(70, 70, generator=g)
    return {"low": flat if low else sparse.repeat(3, 2)[:100, :100], "sparse": sparse, "faint": faint, "bias": faint[0]}


@pytest.fixture(scope="module")
def plan():
    return Mixed().fit([update(0)], 2000)


def test_every_tensor_gets_what_serves_it_and_never_less_than_the_uniform_setting(plan):
    codec = Mixed()
    setting = plan.setting
    assert setting["mixed"] and setting["error"] < 0.5 * setting["uniform"]["error"]
    names = [None if which < 0 else codec.codecs[which] for which, *_ in setting["units"]]
    assert names[:2] == ["powersgd", "threshold"]
    # Where bytes are scarce the faint ones get none of them.
    assert Mixed().fit([update(0)], 800).setting["units"][2][3] == 0
    state, other = codec.start(plan), codec.start(plan)
    payload = codec.encode(update(0), state)
    flat, found = plan.schema.flat(update(0)), plan.schema.flat(codec.decode(payload, other))
    assert 0.98 * 2000 <= len(payload) <= 2000
    assert float((flat - found).square().sum() / flat.square().sum()) <= 1.1 * setting["error"]


def test_fewer_bytes_have_the_error_of_the_uniform_setting():
    codec = Mixed()
    plan = codec.cheapest([update(0)], 2000)
    assert plan.budget < 1500 and plan.setting["error"] <= 1.001 * plan.setting["uniform"]["error"]
    payload = codec.encode(update(0), codec.start(plan))
    flat, found = plan.schema.flat(update(0)), plan.schema.flat(codec.decode(payload, codec.start(plan)))
    assert len(payload) <= plan.budget
    assert float((flat - found).square().sum() / flat.square().sum()) <= 1.1 * plan.setting["uniform"]["error"]


def test_a_choice_follows_the_updates_and_keeps_what_is_missing():
    codec = Mixed(refresh=4)
    plan = codec.fit([update(0)], 2000)
    state, other = codec.start(plan), codec.start(plan)
    total_sent, total_found = torch.zeros(plan.schema.elements), torch.zeros(plan.schema.elements)
    for step in range(6):
        sent = update(step, low=False)
        total_sent += plan.schema.flat(sent)
        total_found += plan.schema.flat(codec.decode(codec.encode(sent, state), other))
        assert torch.allclose(total_found + state.missing, total_sent, atol=1e-3)
        assert (state.choice == {k: v for k, v in plan.setting.items() if k != "amount"}) == (step < 3)
    assert state.evidence is not None  # of the next refresh


def test_tensors_that_had_no_gradient_get_bytes_as_soon_as_they_have_one():
    """As factors of LoRA: one is zero at first, so that the other has no gradient."""
    codec, first = Mixed(), {"a": torch.zeros(80, 80), "b": update(0)["low"]}
    plan = codec.fit([first], 3000)
    state, other = codec.start(plan), codec.start(plan)
    codec.decode(codec.encode(first, state), other)
    later = {"a": torch.randn(80, 80, generator=torch.Generator().manual_seed(1)), "b": first["b"]}
    found = codec.decode(codec.encode(later, state), other)
    assert found["a"].any() and found["b"].any()
    nothing = codec.fit([{name: torch.zeros_like(tensor) for name, tensor in first.items()}], 3000)
    state, other = codec.start(nothing), codec.start(nothing)
    found = codec.decode(codec.encode(later, state), other)
    assert found["a"].any() and found["b"].any()
    held = state.choice
    with pytest.raises(RequestError, match="not finite"):
        codec.encode({**later, "a": later["a"] / 0}, state)
    assert state.choice is held
    with pytest.raises(RequestError, match="fit it again"):
        codec.start(replace(plan, setting={**plan.setting, "silent": [7]}))


@pytest.mark.parametrize("largest", [1.0, 3.4e38])
def test_a_choice_is_made_again_however_large_updates_are(largest):
    """Ten updates at the edge of float32 have a mean, although their sum is infinite."""
    codec, sent = Mixed(refresh=10), {"a": torch.full((70, 70), largest), "b": torch.full((9,), -largest)}
    plan = codec.fit([sent] * 2, 2000)
    state, other = codec.start(plan), codec.start(plan)
    for step in range(11):
        found = codec.decode(codec.encode(sent, state), other)
        assert all(torch.allclose(found[name], sent[name]) for name in sent), step
    assert state.step == 11 and plan.setting["error"] == state.choice["error"]


class Interrupted(Mixed):
    """Stopped by its user when everything is done but to hand over the payload."""

    def advance(self, flat, state):
        super().advance(flat, state)
        raise KeyboardInterrupt


def test_states_move_only_when_something_was_sent():
    codec, stopped = Mixed(refresh=2), Interrupted(refresh=2)
    first = {**update(0), "faint": torch.zeros(70, 70)}
    plan = codec.fit([first], 2000)
    state, twin = codec.start(plan), codec.start(plan)
    for step in range(2):
        before = copy.deepcopy(vars(state))
        # At first a silent tensor has content; then the choice is made again.
        for sender, tensors, error in (
            (stopped, update(step), KeyboardInterrupt),
            (codec, {**update(step), "bias": update(step)["bias"] / 0}, RequestError),
        ):
            with pytest.raises(error):
                sender.encode(tensors, state)
            after = vars(state)
            kept = {name for name, value in before.items() if not isinstance(value, torch.Tensor)}
            assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
            assert all(torch.equal(after[name], before[name]) for name in before.keys() - kept)
        assert codec.encode(update(step), state) == codec.encode(update(step), twin)


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"codecs": ()}, "codecs is"), ({"codecs": ("sign", "sign")}, "none twice"), ({"codecs": ("qsgd",)}, "cannot be mixed"),
        ({"codecs": ("mixed",)}, "cannot be mixed"), ({"codecs": ("nothing",)}, "is not known"), ({"joined": 0}, "joined is"),
        ({"refresh": 2.5}, "refresh is"),
    ],
)  # fmt: skip
def test_what_cannot_be_mixed_is_refused(knobs, says):
    with pytest.raises(RequestError, match=says):
        Mixed(**knobs)


def test_settings_of_other_codecs_are_refused(plan):
    codec = Mixed()
    row = plan.setting["units"][0]
    for units in ([], [row], [[9, *row[1:]]] * 4, [[*row[:2], -1, 5]] * 4, [[0, {"rank": 77}, 1, 5]] * 4, None):
        with pytest.raises(RequestError, match="fit it again"):
            codec.start(replace(plan, setting={**plan.setting, "units": units}))
