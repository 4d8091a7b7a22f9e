"""Evidence and matrices that the tests of all families share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from octavo import coding
from octavo.calibration.evidence import Evidence
from octavo.calibration.watches import DAMPING
from octavo.forms import Form


def _evidence(rows: int, columns: int, seed: int = 0) -> Evidence:
    """Inputs as layers see them: correlated, of very different size, with a mean; outputs of different weight."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -1.5, columns)[:, None]
    mixing = torch.randn(columns, columns, generator=generator) * spread / columns**0.5
    sizes = torch.logspace(0, -1.5, columns)[torch.randperm(columns, generator=generator)]
    inputs = torch.randn(4 * columns + 8, columns, generator=generator) @ mixing * sizes + 0.1 * sizes
    moment = (inputs.t() @ inputs).double() / len(inputs)
    moment += DAMPING * moment.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    weights = torch.rand(rows, generator=generator).square() + 0.05
    return Evidence(weights, moment.float())


@pytest.fixture(scope="session")
def evidence_of() -> Callable[..., Evidence]:
    return _evidence


@pytest.fixture(scope="session")
def matrix() -> Tensor:
    """Weights of a trained layer, roughly: some directions strong, tails heavier than a Gaussian's."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(96, 128, generator=generator)
    strong = torch.randn(96, 12, generator=generator) @ torch.randn(12, 128, generator=generator)
    return (base + 0.4 * strong) * torch.rand(96, 1, generator=generator).add(0.5) * 0.05


@pytest.fixture(scope="session")
def evidence() -> Evidence:
    return _evidence(96, 128)


@pytest.fixture(scope="session")
def size() -> Callable[[Form], int]:
    """Bytes that a form's parts take."""

    def measure(form: Form) -> int:
        parts = form.tensors().values()
        return sum(p.numel() * p.element_size() if p.is_floating_point() else len(coding.encode(p)) for p in parts)

    return measure
