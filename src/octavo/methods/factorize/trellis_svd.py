"""Transform coding of tables: the principal components of rows are trellis-coded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.forms import Form
from octavo.methods.base import Method, Setting, method
from octavo.methods.factorize import factors
from octavo.methods.factorize.activation_svd import ActivationSVD
from octavo.methods.quantize.trellis import TrellisCoded
from octavo.methods.tables import is_table


@method(
    "trellis-svd",
    family="factorize",
    source="Karhunen-Loeve transform of rows whitened on both sides, with trellis-coded quantization",
)
@dataclass(frozen=True)
class TrellisSVD(ActivationSVD):
    """``left @ right`` of full rank, as in ``activation-svd``, with ``left`` by the method ``trellis``.

    For a matrix (rows, columns) with many more rows than columns, ``right`` (columns, columns) costs almost nothing,
    and ``left`` holds the coefficients of every row along principal components. One step in units of the loss gives
    strong components more bits than weak ones (the transform gain). The trellis reduces the error by another 1 dB.

    Parameters
    ----------
    levels
        Bits per coefficient to try. If most components take less than a bit, ``activation-svd`` is as good.
    """

    levels: tuple[float, ...] = (6, 4.5, 3.5, 2.75, 2, 1.4)

    # No integer kernel runs a trellis.
    speed_settings = Method.speed_settings

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Bits at full rank for tables; empty for other matrices."""
        rows, columns = weight.shape
        return [{"rank": columns, "bits": bits} for bits in self.levels] if is_table(rows, columns) else []

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """All settings share the decomposition."""
        parts = factors.factors(weight, evidence)
        for setting in settings:
            rank, bits = factors.read(self.name, setting)
            yield factors.quantized(parts.first(rank), bits, evidence, TrellisCoded())
