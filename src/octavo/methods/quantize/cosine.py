"""Entropy-constrained quantization of cosine coefficients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.forms import Form, Frequency
from octavo.methods.base import Setting, method
from octavo.methods.quantize.entropy import Entropy
from octavo.methods.quantize.spectral import Spectral


@method("dct", family="quantize", preset="best", source="Wang et al. (2016), CNNpack, NeurIPS 29, without its clusters")
@dataclass(frozen=True)
class CosineSteps(Spectral):
    """``entropy`` on the two-dimensional cosine transform of kernels, or of tiles of 8 x 8 weights.

    The transform is orthonormal, so the second moment of the inputs moves into its domain exactly. A smooth kernel has
    few large coefficients, and others that round to zero. Without smoothness nothing is gained.
    """

    takes = ("step",)
    elastic = "step"
    tile = (8, 8)

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """The steps of ``entropy`` for the coefficients."""
        coefficients, moved, _ = self.moved(weight, evidence)
        return Entropy().settings(coefficients, moved)

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        return next(self.encode_all(weight, [setting], evidence))

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """All settings share the transform."""
        coefficients, moved, block = self.moved(weight, evidence)
        for form in Entropy().encode_all(coefficients, settings, moved):
            yield Frequency(form, block)
