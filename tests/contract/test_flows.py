"""The contract of every flow: it passes by being registered, on samples of what it carries."""

import functools
import json
import math
import subprocess
import sys
import zlib

import pytest
import torch

from octavo.errors import ArtifactError, BudgetError, RequestError
from octavo.flows import FLOWS, FlowPlan, Schema, flow_of
from octavo.flows.updates import UpdateCodec

NAMES = FLOWS.names()


def _updates(seed, scale=1e-2):
    """A few tensors of odd shapes and dtypes, heavy-tailed as gradients are."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "layer.weight": ((96, 130), torch.float32), "layer.bias": ((96,), torch.float32),
        "half": ((33, 7, 3), torch.bfloat16), "small": ((17,), torch.float16), "wide": ((5, 1), torch.float64),
        "single": ((), torch.float32), "nothing": ((0, 4), torch.float32),
    }  # fmt: skip
    return {
        name: (torch.randn(shape, generator=g) * torch.randn(shape, generator=g).exp() * scale).to(dtype)
        for name, (shape, dtype) in shapes.items()
    }


#: What flows, by what a flow carries: a sample for every seed.
SAMPLES = {"updates": _updates}


@pytest.fixture(params=NAMES)
def flow(request):
    return FLOWS.get(request.param)()


def sample(flow, seed=0):
    return SAMPLES[flow.carries](seed)


@functools.cache
def budget_of(flow):
    """A twentieth of what flows, or the least that the flow takes."""
    return within_reach(flow, Schema.of(sample(flow)).nbytes // 20)


@functools.cache
def plan_of(flow):
    return flow.fit([sample(flow)], budget_of(flow))


@functools.cache
def within_reach(flow, budget):
    try:
        flow.fit([sample(flow)], budget)
    except BudgetError as error:
        return math.ceil(1.02 * Schema.of(sample(flow)).nbytes / error.limit)
    return budget


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


def test_payloads_never_exceed_the_budget_and_fill_it(flow):
    def sizes(budget):
        plan = flow.fit([sample(flow, seed) for seed in range(2)], budget)
        state = flow.start(plan)
        assert plan.budget == budget
        return [len(flow.encode(sample(flow, seed), state)) for seed in range(4)]

    for budget in (within_reach(flow, budget_of(flow) // 3), budget_of(flow), 40 * budget_of(flow)):
        found = sizes(budget)
        assert max(found) <= budget
        if min(found) < min(0.98 * budget, budget - 64):
            assert max(sizes(2 * budget)) <= budget, "more bytes would have helped"


def test_shapes_and_dtypes_come_back_and_both_sides_stay_in_step(flow):
    plan = plan_of(flow)
    sender, receiver = flow.start(plan), flow_of(FlowPlan.from_json(plan.to_json())).start(plan)
    for seed in range(4):
        sent = sample(flow, seed)
        before = {name: tensor.clone() for name, tensor in sent.items()}
        found = flow.decode(flow.encode(sent, sender), receiver)
        assert equal(sent, before), "what is sent stays as it is"
        assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in sent.items()}
        assert sender.step == receiver.step == seed + 1
        assert float((found["layer.weight"] * sent["layer.weight"]).sum()) > 0


FRESH = """
import pathlib, sys, torch
from octavo.flows import FlowPlan, flow_of
for folder in pathlib.Path(sys.argv[1]).iterdir():
    plan = FlowPlan.from_json((folder / "plan").read_text())
    flow = flow_of(plan)
    state = flow.start(plan)
    found = [flow.decode((folder / f"payload{seed}").read_bytes(), state) for seed in range(2)]
    torch.save(found, folder / "out")
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """What a process decoded from the payloads of every flow, and what this one did."""
    folder, expected = tmp_path_factory.mktemp("fresh"), {}
    for name in NAMES:
        flow = FLOWS.get(name)()
        plan = plan_of(flow)
        sender, receiver = flow.start(plan), flow.start(plan)
        (folder / name).mkdir()
        (folder / name / "plan").write_text(plan.to_json())
        expected[name] = []
        for seed in range(2):
            payload = flow.encode(sample(flow, seed), sender)
            (folder / name / f"payload{seed}").write_bytes(payload)
            expected[name].append(flow.decode(payload, receiver))
    subprocess.run([sys.executable, "-c", FRESH, str(folder)], check=True, timeout=120)
    return {name: (torch.load(folder / name / "out", weights_only=True), expected[name]) for name in NAMES}


def _spike(shape):
    made = torch.zeros(shape)
    made.view(-1)[3] = -2.5
    return made


#: Updates at the edges of float32, and those whose largest entry is their whole norm.
EDGES = {
    "one entry": lambda: _spike((96, 130)),
    "equal entries": lambda: torch.full((96, 130), 0.1),
    "largest": lambda: torch.full((96, 130), torch.finfo(torch.float32).max),
    "both ends": lambda: torch.cat([torch.full((48, 130), 3e38), torch.full((48, 130), -3e38)]),
    "smallest": lambda: torch.full((96, 130), torch.finfo(torch.float32).smallest_normal),
    "far apart": lambda: torch.logspace(-38, 38, 96 * 130).view(96, 130),
}


@pytest.mark.parametrize("edge", EDGES)
def test_updates_at_the_edges_are_sent_and_received(flow, edge):
    sent = {"layer.weight": EDGES[edge](), "layer.bias": torch.zeros(96)}
    budget = Schema.of(sent).nbytes // 8
    plan = flow.fit([sent, sent], budget)
    sender, receiver = flow.start(plan), flow.start(plan)
    for _ in range(2):
        try:
            payload = flow.encode(sent, sender)
        except RequestError as error:
            # What was left out and the next update may be too large together.
            assert "leaves float32" in str(error) and sender.step == receiver.step
            continue
        assert len(payload) <= budget
        assert all(bool(torch.isfinite(tensor).all()) for tensor in flow.decode(payload, receiver).values())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layer.weight": torch.full((96, 130), math.nan)}, "not finite"),
        ({"wide": torch.full((5, 1), 1e300, dtype=torch.float64)}, "leaves float32"),
        ({"layer.bias": torch.zeros(7)}, "layer.bias"),
    ],
    ids=["not a number", "beyond float32", "another shape"],
)
def test_what_cannot_be_sent_changes_no_state(flow, change, says):
    plan = plan_of(flow)
    sender, untouched, receiver = flow.start(plan), flow.start(plan), flow.start(plan)
    for state in (sender, untouched):
        flow.encode(sample(flow), state)
    with pytest.raises(RequestError, match=says):
        flow.encode({**sample(flow, 1), **change}, sender)
    payload = flow.encode(sample(flow, 2), sender)
    assert payload == flow.encode(sample(flow, 2), untouched)
    with pytest.raises(RequestError, match=says):
        flow.fit(
            [{**sample(flow, 1), **change}]
            if "layer.bias" not in change
            else [sample(flow), {**sample(flow), **change}],
            budget_of(flow),
        )
    receiver.step = 1
    flow.decode(payload, receiver)


def test_a_fresh_process_decodes_the_same_bits(flow, fresh):
    assert all(equal(ours, theirs) for ours, theirs in zip(*fresh[flow.name], strict=True))


def test_the_same_tensors_give_the_same_bytes(flow):
    plan = plan_of(flow)
    assert plan == flow.fit([sample(flow)], budget_of(flow))
    assert flow.encode(sample(flow, 1), flow.start(plan)) == flow.encode(sample(flow, 1), flow.start(plan))


def test_zeros_constants_and_single_elements_are_carried(flow):
    for tensors in (
        {"zeros": torch.zeros(40, 3)}, {"same": torch.full((64,), -0.25)}, {"one": torch.tensor(3.0)},
        {"tiny": torch.full((9,), 1e-38)}, {"huge": torch.full((9,), 3e38)}, {"none": torch.zeros(0)},
        {"half": torch.full((40,), 65504.0).half()},
    ):  # fmt: skip
        plan = flow.fit([tensors], 4000)
        state, other = flow.start(plan), flow.start(plan)
        for _ in range(2):
            found = flow.decode(flow.encode(tensors, state), other)
            assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())
            if "zeros" in tensors:
                assert not found["zeros"].any()


def test_damaged_payloads_are_refused_and_the_receiver_waits_for_the_right_one(flow):
    plan = plan_of(flow)
    payload, receiver = flow.encode(sample(flow), flow.start(plan)), flow.start(plan)
    g = torch.Generator().manual_seed(1)
    damaged = [b"", payload[:5], payload[:-1], payload + b"\0", b"\xff" * len(payload), bytes(len(payload))]
    for place in [*range(30), *torch.randint(len(payload), (60,), generator=g).tolist()]:
        flipped = bytearray(payload)
        flipped[place] ^= 1 + int(torch.randint(255, (), generator=g))
        damaged.append(bytes(flipped))
    for bad in damaged:
        with pytest.raises(ArtifactError):
            flow.decode(bad, receiver)
    assert receiver.step == 0 and flow.decode(payload, receiver)


def test_payloads_with_a_right_checksum_are_not_believed_either(flow):
    """Whoever writes payloads by hand can compute checksums, too."""
    plan = plan_of(flow)
    payload = flow.encode(sample(flow), flow.start(plan))
    g = torch.Generator().manual_seed(2)
    for _ in range(150):
        forged = bytearray(payload)
        for place in torch.randint(22, len(payload), (3,), generator=g).tolist():
            forged[place] = int(torch.randint(256, (), generator=g))
        forged[18:22] = zlib.crc32(forged[22:], zlib.crc32(forged[:18])).to_bytes(4, "little")
        try:
            found = flow.decode(bytes(forged), flow.start(plan))
        except ArtifactError:
            continue
        assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())


def test_lost_repeated_and_foreign_payloads_are_told(flow):
    plan = plan_of(flow)
    sender, receiver = flow.start(plan), flow.start(plan)
    first, second = (flow.encode(sample(flow, seed), sender) for seed in range(2))
    with pytest.raises(ArtifactError, match="lost"):
        flow.decode(second, receiver)
    flow.decode(first, receiver)
    with pytest.raises(ArtifactError, match="received before"):
        flow.decode(first, receiver)
    flow.decode(second, receiver)
    other = flow.fit([{"elsewhere": torch.randn(4000)}], 1000)
    with pytest.raises(ArtifactError, match="another plan"):
        flow.decode(flow.encode({"elsewhere": torch.randn(4000)}, flow.start(other)), flow.start(plan))


def test_what_cannot_be_sent_is_refused_and_nothing_moves(flow):
    plan = plan_of(flow)
    state, fine = flow.start(plan), sample(flow)
    wrong = {
        "not finite": {**fine, "layer.bias": fine["layer.bias"] / 0},
        "is not in the plan": {**fine, "new": torch.ones(3)},
        "was not given": {name: tensor for name, tensor in fine.items() if name != "half"},
        "the plan says": {**fine, "small": fine["small"].float()},
    }
    for says, tensors in wrong.items():
        with pytest.raises(RequestError, match=says):
            flow.encode(tensors, state)
    assert state.step == 0 and flow.encode(fine, state) == flow.encode(fine, flow.start(plan))
    for samples, says in (([], "no samples"), ([{}], "there are none"), ([{"ids": torch.ones(3).long()}], "int64")):
        with pytest.raises(RequestError, match=says):
            flow.fit(samples, 1000)
    with pytest.raises(RequestError, match="budget is"):
        flow.fit([fine], 0)
    with pytest.raises(BudgetError) as refused:
        flow.fit([fine], 3)
    assert refused.value.limit > 20


def test_plans_are_checked(flow):
    plan = plan_of(flow)
    text = plan.to_json()
    assert FlowPlan.from_json(text) == plan
    data = json.loads(text)
    for change in (
        {"schema": []}, {"schema": [["a", "float32", [-1]]]}, {"schema": [["a", "int8", [1]]]}, {"budget": 0},
        {"schema": [["a", "float32", [1 << 50]]]}, {"knobs": 3}, {"flow": None}, {"schema": None},
    ):  # fmt: skip
        with pytest.raises(RequestError, match="not the plan of a flow"):
            FlowPlan.from_json(json.dumps({**data, **change}))
    with pytest.raises(RequestError, match="is not known"):
        flow_of(FlowPlan.from_json(json.dumps({**data, "flow": "nothing"})))
    with pytest.raises(RequestError, match="does not take the knobs"):
        flow_of(FlowPlan.from_json(json.dumps({**data, "knobs": {"unheard": 1}})))


def codecs(unbiased):
    kinds = {name: FLOWS.get(name) for name in NAMES}
    return [name for name, kind in kinds.items() if issubclass(kind, UpdateCodec) and kind.unbiased == unbiased]


def floats(seed):
    """Tensors that no dtype rounds, of 1,000 heavy-tailed elements."""
    g = torch.Generator().manual_seed(seed)
    flat = torch.randn(1000, generator=g) * torch.randn(1000, generator=g).exp()
    return {"matrix": flat[:900].view(30, 30), "vector": flat[900:] * 0.1}


@pytest.mark.parametrize("name", codecs(unbiased=True))
def test_the_mean_of_an_unbiased_codec_over_many_draws_is_its_input(name):
    codec, sent, draws = FLOWS.get(name)(), floats(0), 150
    plan = codec.fit([sent], 1000)
    sender, receiver = codec.start(plan), codec.start(plan)
    flat = plan.schema.flat(sent)
    found = torch.stack([plan.schema.flat(codec.decode(codec.encode(sent, sender), receiver)) for _ in range(draws)])
    spread = float((found - flat).square().sum(1).mean().sqrt())
    # The error of a mean falls with the root of their number, and its direction is that of no bias.
    assert float((found.mean(0) - flat).norm()) < 1.2 * spread / draws**0.5
    assert float(found.mean(0) @ flat / (flat @ flat)) == pytest.approx(1, abs=0.05)
    with pytest.raises(RequestError, match="its errors would grow"):
        FLOWS.get(name)(feedback=True)


@pytest.mark.parametrize("name", codecs(unbiased=False))
@pytest.mark.parametrize("budget", [300, 900])
def test_a_biased_codec_contracts(name, budget):
    codec, shares = FLOWS.get(name)(feedback=False), []
    for seed in range(3):
        sent = floats(seed)
        plan = codec.fit([sent], budget)
        flat, found = plan.schema.flat(sent), codec.decode(codec.encode(sent, codec.start(plan)), codec.start(plan))
        shares.append(float((flat - plan.schema.flat(found)).square().sum() / flat.square().sum()))
    assert max(shares) < 0.95
