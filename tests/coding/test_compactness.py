"""Coded sizes stay close to what the distribution of the data allows."""

import numpy as np
import pytest
import torch

from octavo.coding import describe, encode


def matrix(shape: tuple[int, int], step: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return rounded Gaussian codes and the standard deviation of each, in steps."""
    generator = np.random.default_rng(seed)
    rows = np.exp(0.3 * generator.standard_normal((shape[0], 1)))
    columns = np.exp(0.4 * generator.standard_normal((1, shape[1])))
    scales = rows * columns / step
    return np.clip(np.rint(generator.standard_normal(shape) * scales), -127, 127).astype(np.int8), scales


def ideal_bits(codes: np.ndarray, scales: np.ndarray) -> float:
    """Bits of an ideal code that knows the distribution of every single element."""
    distance = torch.from_numpy(np.abs(codes) / scales)
    half = torch.from_numpy(0.5 / scales)
    # Both in the lower tail, where differences are exact.
    shares = torch.special.ndtr(half - distance) - torch.special.ndtr(-half - distance)
    return float(-torch.log2(shares.clamp_min(1e-300)).sum())


@pytest.mark.parametrize(
    ("shape", "step", "excess"),
    [
        ((1536, 384), 0.5, 0.015),
        ((1536, 384), 0.15, 0.012),
        ((384, 1536), 0.5, 0.015),
        ((384, 1536), 0.07, 0.012),
        ((384, 384), 0.5, 0.022),
        ((384, 384), 0.15, 0.02),
        ((120, 384), 1.0, 0.06),
        ((1536, 384), 4.0, 0.05),
    ],
)
def test_scaled_matrices(shape: tuple[int, int], step: float, excess: float) -> None:
    codes, scales = matrix(shape, step)
    ideal = ideal_bits(codes, scales) / 8
    blob = encode(torch.from_numpy(codes))
    assert describe(blob).codec == "ans"
    assert ideal * 0.99 < len(blob) < ideal * (1 + excess)
    counts = np.unique(codes, return_counts=True)[1]
    assert len(blob) < 0.995 * (counts * np.log2(codes.size / counts)).sum() / 8


@pytest.mark.parametrize("spread", [0.4, 3.0, 40.0])
def test_independent_values_are_coded_near_their_entropy(spread: float) -> None:
    codes = (spread * torch.randn(200_000, generator=torch.Generator().manual_seed(0))).round().int()
    counts = codes.unique(return_counts=True)[1]
    entropy = float((counts * (codes.numel() / counts).log2()).sum()) / 8
    assert entropy < len(encode(codes, independent=True)) < 1.01 * entropy + 300


def test_an_outlier_costs_little() -> None:
    codes = torch.from_numpy(matrix((384, 384), 0.5)[0]).int()
    plain = len(encode(codes))
    codes[17, 300] = 1_000_000_000
    assert len(encode(codes)) < plain + 150


def test_trivial_tensors_are_tiny() -> None:
    assert len(encode(torch.full((1000, 1000), -7))) < 50
    assert len(encode(torch.tensor(5))) < 30
    assert len(encode(torch.zeros(0, 4, dtype=torch.int8))) < 20
    one_row = torch.zeros(300, 300, dtype=torch.int8)
    one_row[5] = torch.arange(300) % 7 - 3
    assert len(encode(one_row)) < 500
