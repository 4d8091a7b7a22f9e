"""Evidence of tensors with several roles."""

import pytest
import torch

from octavo.calibration.evidence import Evidence, combined

GENERATOR = torch.Generator().manual_seed(0)


def role(rows: float, columns: float) -> Evidence:
    inputs = torch.randn(40, 6, generator=GENERATOR)
    return Evidence(rows * torch.rand(4, generator=GENERATOR), columns * (inputs.t() @ inputs), 40)


def test_the_product_has_the_marginals_of_the_sum() -> None:
    roles = [role(1, 1), role(3, 0.2)]
    found = combined(roles)
    whole = sum(one.rows[:, None, None] * one.columns for one in roles)
    torch.testing.assert_close(found.rows * found.columns.trace(), whole.diagonal(dim1=1, dim2=2).sum(1))
    torch.testing.assert_close(found.rows.sum() * found.columns, whole.sum(0))


@pytest.mark.parametrize("sizes", [((0, 1), (0, 2)), ((1, 0), (1, 0)), ((0, 1), (1, 0)), ((0, 0), (0, 0))])
def test_roles_that_cost_nothing_together_are_no_error(sizes: tuple[tuple[float, float], ...]) -> None:
    roles = [role(*each) for each in sizes]
    found = combined(roles)
    assert found.loss(torch.randn(4, 6, generator=GENERATOR)) == 0
    torch.testing.assert_close(found.columns, sum(one.columns for one in roles) / len(roles))
    assert torch.isfinite(found.rows).all()
