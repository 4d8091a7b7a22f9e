"""Every kind of layer in a tiny module: compressed, read back, and measured; and the page that lists all kinds."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import octavo
from octavo.errors import RequestError

sys.path.insert(0, str(Path(__file__).parent))
import kinds
import zoo


def compressed(module, batch, **choices):
    how = {"ratio": 4, "preset": "fast", "objective": "squared", "methods": ["entropy", "keep"], "progress": False}
    return octavo.compress(module, data=[batch], **{**how, **choices})


@pytest.mark.parametrize("kind", kinds.KINDS, ids=lambda kind: kind.name)
def test_what_is_stated_is_what_the_loaded_module_gives(kind, tmp_path):
    module = kind.module()
    done = compressed(module, kind.batch())
    report = done.save(tmp_path / "out", report=False)
    loaded = octavo.load(tmp_path / "out", into=kind.module(seed=9)).eval()
    (held,) = done.opened.held_data
    with torch.no_grad():
        old, new = module(held), loaded(held)
    error = float((old - new).double().square().mean() / old.double().square().mean())
    assert 0 < error < 0.1 and error == pytest.approx(report["quality"]["value"], rel=1e-2)
    assert done.ratio >= 4
    notes = [*done.opened.notes, *report["calibration"]["warnings"]]
    assert not [note for note in notes if "not in its state dict" in note or "typical" in note]
    assert not any(site.columns < 8 for site in done.opened.sites)


def test_a_plan_without_finite_outputs_is_never_chosen(tmp_path):
    """Nothing depends on some rows but their being zero, which is where the best plan by expected loss puts them."""
    torch.manual_seed(0)
    done = compressed(kinds.Guarded(), kinds.VECTOR(), methods=["entropy", "rtn"])
    assert 0 < done.built.quality < 1
    done.save(tmp_path / "out", report=False)
    assert bool((octavo.load(tmp_path / "out")["weight"].norm(dim=1) > 0).all())


def test_where_no_plan_has_finite_outputs_that_is_said():
    class Exact(nn.Linear):
        """Gives numbers for the weights that it was made with, and for no others."""

        def forward(self, x):
            known = self.__dict__.setdefault("known", self.weight.detach().clone())
            return super().forward(x) / bool(torch.equal(self.weight, known))

    torch.manual_seed(0)
    module = Exact(64, 64)
    module(kinds.VECTOR())
    with pytest.raises(RequestError, match="gives outputs that are not finite; ask for a smaller ratio"):
        compressed(module, kinds.VECTOR())


def test_the_page_is_that_of_the_tables():
    assert set(kinds.GROUPS) == {row.group for row in zoo.ZOO}
    page = kinds.PAGE.read_text(encoding="utf-8")
    assert page == kinds.written(page), "run python tests/architectures/kinds.py"
