"""Whoever sends updates takes the same requests, and refuses the others with the same words."""

import pytest
import torch.distributed as dist
from torch import nn

import octavo
from octavo.errors import RequestError
from octavo.flows import FLOWS
from octavo.flows.updates.flower import CompressedUplink

NEITHER = "give a ratio, such as ratio=50, or the size of a payload in bytes"
RATIO, SIZE = "give a number from 1, such as 50", "give the bytes of a payload, such as 20_000"
CODEC = "is not a codec of updates; name one, such as 'threshold'"


@pytest.fixture(params=["compress_ddp", "CompressedUplink"])
def sender(request):
    """The name of a sender, and a call that asks it."""
    if request.param == "CompressedUplink":
        pytest.importorskip("flwr", reason="needs the extra flower")
        yield request.param, CompressedUplink
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = nn.parallel.DistributedDataParallel(nn.Linear(100, 40))
    yield request.param, lambda **asked: octavo.updates.compress_ddp(model, **asked)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, NEITHER), ({"ratio": 2, "size": 3}, NEITHER),
        *(({"ratio": r}, f"the ratio is {r!r}; {RATIO}") for r in (0, 0.5, -3.0, True, "50", float("inf"), float("nan"))),
        *(({"size": s}, f"the size is {s!r}; {SIZE}") for s in (0, -1, True, 2.5, "1MB")),
        ({"ratio": 2, "codec": None}, f"None {CODEC}"), ({"size": 9, "codec": 7}, f"7 {CODEC}"),
    ],
)  # fmt: skip
def test_requests_without_meaning_are_refused(sender, asked, says):
    who, ask = sender
    with pytest.raises(RequestError) as refused:
        ask(**asked)
    assert str(refused.value) == f"{who}: {says}"


def test_codecs_that_are_not_known_are_refused(sender):
    with pytest.raises(RequestError, match="is not known"):
        sender[1](ratio=2, codec="nothing")


@pytest.mark.parametrize(
    "asked", [{"ratio": 1}, {"ratio": 1.5}, {"size": 1}, {"size": 500, "codec": FLOWS.get("top-k")()}]
)
def test_requests_at_the_edge_of_what_has_meaning_are_taken(sender, asked):
    assert sender[1](**asked)
