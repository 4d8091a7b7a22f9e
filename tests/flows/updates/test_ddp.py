"""Real processes train one model over loopback, and send payloads of a stated size instead of gradients."""

import socket
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist
from torch import nn

import octavo
from octavo.errors import RequestError

NET = """
import os, sys, datetime, torch
import torch.distributed as dist
from torch import nn
import octavo

rank, port, world = (int(text) for text in sys.argv[1:])
store = dist.TCPStore("127.0.0.1", port, world, rank == 0, timeout=datetime.timedelta(seconds=60))
dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
model = nn.parallel.DistributedDataParallel(net, bucket_cap_mb=0.05)
generator = torch.Generator().manual_seed(5)
teacher = torch.randn(64, 10, generator=generator)

def batch(step):
    g = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(64, 64, generator=g)
    return x, (x @ teacher).argmax(1)

def loss_of(step, factor=1.0):
    x, y = batch(step)
    return nn.functional.cross_entropy(model(x), y) * factor

def same(tensor):
    parts = [torch.zeros_like(tensor) for _ in range(world)]
    dist.all_gather(parts, tensor)
    return all(torch.equal(parts[0], part) for part in parts)

def told(act):
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
"""


def run(tmp_path, body, world=2):
    """The lines that each process printed."""
    script = tmp_path / "worker.py"
    # Threads of gloo sometimes abort a process that ends by itself.
    ending = "dist.destroy_process_group()\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"
    script.write_text(NET + textwrap.dedent(body) + "\n" + ending)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(port), str(world)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        outs = [worker.communicate(timeout=150) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, errors) in zip(workers, outs, strict=True):
        assert worker.returncode == 0, errors
    return [out.splitlines() for out, _ in outs]


def test_two_processes_train_with_payloads_and_stay_equal(tmp_path):
    lines = run(
        tmp_path,
        """
        sync = octavo.updates.compress_ddp(model, ratio=50)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        raw = sum(p.nbytes for p in net.parameters())
        losses, sizes = [], []
        for step in range(60):
            optimizer.zero_grad()
            loss = loss_of(step)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            sizes.append(sync.sent)
        assert sync.steps == 60 and sync.memory >= raw, sync.memory
        assert max(sizes) <= raw // 50 and min(sizes) >= 0.98 * (raw // 50) - 64, sizes
        assert all(same(p.detach()) for p in net.parameters())
        assert sum(losses[-10:]) / 10 < 0.6 * sum(losses[:5]) / 5, losses
        assert sync.plan.setting["error"] <= sync.plan.setting["uniform"]["error"]
        print("fine")
        """,
    )
    assert lines == [["fine"], ["fine"]]


def test_gradients_that_are_not_finite_stop_all_workers(tmp_path):
    lines = run(
        tmp_path,
        """
        sync = octavo.updates.compress_ddp(model, ratio=20, codec="threshold")
        loss_of(0).backward()
        print(told(lambda: loss_of(1, float("nan") if rank == 1 else 1.0).backward()))
        assert sync.steps == 1
        """,
    )
    assert "worker 1 could not send its gradients" in lines[0][0]
    assert "not finite; nothing was sent" in lines[1][0]


def test_new_parameters_are_told(tmp_path):
    lines = run(
        tmp_path,
        """
        sync = octavo.updates.compress_ddp(model, ratio=20, codec="threshold")
        loss_of(0).backward()
        net.append(nn.Linear(10, 10))
        print(told(lambda: loss_of(1).backward()))
        """,
    )
    assert all("'5.weight' is new since compress_ddp" in out[0] for out in lines)


def test_a_killed_worker_stops_the_others(tmp_path):
    lines = run(
        tmp_path,
        """
        sync = octavo.updates.compress_ddp(model, ratio=20, codec="threshold")
        loss_of(0).backward()
        if rank == 1:
            os._exit(0)
        net.zero_grad()
        said = told(lambda: loss_of(1).backward())
        print("nothing" != said and sync.steps == 1, flush=True)
        os._exit(0)
        """,
    )
    assert lines == [["True"], []]


def test_gradients_of_zeros_arrive_as_zeros(tmp_path):
    lines = run(
        tmp_path,
        """
        sync = octavo.updates.compress_ddp(model, ratio=20)
        for step in range(3):
            net.zero_grad()
            loss_of(step, 0.0).backward()
            assert all(not p.grad.any() for p in net.parameters())
        loss_of(3).backward()
        print(sync.steps, all(bool(torch.isfinite(p.grad).all()) for p in net.parameters()), bool(net[0].weight.grad.any()))
        """,
    )
    assert lines == [["4 True True"]] * 2


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("size=20_000 + 100 * rank", "worker 1 has payloads of 20100 bytes and worker 0 of 20000; give all"),
        ("size=20_000 - 19_990 * rank", "worker 1 has payloads of 10 bytes and worker 0 of 20000; give all"),
        ("size=20_000, codec=('top-k', 'threshold')[rank]", "worker 1 has another codec or other parameters than"),
    ],
    ids=["budgets", "budgets of which one is too small", "codecs"],
)
def test_workers_of_different_requests_are_all_told_the_same(asked, says, tmp_path):
    lines = run(
        tmp_path,
        f"""
        sync = octavo.updates.compress_ddp(model, {asked})
        print(told(lambda: loss_of(0).backward()))
        assert sync.steps == sync.sent == sync.ratio == 0
        """,
    )
    assert lines[0] == lines[1] and lines[0][0].startswith(f"RequestError: compress_ddp: {says}")


def test_means_neither_overflow_nor_drop_small_terms(tmp_path):
    """Sums would be infinite in float16 and float32, and 256 + 1 is 256 in bfloat16."""
    lines = run(
        tmp_path,
        """
        for dtype, sent, mean in (
            (torch.float16, [6e4, 6e4, 6e4], 6e4), (torch.bfloat16, [256, 1, 1], 86), (torch.float32, [3e38] * 3, 3e38),
        ):
            linear = nn.parallel.DistributedDataParallel(nn.Linear(8, 8, bias=False).to(dtype))
            octavo.updates.compress_ddp(linear, size=1000, codec="top-k")
            linear(torch.full((1, 8), sent[rank], dtype=dtype)).sum().backward()
            found = linear.module.weight.grad
            assert found.dtype == dtype and same(found), found
            assert torch.allclose(found, torch.full_like(found, mean)), found
        print("fine")
        """,
        world=3,
    )
    assert lines == [["fine"]] * 3


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield nn.parallel.DistributedDataParallel(nn.Linear(100, 40))
    dist.destroy_process_group()


def test_a_changed_number_of_workers_is_told(alone):
    sync = octavo.updates.compress_ddp(alone, size=1000, codec="threshold")
    alone(torch.randn(8, 100)).square().sum().backward()
    assert sync.sent <= 1000 and sync.ratio >= 16
    sync.workers = 3
    with pytest.raises(RequestError, match="there were 3 workers and now are 1"):
        alone(torch.randn(8, 100)).square().sum().backward()


def test_requests_without_meaning_are_refused(alone):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sharded = fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1,)))
    wrong = [
        (sharded, {"ratio": 50}, "in FSDP"), (nn.Linear(2, 2), {"ratio": 50}, "is a Linear"),
        (alone, {"ratio": 1e6}, "leaves no byte of 16160"),
        (nn.parallel.DistributedDataParallel(nn.Linear(2, 2), find_unused_parameters=True), {"ratio": 2}, "drops what was"),
    ]  # fmt: skip
    for model, request, says in wrong:
        with pytest.raises(RequestError, match=says):
            octavo.updates.compress_ddp(model, **request)


def test_a_model_is_compressed_once(alone):
    first = octavo.updates.compress_ddp(alone, size=1000, codec="threshold")
    with pytest.raises(RequestError, match=r"takes no communication hook, as where it has one already .* again"):
        octavo.updates.compress_ddp(alone, size=500, codec="threshold")
    alone(torch.randn(8, 100)).square().sum().backward()
    assert first.steps == 1 and 500 < first.sent <= 1000
