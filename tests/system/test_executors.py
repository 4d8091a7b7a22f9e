"""Executors: the same results in the same order, whoever does the work and whatever becomes of it."""

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

import octavo
from octavo.errors import RequestError
from octavo.system.executors import Local, RayExecutor, executor


def product(index, matrix):
    time.sleep(0.01 * (index % 3))
    return index, matrix @ matrix.t(), torch.get_num_threads()


def refuses(index):
    if index == 2:
        raise RequestError("site 'two': no")
    return index


def dies_once(index, marker):
    if index == 3 and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return index * index


@pytest.fixture(scope="module")
def ray():
    pytest.importorskip("ray")
    with RayExecutor(workers=2) as workers:
        yield workers


@pytest.fixture(params=["local", "ray"])
def workers(request):
    return Local(3) if request.param == "local" else request.getfixturevalue("ray")


def test_results_come_in_order_and_do_not_depend_on_the_executor(workers):
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(40, 40, generator=generator) for _ in range(9)]
    threads = torch.get_num_threads()
    found = list(workers.map(product, enumerate(matrices)))
    assert [index for index, *_ in found] == list(range(9))
    assert all(torch.equal(result, matrix @ matrix.t()) for (_, result, _), matrix in zip(found, matrices, strict=True))
    assert all(count == 1 for *_, count in found) and torch.get_num_threads() == threads


def test_the_error_of_a_task_is_told_as_it_is(workers):
    with pytest.raises(RequestError, match="site 'two': no"):
        list(workers.map(refuses, ((index,) for index in range(50))))


def test_arguments_are_asked_for_shortly_before_they_are_needed(workers):
    asked = []

    def arguments():
        for index in range(100):
            asked.append(index)
            yield (index + 3,)

    results = workers.map(refuses, arguments())
    assert next(results) == 3 and len(asked) <= 2 * workers.workers + 1
    results.close()


def test_a_worker_that_is_killed_costs_its_own_tasks_only(ray, tmp_path):
    assert list(ray.map(dies_once, ((index, str(tmp_path / "marker")) for index in range(8)))) == [
        index * index for index in range(8)
    ]
    assert (tmp_path / "marker").exists()


def test_a_cluster_that_does_not_answer_is_an_error_at_once():
    pytest.importorskip("ray")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    started = time.perf_counter()
    silence = pytest.raises(RequestError, match=f"nothing answers at the Ray address 127.0.0.1:{port}")
    with silence, executor(f"ray://127.0.0.1:{port}"):
        pass
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize("name", ["magic", "local:3", "ray://nowhere", "ray:host:99999999"])
def test_unknown_executors_are_refused(name):
    if name.startswith("ray"):
        pytest.importorskip("ray")
    with pytest.raises(RequestError), executor(name):
        pass


def test_no_thread_is_left_behind():
    before = threading.active_count()
    assert list(Local(2).map(refuses, [(0,), (1,)])) == [0, 1]
    assert threading.active_count() == before


def test_a_cluster_gives_the_same_bytes(ray, tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = [(96, 64), (64, 96), (200, 40), (48, 48)]
    layers = [torch.nn.Linear(b, a) for a, b in shapes]
    for layer in layers:
        layer.weight.data = torch.randn(layer.weight.shape, generator=generator)
    model = torch.nn.ModuleDict({f"layer{index}": layer for index, layer in enumerate(layers)})
    for name, workers in (("here", "local"), ("there", ray)):
        octavo.compress(model, ratio=6, preset="data-free", executor=workers).save(tmp_path / name, report=False)
    for file in ("model.safetensors", "octavo.json"):
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes()
