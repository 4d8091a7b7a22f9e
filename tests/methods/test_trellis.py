"""Trellis-coded quantization: what a decoder reads is what the encoder chose, it is the best choice, and it pays."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo import coding
from octavo.artifact import pack, unpack
from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import Dense, Grid, LowRank, Sum, Trellis
from octavo.forms.trellis import LANES, PARITY_TAPS, QUANTIZER_TAPS, QUANTIZERS
from octavo.methods import get_method
from octavo.methods.quantize import viterbi
from octavo.methods.quantize.trellis import TrellisCoded, code_lengths

CLASSES, CODES = 5, 16


def one_by_one(codes):
    """Quantizers as their definition says, element after element."""
    rows, columns = codes.shape
    found = np.zeros((rows, columns), np.uint8)
    for i, j in product(range(rows), range(columns)):
        for taps, source in ((QUANTIZER_TAPS, found), (PARITY_TAPS, codes & 1)):
            for tap in taps:
                if i >= tap * LANES:
                    found[i, j] ^= source[i - tap * LANES, j]
    return found


def lanes(seed, steps, spread):
    """Targets, their classes, penalties and the states of fresh lanes."""
    generator = np.random.default_rng(seed)
    targets = (generator.standard_normal(steps * LANES) * spread).astype(np.float32)
    classes = generator.integers(0, CLASSES, len(targets)).astype(np.int32)
    return targets, classes, generator.random((2, CLASSES, CODES), np.float32), np.zeros(LANES, np.int64)


def cost(levels, targets, classes, penalties):
    """What a path costs, by lane."""
    levels = levels.astype(int)
    code = np.clip(levels >> 1, -CODES // 2, CODES // 2 - 1) + CODES // 2
    each = (targets.astype(float) - levels) ** 2 + penalties[levels & 1, classes, code]
    return each.reshape(-1, LANES).sum(0)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 150), columns=st.integers(1, 20), seed=st.integers(0, 2**20))
def test_quantizers_follow_the_recurrence(rows, columns, seed):
    codes = np.random.default_rng(seed).integers(-128, 128, (rows, columns)).astype(np.int8)
    assert np.array_equal(QUANTIZERS.bits(codes), one_by_one(codes))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_codes_at_the_ends_of_their_type(dtype):
    ends = torch.tensor([torch.iinfo(dtype).min, torch.iinfo(dtype).max, -1, 0]).to(dtype).repeat(11)[:, None]
    dense = Trellis(Grid(ends, torch.ones(1, 1))).dense()
    assert dense.shape == (44, 1) and bool(torch.isfinite(dense).all())
    if dtype != torch.int64:
        exact = 2 * ends.long() + torch.from_numpy(one_by_one(ends.numpy()))
        assert torch.equal(dense, exact.float())


@settings(max_examples=30, deadline=None)
@given(steps=st.integers(1, 40), seed=st.integers(0, 2**20), spread=st.sampled_from([0.2, 3.0, 1000.0]))
def test_both_searches_find_paths_that_a_decoder_follows(steps, seed, spread):
    targets, classes, penalties, state = lanes(seed, steps, spread)
    again = state.copy()
    first = np.floor(targets).astype(np.int32) - np.int32(1)
    found = viterbi.best_path(targets, classes, penalties, state)
    plain = viterbi._plain(targets, first, classes, penalties, again)
    assert np.array_equal(found, plain) and np.array_equal(state, again)
    codes = found.astype(np.int64)[:, None] >> 1
    assert np.array_equal(2 * codes + one_by_one(codes), found[:, None])


def test_no_path_of_nearest_levels_costs_less():
    """All of 4^5 ways through five steps, of which a decoder can follow 2^5."""
    steps = 5
    for seed in range(3):
        targets, classes, penalties, state = lanes(seed, steps, 2.0)
        found = cost(viterbi.best_path(targets, classes, penalties, state), targets, classes, penalties)
        choices = np.array(list(product(range(-1, 3), repeat=steps)))
        for lane in range(LANES):
            part = slice(lane, None, LANES)
            paths = np.floor(targets[part]).astype(int) + choices
            codes = np.repeat(paths.T >> 1, LANES, axis=0)
            possible = paths == (2 * codes + one_by_one(codes))[::LANES].T
            least = min(
                ((targets[part] - path) ** 2 + penalties[path & 1, classes[part], np.clip(path >> 1, -8, 7) + 8]).sum()
                for path in paths[possible.all(1)]
            )
            assert possible.all(1).sum() == 2**steps and found[lane] == pytest.approx(least, rel=1e-5)


def test_chunks_go_on_where_the_last_one_ended():
    targets, classes, penalties, state = lanes(3, 30, 2.0)
    half = 15 * LANES
    parts = [
        viterbi.best_path(targets[part], classes[part], penalties, state) for part in (slice(half), slice(half, None))
    ]
    codes = np.concatenate(parts).astype(np.int64)[:, None] >> 1
    assert np.array_equal(2 * codes + one_by_one(codes), np.concatenate(parts)[:, None])


def test_code_lengths_are_those_of_a_distribution():
    means = torch.tensor([0.05, 0.5, 2.0, 6.0], dtype=torch.float64)
    bits = code_lengths(means)
    assert torch.allclose((2.0**-bits).sum(2), torch.ones(2, 4, dtype=torch.float64), atol=3e-3)
    # By hand: the even quantizer's zero is what lies in -1..1, and the odd one's what lies in 0..2.
    mean = 2.0
    assert float(2.0 ** -bits[0, 2, 32]) == pytest.approx(1 - np.exp(-1 / mean))
    assert float(2.0 ** -bits[1, 2, 32]) == pytest.approx(0.5 * (1 - np.exp(-2 / mean)))


def bits_and_error(method, weight, step):
    form = method.encode(weight, {"step": step}, Evidence(torch.ones(len(weight)), None))
    error = float((weight - form.dense()).square().mean())
    return 8 * pack(form).bytes / weight.numel(), error


@pytest.mark.parametrize("step", [0.12, 0.4])
def test_nearly_a_decibel_is_gained_of_the_one_and_a_half_there_are(step):
    """At a high rate the error of Gaussian weights falls by 6.02 dB a bit; the bound lies 1.53 dB below rounding."""
    weight = torch.randn(1024, 96, generator=torch.Generator().manual_seed(0))
    bits, error = bits_and_error(get_method("entropy"), weight, step)
    fewer, less = bits_and_error(TrellisCoded(), weight, step)
    gain = 10 * np.log10(error / less) + 6.02 * (bits - fewer)
    assert 0.85 < gain < 1.53


@pytest.mark.parametrize(("step", "over"), [(1.0, 0.09), (1.3, 0.09), (1.8, 0.11)])
def test_it_stays_near_the_bound_at_few_bits(step, over):
    """The bound of Gaussian weights is half of the binary logarithm of their variance over the error."""
    weight = torch.randn(1024, 192, generator=torch.Generator().manual_seed(0))
    bits, error = bits_and_error(TrellisCoded(), weight, step)
    assert 0 < bits + 0.5 * np.log2(error) < over


def test_what_the_quantizers_are_saves_bytes_inside_of_other_forms_too():
    weight = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    inner = TrellisCoded().encode(weight, {"step": 1.6}, Evidence(torch.ones(512), None))
    alone = sum(len(coding.encode(part)) for part in inner.tensors().values() if not part.is_floating_point())
    for form in (inner, LowRank(inner, Dense(torch.zeros(64, 8))), Sum(inner, Dense(torch.zeros(512, 64)))):
        packed = pack(form)
        codes = next(part for name, part in packed.parts.items() if name.endswith("codes"))
        assert codes[1] < 0.97 * alone
        assert torch.equal(unpack(memoryview(packed.blob), packed.parts, packed.meta, form.shape).dense(), form.dense())


def test_feedback_is_heeded(matrix, evidence):
    """At about the same bits."""
    losses = []
    for known in (evidence, Evidence(evidence.rows, None)):
        setting = get_method("trellis").settings(matrix, known)[6]
        losses.append(evidence.loss(matrix - get_method("trellis").encode(matrix, setting, known).dense()))
    assert losses[0] < 0.8 * losses[1]


@pytest.mark.parametrize("setting", [{}, {"step": 0}, {"step": "fine"}, {"step": float("nan")}])
def test_unusable_settings_are_named(setting, matrix, evidence):
    with pytest.raises(RequestError, match=r"trellis.*step"):
        get_method("trellis").encode(matrix, setting, evidence)


def test_a_step_too_fine_is_refused(matrix, evidence):
    with pytest.raises(RequestError, match="too fine"):
        get_method("trellis").encode(matrix, {"step": 1e-12}, evidence)
