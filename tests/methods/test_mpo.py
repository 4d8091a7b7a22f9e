"""Matrix product operators: sizes, exact errors, modes, ties with SVD, weights over digits, and quantized cores."""

import math
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from octavo import forms
from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import Dense, TensorTrain
from octavo.methods import get_method
from octavo.methods.factorize import factors
from octavo.methods.factorize.mpo import bond, decompose, elements, modes
from octavo.recipes.frame import quantized
from octavo.sources.sites import Site


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 2, 7, 13, 31, 97, 216, 256, 384, 704, 30522])
@pytest.mark.parametrize("sites", [1, 2, 3, 4])
def test_modes_are_balanced_and_hold_the_size(size, sites):
    found = modes(size, sites)
    product = math.prod(found)
    assert len(found) == sites and list(found) == sorted(found) and size <= product < 2 * size + 2
    # No smaller sum would do: the sum is that of the most even split whose product suffices.
    total = sum(found) - 1
    most_even = [total // sites + (k < total % sites) for k in range(sites)]
    assert math.prod(most_even) < size


def test_known_modes():
    assert modes(216, 3) == (6, 6, 6) and modes(384, 2) == (16, 24) and modes(384, 3) == (6, 8, 8)
    # Sizes that do not factor are padded, not written with ugly primes.
    assert modes(5087, 2) == (67, 76) and modes(7, 2) == (2, 4)


@pytest.mark.parametrize("chi", [1, 5, 36])
def test_size_formula(chi):
    """216 x 216 in three sites of 6 x 6 takes ``2 * 36 chi + 36 chi^2``."""
    form = decompose(random(216, 216), (6, 6, 6), (6, 6, 6), chi).dense()
    stored = sum(tensor.numel() for tensor in form.tensors().values())
    assert stored == elements((6, 6, 6), (6, 6, 6), chi) == 2 * 36 * chi + 36 * chi**2
    assert bond((6, 6, 6), (6, 6, 6), stored) == chi and bond((6, 6, 6), (6, 6, 6), stored - 1) == max(chi - 1, 1)


@pytest.mark.parametrize("sites", [2, 3, 4])
@pytest.mark.parametrize("shape", [(48, 36), (64, 1), (31, 53), (5, 64)])
@pytest.mark.parametrize("chi", [1, 3, 9, None])
def test_the_error_is_the_sum_of_what_was_discarded(sites, shape, chi):
    weight = random(*shape)
    split = modes(shape[0], sites), modes(shape[1], sites)[::-1]
    chain = decompose(weight, *split, chi)
    # Where rows or columns are padded, what is cut away again takes a part of the error with it.
    padded = replace(chain, shape=(math.prod(split[0]), math.prod(split[1]))).dense().dense()
    whole = torch.zeros(padded.shape)
    whole[: shape[0], : shape[1]] = weight
    error = float((weight - chain.dense().dense()).square().sum())
    assert float((whole - padded).square().sum()) == pytest.approx(chain.lost, rel=1e-4, abs=1e-6 * weight.numel())
    assert error <= chain.lost * 1.0001 + 1e-6 * weight.numel()
    if chi is None:
        assert error < 1e-6 * weight.numel()


def test_cores_are_orthonormal_and_the_last_carries_the_values():
    chain = decompose(random(64, 64), (4, 4, 4), (4, 4, 4), 12)
    for core in chain.cores[:-1]:
        flat = core.flatten(0, 1)
        assert torch.allclose(flat.t() @ flat, torch.eye(flat.shape[1], dtype=flat.dtype), atol=1e-5)
    last = chain.cores[-1][:, :, 0] * chain.unit
    assert torch.allclose(last @ last.t(), torch.diag((chain.values[-1] * chain.unit).square()), atol=1e-2)


def test_gaussian_weights_tie_with_svd():
    """At equal size two sites keep as much of weights without structure as an SVD does: there is nothing to win."""
    weight = random(256, 256)
    rank = 64
    chi = bond((16, 16), (16, 16), rank * 512)
    chain = decompose(weight, (16, 16), (16, 16), chi)
    left = float(factors.whitened(weight).values[rank:].square().sum())
    assert elements((16, 16), (16, 16), chi) == rank * 512
    assert math.sqrt(chain.lost) == pytest.approx(math.sqrt(left), rel=0.02)


def test_kronecker_products_are_found_exactly():
    """What an SVD needs its full rank for is of bond dimension 1 if it is a Kronecker product, and 2 if it is a sum."""
    first, second = (torch.kron(random(8, 6, seed=seed), random(7, 9, seed=seed + 9)) for seed in (0, 1))
    assert decompose(first, (8, 7), (6, 9), 1).lost < 1e-6 * float(first.square().sum())
    both = first + second
    assert decompose(both, (8, 7), (6, 9), 2).lost < 1e-6 * float(both.square().sum())
    assert decompose(both, (8, 7), (6, 9), 1).lost > 0.1 * float(both.square().sum())


def test_weights_over_digits_fold_into_the_cores():
    """Weights that are a product over digits are met exactly: no other chain of that size has less weighted error."""
    digits = torch.tensor([1.0, 9.0, 0.2, 3.0]), torch.tensor([0.5, 1.0, 4.0, 2.0])
    rows = torch.outer(*digits).flatten()
    weight = random(16, 36)
    seeing = decompose(weight, (4, 4), (6, 6), 6, evidence=Evidence(rows, None))
    blind = decompose(weight, (4, 4), (6, 6), 6)

    def loss(chain):
        return float(rows @ (weight - chain.dense().dense()).square().sum(1))

    assert loss(seeing) == pytest.approx(seeing.lost, rel=1e-4) and loss(seeing) < 0.8 * loss(blind)


def test_token_counts_lower_the_loss():
    counts = 1 / (torch.arange(2000.0) + 5)
    weight, evidence = random(2000, 32) @ torch.diag(torch.logspace(0, -1, 32)), Evidence(counts, None)
    seeing = get_method("mpo").encode(weight, {"sites": 2, "chi": 40, "bits": 5}, evidence)
    blind = get_method("mpo").encode(weight, {"sites": 2, "chi": 40, "bits": 5}, Evidence(torch.ones(2000), None))
    assert evidence.loss(weight - seeing.dense()) < 0.8 * evidence.loss(weight - blind.dense())


@pytest.mark.parametrize("sites", [2, 3])
def test_quantized_cores_lose_little_more(sites, matrix, size):
    chi = bond(modes(96, sites), modes(128, sites)[::-1], 0.5 * matrix.numel())
    chain = decompose(matrix, modes(96, sites), modes(128, sites)[::-1], chi)
    count = sum(core.numel() for core in chain.cores)
    losses = []
    for bits in (6, 4, 3):
        form = chain.quantized(bits)
        assert size(form) * 8 / count == pytest.approx(bits, abs=0.9)
        losses.append(float((matrix - form.dense()).square().sum()))
    assert losses[0] < 1.03 * chain.lost
    assert all(after > before for before, after in pairwise(losses))


def test_later_cores_make_up_for_earlier_ones(matrix):
    chain = decompose(matrix, modes(96, 2), modes(128, 2)[::-1], 40)
    form = chain.quantized(3)
    exact = Dense((chain.cores[1] * chain.unit).flatten(0, 1).float())
    unfitted = TensorTrain((form.cores[0], exact), form.row_modes, form.column_modes, 96, 128)
    coarse = replace(unfitted, cores=(form.cores[0], quantized(exact, 3)))
    assert (matrix - form.dense()).norm() < (matrix - coarse.dense()).norm()


def test_settings_fall_in_size(size):
    weight, evidence = random(256, 384) * 0.05, Evidence(torch.ones(256), None)
    method = get_method("mpo")
    settings = method.settings(weight, evidence)
    assert {setting["sites"] for setting in settings} == {2, 3}
    sizes = [size(form) for form in method.encode_all(weight, iter(settings), evidence)]
    assert all(after < 1.05 * before for before, after in pairwise(sizes)) and sizes[-1] < sizes[0] / 10


def test_embeddings_and_heads_but_no_convolutions():
    kinds = {"linear": True, "embedding": True, "head": True, "convolution": False}
    for kind, accepted in kinds.items():
        assert get_method("mpo").accepts(Site("w", kind, (64, 64), torch.float32)) is accepted


def test_a_large_table_is_quick_and_near_the_best():
    """A third of the embedding of a BERT: seconds, and within two percent of the exact cut."""
    weight = random(10_000, 384)
    started = time.process_time()
    setting = {"sites": 2, "chi": 200, "bits": 3}
    form = get_method("mpo").encode(weight, setting, Evidence(torch.ones(10_000), None))
    assert time.process_time() - started < 5
    again = forms.restore(form.tensors(), form.meta(), form.shape)
    assert torch.equal(again.lookup(torch.tensor([0, 9999])), form.dense()[[0, 9999]])
    small = random(1100, 1200) @ torch.diag(torch.logspace(0, -1, 1200))
    subspace = decompose(small, (1100, 1), (1, 1200), 100)
    exact = float(factors.whitened(small).values[100:].square().sum())
    assert exact <= subspace.lost * 1.0001 < 1.02 * exact


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ({"sites": 1, "chi": 4, "bits": 4}, "sites"),
        ({"sites": 99, "chi": 4, "bits": 4}, "sites"),
        ({"sites": 2, "chi": 0, "bits": 4}, "chi"),
        ({"sites": 2, "chi": 2.5, "bits": 4}, "chi"),
        ({"sites": 2, "chi": 4, "bits": 40}, "bits"),
        ({"sites": 2, "chi": 4}, "bits"),
    ],
)
def test_unusable_settings_are_named(setting, word, matrix, evidence):
    with pytest.raises(RequestError, match=f"mpo: .*{word}"):
        get_method("mpo").encode(matrix, setting, evidence)


def test_modes_that_do_not_hold_the_matrix_are_refused():
    with pytest.raises(RequestError, match=r"\(4, 4\) x \(4, 4\) do not fit a matrix of 17 x 16"):
        decompose(random(17, 16), (4, 4), (4, 4))
    with pytest.raises(RequestError, match="as many modes for rows as for columns"):
        decompose(random(16, 16), (4, 4), (2, 2, 4))
    with pytest.raises(RequestError, match="give a positive size"):
        modes(0, 2)


def test_a_bond_above_the_full_rank_is_the_full_rank():
    weight = random(24, 24)
    form = get_method("mpo").encode(weight, {"sites": 2, "chi": 500, "bits": 14}, Evidence(torch.ones(24), None))
    assert form.ranks == (1, min(modes(24, 2)[0] * modes(24, 2)[1], 24), 1)
    assert float((weight - form.dense()).norm() / weight.norm()) < 1e-2
