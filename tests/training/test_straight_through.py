"""Latents of codes: what is computed is what is stored, and gradients pass through rounding."""

import pytest
import torch

from octavo.artifact import pack
from octavo.calibration.evidence import Evidence
from octavo.forms import Dense, Grid, LowRank, Scaled
from octavo.methods import get_method
from octavo.training import StraightThrough


def grid(rows=40, columns=30):
    torch.manual_seed(0)
    codes = torch.randn(rows, columns).mul(1.3).round().to(torch.int8)
    exponents = [torch.randint(-8, 8, (count,), dtype=torch.int16) for count in (rows, columns)]
    return Grid(codes, torch.full((1, 1), 0.8), None, *exponents)


FORMS = {
    "grid": lambda: grid(),
    "gains": lambda: Scaled(grid(), torch.randint(-5, 5, (40,), dtype=torch.int16)),
    "factors of codes": lambda: LowRank(grid(40, 8), grid(8, 30)),
    "factors": lambda: LowRank(Dense(torch.randn(40, 8)), Dense(torch.randn(8, 30))),
}


@pytest.mark.parametrize("name", FORMS)
def test_what_is_computed_is_what_is_stored(name):
    student = StraightThrough(FORMS[name]())
    with torch.no_grad():
        for latent in student.parameters():
            latent += torch.randn_like(latent) / 2
    assert torch.equal(student.dense().detach(), student.stored().dense())


@pytest.mark.parametrize("name", FORMS)
def test_at_first_it_is_the_form_itself(name):
    form = FORMS[name]()
    student = StraightThrough(form, form.dense() + torch.randn(40, 30) / 10)
    assert torch.equal(student.dense().detach(), form.dense())


def test_gradients_move_codes_towards_a_target():
    form, target = grid(), torch.randn(40, 30)
    student = StraightThrough(form)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        (student.dense() - target).square().mean().backward()
        optimizer.step()
    assert (student.stored().dense() - target).square().mean() < (form.dense() - target).square().mean() / 2


def test_a_price_makes_codes_shorter_but_in_rows_without_a_gradient():
    student = StraightThrough(grid())
    before, first = student.priced(), student.stored()
    student.dense()[:20].sum().backward()
    for _ in range(20):
        student.shrink(0.05)
    assert student.priced() < before
    assert len(pack(student.stored()).blob) < len(pack(first).blob)
    assert torch.equal(student.stored().codes[20:], first.codes[20:])


def test_a_dead_zone_saves_bytes_by_degrees():
    student = StraightThrough(grid(256, 256), torch.randn(256, 256))
    sizes = [len(pack(student.stored(width)).blob) for width in (0.0, 0.02, 0.05, 0.1)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0]


def test_settled_latents_keep_their_codes():
    student = StraightThrough(grid(), torch.randn(40, 30))
    before = student.stored()
    student.settle(1.0)
    assert torch.equal(student.stored(0.1).codes, before.codes)


def test_forms_that_read_the_parts_of_others_are_left_as_they_are():
    weight = torch.randn(64, 64)
    method = get_method("trellis")
    evidence = Evidence(torch.ones(64), None)
    form = method.encode(weight, method.settings(weight, evidence)[0], evidence)
    student = StraightThrough(form)
    assert student.moved == 0 and torch.equal(student.dense(), form.dense())
