"""Matrices kept as they are, or in half precision."""

import pytest
import torch

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.methods import get_method, select_methods

NOTHING = Evidence(torch.ones(24), None)


@pytest.mark.parametrize(("dtype", "precision"), [("float32", 0.0), ("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_precision_and_size(dtype, precision, matrix):
    form = get_method("keep").encode(matrix, {"dtype": dtype}, NOTHING)
    assert bool(((form.dense() - matrix).abs() <= precision * matrix.abs() + 1e-7 * (precision > 0)).all())
    assert form.weight.element_size() == (4 if dtype == "float32" else 2)


def test_float16_only_within_its_range():
    keep, large = get_method("keep"), torch.tensor([[1.0, 65504.0]])
    assert [s["dtype"] for s in keep.settings(large, NOTHING)] == ["float32", "bfloat16"]
    assert [s["dtype"] for s in keep.settings(large / 2, NOTHING)] == ["float32", "bfloat16", "float16"]
    with pytest.raises(RequestError, match=r"keep.*float16.*65504"):
        keep.encode(large, {"dtype": "float16"}, NOTHING)


def test_unknown_dtypes_are_named():
    with pytest.raises(RequestError, match=r"keep: dtype is 'int8'.*float32"):
        get_method("keep").encode(torch.ones(2, 2), {"dtype": "int8"}, NOTHING)


def test_presets():
    """What each preset tries: a change of these sets should be meant."""
    fast, default, best = ({method.name for method in select_methods(None, p)} for p in ("fast", "default", "best"))
    assert {"entropy", "keep"} <= fast
    assert {"rtn", "gptq", "sparsegpt", "activation-svd"} <= default - fast
    assert {"kmeans", "magnitude", "wanda", "svd", "eora"} <= best - default
