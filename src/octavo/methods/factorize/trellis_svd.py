"""Transform coding of tables: rows turned into their principal components, which are trellis-coded."""

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

    Of a matrix (rows, columns) with many more rows than columns ``right`` (columns, columns) costs next to nothing, and
    ``left`` has the coefficients of every row along principal components: one step in units of the loss gives strong
    components more bits than weak ones, the gain of a transform, and a trellis takes 1 dB of the error besides.

    Parameters
    ----------
    levels
        Bits a coefficient that are tried. Where most components take less than a bit, ``activation-svd`` is as good.
    """

    levels: tuple[float, ...] = (6, 4.5, 3.5, 2.75, 2, 1.4)

    # No integer kernel runs a trellis.
    speed_settings = Method.speed_settings

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Bits at full rank, for tables; nothing for other matrices."""
        rows, columns = weight.shape
        return [{"rank": columns, "bits": bits} for bits in self.levels] if is_table(rows, columns) else []

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """All settings share the decomposition."""
        parts = factors.factors(weight, evidence)
        for setting in settings:
            rank, bits = factors.read(self.name, setting)
            yield factors.quantized(parts.first(rank), bits, evidence, TrellisCoded())
