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
