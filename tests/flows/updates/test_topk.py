"""Top-k: what is sent is the largest, and what is not sent is not lost."""

import pytest
import torch

from octavo import coding
from octavo.errors import ArtifactError, RequestError
from octavo.flows import FlowPlan, Schema
from octavo.flows.payload import seal
from octavo.flows.updates.large import Large
from octavo.flows.updates.topk import TopK


def update(seed, count=4000):
    g = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(count, generator=g), "b": torch.randn(20, 30, generator=g) * 0.1}


def test_what_is_not_sent_is_sent_later():
    codec = TopK()
    plan = codec.fit([update(0)], 600)
    sender, receiver, sent, received = codec.start(plan), codec.start(plan), torch.zeros(4600), torch.zeros(4600)
    for seed in range(12):
        sent += plan.schema.flat(update(seed))
        received += plan.schema.flat(codec.decode(codec.encode(update(seed), sender), receiver))
        assert torch.allclose(received + sender.missing, sent, atol=1e-4)
    assert receiver.missing is None
    # The same update again and again arrives in full, as far as its small entries take turns.
    sender, received = codec.start(plan), torch.zeros(4600)
    receiver = codec.start(plan)
    for _ in range(60):
        received += plan.schema.flat(codec.decode(codec.encode(update(3), sender), receiver))
    mean = received / 60
    assert float((mean - plan.schema.flat(update(3))).norm()) < 0.2 * float(mean.norm())


def test_without_feedback_nothing_is_kept():
    codec = TopK(feedback=False)
    state = codec.start(codec.fit([update(0)], 600))
    first = codec.encode(update(1), state)
    assert state.missing is None and first[22:] == codec.encode(update(1), state)[22:]


@pytest.mark.parametrize("levels", [1, 7, 127])
def test_the_largest_are_sent_on_a_grid(levels):
    codec = TopK(levels=(levels,), feedback=False)
    plan = codec.fit([update(0)], 500)
    sent, found = update(1), codec.decode(codec.encode(update(1), codec.start(plan)), codec.start(plan))
    flat, given = plan.schema.flat(sent), plan.schema.flat(found)
    there = given != 0
    assert flat[there].abs().min() >= flat[~there].abs().max()
    assert bool((flat[there] * given[there] > 0).all())
    for part in found.values():
        assert len(part[part != 0].abs().unique()) <= levels
    # A contraction: the error is less than that of sending nothing.
    assert float((flat - given).norm()) < float(flat.norm())


def test_more_bytes_lose_less():
    codec, errors = TopK(feedback=False), []
    for budget in (200, 500, 1200, 3000):
        plan = codec.fit([update(0)], budget)
        given = codec.decode(codec.encode(update(0), codec.start(plan)), codec.start(plan))
        errors.append(float((plan.schema.flat(update(0)) - plan.schema.flat(given)).norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2 * errors[0]


@pytest.mark.parametrize("levels", [(), (0,), (128,), (True,), ("7",), (2.5,)])
def test_levels_that_no_byte_holds_are_refused(levels):
    with pytest.raises(RequestError, match="levels is"):
        TopK(levels=levels)


def test_parts_that_do_not_fit_are_refused_before_memory_is_taken():
    codec, schema = TopK(), Schema.of({"a": torch.zeros(50), "b": torch.zeros(9)})
    plan = FlowPlan("top-k", TopK()._knobs(), 1000, schema, {"amount": 1, "levels": 7})
    code = lambda values, dtype=torch.int8: coding.encode(torch.tensor(values, dtype=dtype))  # noqa: E731
    gap = lambda values: b"\0" + code([value - 1 for value in values], torch.int32)  # noqa: E731
    step, good = b"\0\0\x80?", code([3, -1])
    vast = coding.encode(torch.ones(1 << 24, dtype=torch.int8))
    steps = step * 2
    found = codec.decode(seal(plan, 0, (gap([50, 1]), good, steps)), codec.start(plan))
    assert found["a"][49] == 3 and found["b"][0] == -1
    wrong = [
        (gap([1]), good, steps), (gap([60, 1]), good, steps), (gap([50, 10]), good, steps), (gap([50, 0]), good, steps),
        (gap([50, -3]), good, steps), (gap([50, 1]), good, b""), (gap([50, 1]), good, step), (gap([50, 1]), good, step[:3]),
        (gap([50, 1]), code([0, 1]), steps), (gap([50, 1]), code([-128, 1]), steps), (vast, vast, steps),
        (gap([50, 1]), good, step + b"\0\0\x80\x7f"), (gap([50, 1]), good, step + b"\0\0\x80\xbf"),
        (gap([50, 1]), code([3, 1], torch.int16), steps), (b"", good, steps), (gap([50, 1]), b"", steps),
    ]  # fmt: skip
    for parts in wrong:
        with pytest.raises(ArtifactError):
            codec.decode(seal(plan, 0, parts), codec.start(plan))


@pytest.mark.parametrize("kind", ["normal", "ties", "mostly zeros", "one outlier", "few"])
@pytest.mark.parametrize("share", [0.0, 1e-4, 0.01, 0.3, 0.9, 1.0])
def test_the_largest_are_those_of_a_stable_sort(kind, share):
    flat = torch.randn(40 if kind == "few" else 50_000, generator=torch.Generator().manual_seed(0))
    if kind == "ties":
        flat = flat.round()
    elif kind == "mostly zeros":
        flat[flat.abs() < 2.5] = 0
    elif kind == "one outlier":
        flat = 1e-3 * flat.sign()
        flat[7] = 5
    amount = round(share * len(flat))
    order = flat.abs().argsort(descending=True, stable=True)[:amount]
    wanted = order[flat[order] != 0].sort().values
    found = Large(flat)
    for tried in (amount // 2, amount, amount // 3, amount):
        found.largest(tried)
    places, values = found.largest(amount)
    assert torch.equal(places, wanted) and torch.equal(values, flat[wanted])
