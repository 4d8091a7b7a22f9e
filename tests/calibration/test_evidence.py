"""Evidence of tensors with several roles."""

import pytest
import torch

from octavo.calibration import evidence_folder
from octavo.calibration.evidence import Evidence, combined
from octavo.calibration.evidence_folder import EvidenceFolder
from octavo.errors import RequestError

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


def of(samples: int) -> Evidence:
    return Evidence(torch.full((4,), float(samples)), samples * torch.eye(4), samples)


def test_the_header_of_a_file_is_parsed_once_however_many_sites_are_read(tmp_path, monkeypatch) -> None:
    EvidenceFolder(tmp_path / "all").write("whole", {f"site{n}": of(n) for n in range(1, 9)})
    opened = []
    plain = evidence_folder.safe_open
    monkeypatch.setattr(evidence_folder, "safe_open", lambda *args, **kw: opened.append(args) or plain(*args, **kw))
    folder = EvidenceFolder(tmp_path / "all")
    for n in range(1, 9):
        found = folder[f"site{n}"]
        assert found.samples == n and torch.equal(found.rows, of(n).rows) and torch.equal(found.columns, of(n).columns)
    assert len(opened) == 1


def test_damage_while_evidence_is_in_use_is_told(tmp_path) -> None:
    folder = EvidenceFolder(tmp_path / "all")
    folder.write("whole", {"a": of(1), "b": of(2)})
    assert torch.equal(folder["a"].rows, of(1).rows)
    file = tmp_path / "all" / "whole.safetensors"
    sound = file.read_bytes()
    for damaged in (sound[:-3], sound[:-1] + bytes([sound[-1] ^ 1])):
        file.write_bytes(damaged)
        with pytest.raises(RequestError, match=r"whole.safetensors: damaged: .* start again"):
            _ = [folder[site] for site in folder]
