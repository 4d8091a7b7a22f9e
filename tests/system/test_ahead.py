"""Work done ahead keeps its order and a bounded number of results."""

import threading
import time

import pytest
import torch

from octavo.system.ahead import in_order


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_come_in_order_and_few_are_ahead(threads):
    lock, begun, used, ahead = threading.Lock(), [0], 0, []

    def work(item):
        with lock:
            begun[0] += 1
            ahead.append(begun[0] - used)
        time.sleep(0.001 * (item % 3))
        return item * item

    for item, result in enumerate(in_order(work, range(30), threads)):
        assert result == item * item
        used += 1
    assert used == begun[0] == 30
    # One is in the hands of who uses it, while its thread has begun the next.
    assert max(ahead) <= threads + 1


def test_a_slow_first_item_holds_nobody_up():
    begun = [threading.Event() for _ in range(30)]

    def work(item):
        begun[item].set()
        return item if item else begun[6].wait(10)

    # Two are in progress or done, and five more may wait for the first.
    assert list(in_order(work, range(30), 2, ahead=5)) == [True, *range(1, 30)]


def test_few_results_wait_for_a_slow_first_item():
    lock, begun, free = threading.Lock(), [], threading.Event()

    def work(item):
        with lock:
            begun.append(item)
            if len(begun) == 7:
                free.set()
        if not item:
            free.wait(10)
            time.sleep(0.05)
            return list(begun)
        return item

    first, *rest = in_order(work, range(30), 2, ahead=5)
    assert sorted(first) == list(range(7)) and rest == list(range(1, 30))


def test_an_error_ends_the_work():
    seen = []

    def work(item):
        seen.append(item)
        if item == 3:
            raise ValueError("three")
        return item

    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match="three"):
        list(in_order(work, range(1000), 2))
    assert len(seen) < 10
    assert torch.get_num_threads() == threads
