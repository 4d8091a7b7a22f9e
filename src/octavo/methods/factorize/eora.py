"""EoRA: a low-rank correction of a coarsely quantized or pruned matrix."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import Form, Sum
from octavo.methods.base import Method, Setting, method
from octavo.methods.factorize import factors
from octavo.methods.factorize.corrections import lost
from octavo.methods.knobs import real, whole
from octavo.methods.quantize.entropy import Entropy
from octavo.methods.quantize.trellis import TrellisCoded
from octavo.methods.spelling import get_method

#: Families with lossy forms, which a correction can improve.
_FAMILIES = ("quantize", "prune")
_PREFIX = "base."


@method("eora", family="factorize", preset="best", source="EoRA (Liu et al., 2024, arXiv 2410.21271)")
@dataclass(frozen=True)
class EoRA(Method):
    """``base + left @ right``: a compressed base plus a low-rank correction of its error.

    With ``W`` (rows, columns), ``base`` any compressed form of it, ``D = W - base`` and ``C = L L^T`` the second moment
    of the inputs, ``left @ right`` is the rank-``k`` matrix with the least ``sum_i r[i] (D - left right)[i] C (D - left
    right)[i]^T``: ``U S V^T`` the truncated SVD of ``diag(sqrt r) D L``, ``left = diag(1 / sqrt r) U S^(1/2)``, ``right
    = S^(1/2) V^T L^-1``. Any square root ``L`` of ``C`` gives the same product as the paper's ``Q sqrt(eigenvalues)``;
    ``r``, the weights of the outputs, are added here.

    A setting names the method of the base and its knobs: ``{"base": "sparsegpt", "base.pattern": "2:4", "base.bits": 4,
    "rank": 16, "bits": 4}``. Without a name it is ``entropy``, with the setting ``step``.

    Parameters
    ----------
    ranks
        Ranks tried by :meth:`settings`, each with every base.
    bits
        Bits per coefficient of the correction; 3 to 4 are enough according to the paper.
    levels
        Bits per weight of the bases to try, of the method ``trellis``.
    """

    takes = ("step", "rank", "bits")

    ranks: tuple[int, ...] = (32, 16, 8)
    bits: int = 4
    levels: tuple[float, ...] = (3.25, 2.5, 1.9, 1.4, 0.9)

    def refuse_unknown(self, setting: Setting) -> None:
        """Settings of the base are checked by its method."""
        own = {key: value for key, value in setting.items() if not key.startswith(_PREFIX) and key != "base"}
        if "base" not in setting:
            own = dict(setting)
        elif "step" in own:
            raise RequestError(
                f"{self.name}: 'step' is a setting of entropy, but another base is named; write {_PREFIX}step"
            )
        else:
            base, knobs = self._base(setting)
            base.refuse_unknown(knobs)
        super().refuse_unknown(own)

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Lossy bases, each with all ranks up to half of the smaller side."""
        rows, columns = weight.shape
        # Pruned bases and bases on group grids lost 2 to 6 dB against a trellis at every size on MiniLM's matrices. A
        # matrix of zeros has one setting, whatever the level.
        coded = TrellisCoded(levels=self.levels).settings(weight, evidence)
        bases = list(zip(self.levels, map(_named, coded), strict=False))
        ranks = dict.fromkeys(min(rank, max(1, min(rows, columns) // 2)) for rank in self.ranks)
        correction = self.bits * (rows + columns) / (rows * columns)
        sized = [
            (level + rank * correction, {**base, "rank": rank, "bits": self.bits})
            for level, base in bases
            for rank in ranks
        ]
        return [setting for _, setting in sorted(sized, key=lambda pair: -pair[0])]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        return next(self.encode_all(weight, [setting], evidence))

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """Settings with the same base share it and the decomposition of its error."""
        weight = weight.float()
        known: dict[tuple[str, int], tuple[Form, factors.Factors]] = {}
        for setting in settings:
            rank, bits = whole(self.name, setting, "rank", 1), real(self.name, setting, "bits", 1, 16)
            base_method, knobs = self._base(setting)
            most = max(rank, *self.ranks, 1)
            key = json.dumps([base_method.name, knobs], sort_keys=True), most
            if key not in known:
                base = base_method.encode(weight, knobs, evidence)
                known[key] = base, lost(weight, base, evidence, most)
            base, parts = known[key]
            yield Sum(base, factors.quantized(parts.first(rank), bits, evidence))

    def _base(self, setting: Setting) -> tuple[Method, Setting]:
        """The method of the base, and its setting."""
        if "base" not in setting:
            return Entropy(), {"step": real(self.name, setting, "step", 1e-38)}
        base = get_method(str(setting["base"]))
        if base.family not in _FAMILIES:
            raise RequestError(
                f"{self.name}: base is {base.name!r}, of the family {base.family!r}, in the setting {setting}; choose "
                f"a method that quantizes or prunes, such as 'gptq' with {_PREFIX}bits and {_PREFIX}group"
            )
        return base, {key.removeprefix(_PREFIX): value for key, value in setting.items() if key.startswith(_PREFIX)}


def _named(setting: Setting) -> Setting:
    """A setting of ``trellis`` as the setting of a base."""
    return {"base": TrellisCoded.name, **{f"{_PREFIX}{key}": value for key, value in setting.items()}}
