"""The faster way to multiply is as exact, and PyTorch's own setting comes back."""

import threading

import pytest
import torch

from octavo.system.matmul import fast_matmul

matmul = getattr(torch.backends.mkldnn, "matmul", None)
pytestmark = pytest.mark.skipif(not hasattr(matmul, "fp32_precision"), reason="this PyTorch has no such switch")


def test_products_are_those_of_float32():
    left, right = torch.randn(2, 300, 300, generator=torch.Generator().manual_seed(0))
    exact = left.double() @ right.double()
    with fast_matmul():
        assert float((left @ right - exact).norm() / exact.norm()) < 2e-6


def test_the_setting_comes_back_after_the_last_thread():
    before, entered, leave = matmul.fp32_precision, threading.Event(), threading.Event()

    def other():
        with fast_matmul():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with fast_matmul():
        inside = matmul.fp32_precision
        thread.start()
        entered.wait(10)
    # One of the two is done: the other one's products do not change under it.
    assert matmul.fp32_precision == inside
    leave.set()
    thread.join()
    assert matmul.fp32_precision == before


def test_the_setting_comes_back_after_an_error():
    before = matmul.fp32_precision
    with pytest.raises(ValueError, match="inside"), fast_matmul():
        raise ValueError("inside")
    assert matmul.fp32_precision == before
