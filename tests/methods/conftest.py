"""Evidence and matrices that the tests of all families share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from octavo import coding, forms
from octavo.calibration.evidence import Evidence
from octavo.calibration.watches import DAMPING
from octavo.forms import Form
from octavo.methods import get_method


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


def _edges() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = ((1, 1), (1, 7), (7, 1), (1, 130), (130, 1), (5, 3), (33, 65), (40, 8))
    table = {f"{rows}x{columns}": torch.randn(rows, columns, generator=generator) for rows, columns in shapes}
    usual = torch.randn(24, 72, generator=generator)
    table["zeros"] = torch.zeros(24, 72)
    table["zero rows"] = torch.where(torch.arange(24)[:, None] % 3 == 0, 0.0, usual)
    table["zero columns"] = torch.where(torch.arange(72) % 3 == 0, 0.0, usual)
    table["constant"] = torch.full((24, 72), -0.7)
    table["constant rows"] = torch.linspace(-2, 2, 24)[:, None].expand(24, 72).contiguous()
    table["outlier"] = usual.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(1e6))
    table["vast outlier"] = usual.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(-1e15))
    table["large"] = usual * 1e7
    table["small"] = usual * 1e-9
    table["one weight"] = torch.zeros(24, 72).index_put((torch.tensor(2), torch.tensor(70)), torch.tensor(3.0))
    table["bfloat16"] = usual.bfloat16()
    return table


@pytest.fixture(scope="session", params=_edges().items(), ids=lambda pair: pair[0])
def edge(request: pytest.FixtureRequest) -> Tensor:
    return request.param[1]


@pytest.fixture(scope="session")
def check_edge() -> Callable[[str, Tensor], None]:
    """Every setting of a method: finite, of bounded error, restored bit for bit, and the same again."""

    def check(name: str, weight: Tensor) -> None:
        rows, columns = weight.shape
        energy = float(weight.double().square().sum())
        for evidence in (Evidence(torch.ones(rows), None), _evidence(rows, columns)):
            method = get_method(name)
            settings = method.settings(weight, evidence)
            assert settings
            for setting in settings[:: max(1, len(settings) // 4)]:
                form = method.encode(weight, setting, evidence)
                dense = form.dense()
                assert dense.shape == weight.shape and dense.dtype == torch.float32
                assert bool(torch.isfinite(dense).all())
                again = forms.restore(form.tensors(), form.meta(), (rows, columns))
                assert torch.equal(again.dense(), dense)
                assert torch.equal(method.encode(weight, setting, evidence).dense(), dense)
                if evidence.columns is None:
                    lost = float((weight.double() - dense.double()).square().sum())
                    assert lost <= 1.02 * energy, (setting, lost, energy)

    return check
