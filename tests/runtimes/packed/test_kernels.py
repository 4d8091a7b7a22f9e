"""Every form runs, with the kernel that is expected of it, in the bytes that it states."""

import pytest
import torch

from octavo.calibration.evidence import Evidence
from octavo.forms import Codebook, Dense, Grid, LowRank, Sparse, Sum
from octavo.methods import methods
from octavo.runtimes.packed import kernel_for, resident_bytes
from octavo.runtimes.packed.kernels import GROUPS, DenseKernel, int4_layout

INT4, INT8, BFLOAT16, PLAIN = "int4", "int8", "bfloat16", "none"


def grid(rows, columns, low, high, groups=1, *, zero=False, steps=False, dtype=torch.int8):
    codes = torch.randint(low, high + 1, (rows, columns), dtype=dtype)
    scale = torch.rand(rows, groups) + 0.5
    middle = torch.randint(low, high + 1, (rows, groups), dtype=dtype) if zero else None
    exponents = [torch.randint(-9, 10, (count,), dtype=torch.int16) if steps else None for count in (rows, columns)]
    return Grid(codes, scale.bfloat16(), middle, *exponents)


FORMS = {
    "4 bits in groups": (lambda: grid(128, 192, 0, 15, 3, zero=True, dtype=torch.uint8), INT4),
    "4 bits, rows that fill no block": (lambda: grid(70, 128, 0, 15, 4, zero=True, dtype=torch.uint8), INT4),
    "one row": (lambda: grid(1, 64, -8, 7, 2), INT4),
    "4 bits a row": (lambda: grid(64, 96, -8, 7), INT4),
    "2 bits": (lambda: grid(64, 128, 0, 3, 2, zero=True, dtype=torch.uint8), INT4),
    "16 levels anywhere": (lambda: grid(64, 64, -12, 3), INT4),
    "4 bits with steps": (lambda: grid(64, 128, -5, 8, steps=True), INT4),
    "4 bits in odd groups": (lambda: grid(64, 120, 0, 15, 3, zero=True, dtype=torch.uint8), PLAIN),
    "8 bits a row": (lambda: grid(33, 48, -127, 127), INT8),
    "8 bits with steps": (lambda: grid(64, 64, -100, 127, steps=True), INT8),
    "8 bits of 24 columns": (lambda: grid(64, 24, -127, 127), PLAIN),
    "8 bits in groups": (lambda: grid(64, 128, 0, 255, 2, zero=True, dtype=torch.uint8), PLAIN),
    "16 bits": (lambda: grid(64, 64, -999, 999, dtype=torch.int16), BFLOAT16),
    "dense": (lambda: Dense(torch.randn(40, 30)), BFLOAT16),
    "codebook": (lambda: Codebook(torch.randint(0, 9, (64, 64), dtype=torch.uint8), torch.randn(9)), PLAIN),
    "sparse": (lambda: Sparse(torch.eye(40, 64) > 0, Dense(torch.randn(1, 40))), PLAIN),
    "low rank": (lambda: LowRank(grid(64, 32, -8, 7), Dense(torch.randn(32, 48))), "int4 + bfloat16"),
    "sum": (lambda: Sum(grid(64, 64, -99, 99), LowRank(Dense(torch.randn(64, 3)), Dense(torch.randn(3, 64)))), INT8),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_runs_with_its_kernel_in_the_bytes_it_states(name):
    torch.manual_seed(0)
    make, expected = FORMS[name]
    form = make()
    kernel, dense = kernel_for(form), form.dense()
    assert [found.split()[0] for found in kernel.names][: 1 + expected.count("+")] == expected.split(" + ")
    assert sum(part.nbytes for part in kernel.tensors()) == resident_bytes(form)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, form.shape[1])
        out = kernel.matmul(x.to(dtype))
        assert out.dtype == dtype
        # bfloat16 has 8 bits: inputs, scales and products are rounded by up to 0.4% each.
        torch.testing.assert_close(out.float(), x @ dense.T, rtol=0, atol=0.02 * float((x @ dense.T).abs().max()))
    index = torch.tensor([form.shape[0] - 1, 0, form.shape[0] // 2])
    torch.testing.assert_close(kernel.lookup(index), dense[index], rtol=0, atol=0.01 * float(dense.abs().max()))
    torch.testing.assert_close(form.lookup(index), dense[index])
    torch.testing.assert_close(form.apply(x), x @ dense.T, rtol=1e-3, atol=1e-3)


def test_small_matrices_of_every_shape_run():
    torch.manual_seed(0)
    for rows, columns in ((1, 1), (3, 7), (16, 16), (65, 32), (2, 33)):
        form = grid(rows, columns, -8, 7)
        x = torch.randn(4, columns)
        expected = x @ form.dense().T
        torch.testing.assert_close(
            kernel_for(form).matmul(x), expected, rtol=0.05, atol=0.02 * float(expected.abs().max())
        )


def test_a_large_table_is_packed_in_pieces_that_fit_together():
    form = grid(70_000, 64, 0, 15, 2, zero=True, dtype=torch.uint8)
    index = torch.tensor([0, 65_535, 65_536, 69_999])
    kernel = kernel_for(form)
    torch.testing.assert_close(kernel.lookup(index), form.lookup(index), rtol=0, atol=0.2)
    x = torch.randn(1, 64)
    torch.testing.assert_close(kernel.matmul(x)[:, index], x @ form.lookup(index).T, rtol=0.05, atol=3.0)


def test_many_inputs_give_what_few_give():
    torch.manual_seed(0)
    kernel = kernel_for(grid(80, 64, -127, 127, steps=True))
    x = torch.randn(40, 64)
    few = torch.cat([kernel.matmul(row) for row in x.split(1)])
    torch.testing.assert_close(kernel.matmul(x), few, rtol=0.02, atol=0.02 * float(few.abs().max()))


def test_the_layout_of_this_machine_is_understood():
    """If not, int4 grids run without a kernel, and nothing else would say so."""
    assert int4_layout() is not None


@pytest.mark.parametrize(
    "name", [name for name, cls in methods().items() if cls().kernel_settings(torch.ones(2, 256), None)]
)
@pytest.mark.parametrize("columns", [256, 96, 48, 30])
def test_settings_for_memory_have_a_kernel(name, columns):
    torch.manual_seed(0)
    weight = torch.randn(64, columns)
    moments = torch.randn(columns, columns)
    evidence = Evidence(torch.ones(64), moments @ moments.T + columns * torch.eye(columns))
    method = methods()[name]()
    settings = method.kernel_settings(weight, evidence)
    sizes = []
    for setting in settings:
        form = method.encode(weight, setting, evidence)
        assert not isinstance(kernel_for(form), DenseKernel), setting
        sizes.append(resident_bytes(form))
        bits = setting.get("bits", 16)
        overhead = (
            0 if name == "keep" else 16 * 64 if setting["group"] == "row" else 32 * weight.numel() // setting["group"]
        )
        assert sizes[-1] == (bits * weight.numel() + overhead) // 8
    assert sizes == sorted(sizes, reverse=True)
    if name != "keep":
        assert len(settings) == (columns % 16 == 0) + sum(columns % group == 0 for group in GROUPS)
