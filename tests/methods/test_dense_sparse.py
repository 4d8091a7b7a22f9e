"""Dictionaries and sparse codes: what they lose, what they store, and whose errors they weigh."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from octavo import coding, forms
from octavo.calibration.evidence import Evidence
from octavo.errors import ArtifactError, RequestError
from octavo.forms import Dense, DenseSparse
from octavo.methods import get_method
from octavo.methods.factorize.dictionaries import Shape, again, learn, pursue, split

NAME = "dense-sparse"


@pytest.fixture(scope="module")
def gaussian():
    return torch.randn(192, 192, generator=torch.Generator().manual_seed(0))


def error(weight, shape, rounds=8):
    found = learn(split(weight, shape.width), shape, rounds).form(weight.shape[1])
    return float((weight - found.dense()).norm() / weight.norm())


@pytest.mark.parametrize("shape", [(256, 384), (384, 200)])
def test_settings_fall_in_size(shape, evidence_of, size):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.05
    evidence, method = evidence_of(*shape), get_method(NAME)
    sizes = [size(form) for form in method.encode_all(weight, method.settings(weight, evidence), evidence)]
    assert all(after < 1.2 * before for before, after in pairwise(sizes))
    assert sizes[-1] < sizes[0] / 6


def test_a_gaussian_matrix_loses_what_it_should(gaussian):
    """A complete dictionary ties with k-of-b pruning, a singular value decomposition of its size is far behind."""
    complete, overcomplete = (error(gaussian, Shape(16, atoms, 4)) for atoms in (16, 32))
    assert complete == pytest.approx(0.47, abs=0.015)
    assert overcomplete == pytest.approx(0.34, abs=0.015) and overcomplete < 0.8 * complete
    rank = round(0.365 * 192 / 2)
    values = torch.linalg.svdvals(gaussian)
    assert float((values[rank:].square().sum() / values.square().sum()).sqrt()) > 1.4 * complete


def test_rounds_pay(gaussian):
    errors = [error(gaussian, Shape(16, 32, 4), rounds) for rounds in (0, 2, 8)]
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.8 * errors[0]


def test_pursuit_never_loses_more_than_taking_the_largest_at_once(gaussian):
    targets = split(gaussian, 16)
    for atoms in (16, 24, 48):
        dictionary = learn(targets, Shape(16, atoms, 4), 1).dictionary
        index, values = pursue(targets, dictionary, 4)
        largest = (targets @ dictionary.mT).abs().topk(4, dim=2).indices
        chosen = dictionary[torch.arange(len(targets))[:, None, None], largest]
        fitted = torch.linalg.lstsq(chosen.mT, targets[..., None]).solution.squeeze(3)
        lost = []
        for which, coefficients in ((index, values), (largest, fitted)):
            sparse = torch.zeros(*targets.shape[:2], atoms).scatter_add_(2, which, coefficients)
            lost.append(float((targets - sparse @ dictionary).square().sum()))
        assert lost[0] <= lost[1] * 1.0001


def test_codes_are_least_squares(gaussian):
    """What is left of a row is orthogonal to every atom that it took."""
    targets = split(gaussian, 16)
    dictionary = learn(targets, Shape(16, 32, 5), 2).dictionary * torch.linspace(0.1, 9, 32)[:, None]
    index, values = pursue(targets, dictionary, 5)
    sparse = torch.zeros(*targets.shape[:2], 32).scatter_add_(2, index, values)
    left = (targets - sparse @ dictionary) @ (dictionary / dictionary.norm(dim=2, keepdim=True)).mT
    assert float(left.gather(2, index).abs().max()) < 1e-3
    assert bool((sparse.count_nonzero(dim=2) == 5).all())


def test_all_atoms_restore_the_matrix(gaussian):
    index, values = pursue(split(gaussian, 8), learn(split(gaussian, 8), Shape(8, 8, 8), 0).dictionary, 8)
    assert index.shape == values.shape == (24, 192, 8)
    assert error(gaussian, Shape(8, 8, 8), 0) < 1e-5


def test_equal_atoms_are_not_taken_twice():
    atom = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 1.0]])
    index, values = pursue(torch.tensor([[[2.0, 4.0], [0.0, 0.0], [1.0, 0.0]]]), atom[None], 3)
    assert bool(torch.isfinite(values).all()) and bool((index.sort(2).values == torch.arange(3)).all())
    rows = torch.zeros(1, 3, 3).scatter_add_(2, index, values) @ atom
    assert torch.allclose(rows, torch.tensor([[[2.0, 4.0], [0.0, 0.0], [1.0, 0.0]]]), atol=1e-5)


def test_a_round_takes_up_where_the_last_one_ended(gaussian):
    """Small moves of the weights change few codes, and a warm round is worth more than a fresh start."""
    targets = split(gaussian, 16)
    found = learn(targets, Shape(16, 32, 4), 12)
    moved = targets + 0.01 * torch.randn(targets.shape, generator=torch.Generator().manual_seed(1))
    warm, cold = again(moved, found), learn(moved, Shape(16, 32, 4), 1)
    lost = [float((moved - part.sparse() @ part.dictionary).square().sum()) for part in (warm, cold)]
    assert lost[0] < 0.85 * lost[1]
    assert float((warm.index == found.index).float().mean()) > 0.7


@pytest.mark.parametrize("nonzeros", [2, 4])
def test_inputs_lower_the_loss(nonzeros, matrix, evidence):
    setting = {"width": 16, "atoms": 24, "nonzeros": nonzeros, "bits": 6}
    blind = get_method(NAME).encode(matrix, setting, Evidence(evidence.rows, None)).dense()
    form = get_method(NAME).encode(matrix, setting, evidence)
    assert isinstance(form, DenseSparse) and form.index.shape == (96, 8 * nonzeros)
    assert evidence.loss(matrix - form.dense()) < 0.75 * evidence.loss(matrix - blind)


def test_evidence_of_few_inputs_is_enough(matrix):
    inputs = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    evidence = Evidence(torch.ones(96), inputs.t() @ inputs / 5)
    setting = {"width": 16, "atoms": 24, "nonzeros": 4, "bits": 6}
    form = get_method(NAME).encode(matrix, setting, evidence)
    blind = get_method(NAME).encode(matrix, setting, Evidence(evidence.rows, None))
    assert evidence.loss(matrix - form.dense()) < evidence.loss(matrix - blind.dense())
    assert float((matrix - form.dense()).norm() / matrix.norm()) < 2


def test_quantization_adds_little(gaussian, size):
    plain = Evidence(torch.ones(192), None)
    exact = error(gaussian, Shape(16, 32, 4))
    sizes = []
    for bits, more in ((8, 1.01), (6, 1.02), (4, 1.15)):
        form = get_method(NAME).encode(gaussian, {"width": 16, "atoms": 32, "nonzeros": 4, "bits": bits}, plain)
        assert float((gaussian - form.dense()).norm() / gaussian.norm()) < more * exact
        sizes.append(size(form))
    assert sizes == sorted(sizes, reverse=True)


def test_places_are_stored_as_gaps(gaussian):
    """What takes log2(m choose k) bits at best takes less than k log2(m), and is read back."""
    form = learn(split(gaussian, 16), Shape(16, 32, 4), 2).form(192)
    parts = form.tensors()
    assert "index" not in parts
    assert len(coding.encode(parts["gaps"])) < 0.84 * len(coding.encode(form.index))
    assert torch.equal(forms.restore(parts, form.meta(), (192, 192)).index, form.index)
    # Atoms in another order are the same matrix, and are stored one by one.
    order = torch.arange(48).view(12, 4).flip(1).flatten()
    other = replace(form, index=form.index[:, order], values=Dense(form.values.dense()[:, order]))
    again = forms.restore(other.tensors(), other.meta(), (192, 192))
    assert "index" in other.tensors() and torch.allclose(again.dense(), form.dense(), atol=1e-5)
    for bad in (parts["gaps"] + 20, parts["gaps"].to(torch.int8) - 1):
        with pytest.raises(ArtifactError, match="gap"):
            forms.restore({**parts, "gaps": bad}, form.meta(), (192, 192))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"atoms": 16, "nonzeros": 2, "bits": 4}, "no 'width'"),
        ({"width": 200, "atoms": 16, "nonzeros": 2, "bits": 4}, "width is 200 .* from 1 to 128"),
        ({"width": 16, "atoms": 0, "nonzeros": 2, "bits": 4}, "atoms is 0 .* from 1 to 96"),
        ({"width": 16, "atoms": 97, "nonzeros": 2, "bits": 4}, "atoms is 97 .* from 1 to 96"),
        ({"width": 16, "atoms": 16, "nonzeros": 17, "bits": 4}, "nonzeros is 17 .* from 1 to 16"),
        ({"width": 8, "atoms": 16, "nonzeros": 9, "bits": 4}, "nonzeros is 9 .* from 1 to 8"),
        ({"width": 16, "atoms": 16, "nonzeros": 0, "bits": 4}, "nonzeros is 0 .* from 1 to 16"),
        ({"width": 16, "atoms": 16, "nonzeros": 2, "bits": 0.5}, "bits is 0.5"),
    ],
)
def test_unusable_settings_are_named(setting, message, matrix, evidence):
    with pytest.raises(RequestError, match=f"{NAME}: .*{message}|{NAME}: {message}"):
        get_method(NAME).encode(matrix, setting, evidence)
