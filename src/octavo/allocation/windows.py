"""The points of a curve that are computed: a range of sizes, and what is within reach of a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from octavo.methods import Method, Setting

#: Octaves beyond the settings that pilots need that are within reach, and around those that are tried without gaps.
_BEYOND, _NEAR = 0.5, 1.0


@dataclass(frozen=True)
class Reach:
    """The settings of a method that are within reach of a budget, in octaves of its continuous knob.

    Parameters
    ----------
    low, high
        The range of settings that sites of the same kind need for budgets from half to twice the one asked for.
    near
        The range that they need for about the budget itself, where settings are tried without gaps.
    """

    low: float
    high: float
    near: tuple[float, float] | None = None

    def including(self, octaves: float, *, near: bool) -> Reach:
        """A window that holds one more setting."""
        low, high = self.near or (octaves, octaves)
        inner = (min(low, octaves), max(high, octaves)) if near else self.near
        return Reach(min(self.low, octaves), max(self.high, octaves), inner)

    def of(self, method: Method, settings: Sequence[Setting], *, gaps: bool) -> Sequence[Setting]:
        """The settings within reach, in their order; all where the method has no continuous knob.

        Parameters
        ----------
        gaps
            Whether every second setting is left out far from the budget, if there is no other knob. There the logarithm
            of the loss is nearly linear in octaves.
        """
        if method.elastic is None or len(settings) < 2:
            return settings
        places = [method.octaves(setting) for setting in settings]
        inside = [index for index, at in enumerate(places) if self.low - _BEYOND <= at <= self.high + _BEYOND]
        if len(inside) < 2:
            # Sizes are interpolated between two points at least.
            middle = (self.low + self.high) / 2
            inside = sorted(sorted(range(len(places)), key=lambda index: abs(places[index] - middle))[:2])
        low, high = self.near or (self.low, self.high)
        gaps = gaps and all(set(setting) == {method.elastic} for setting in settings)
        return [
            settings[index]
            for index in inside
            if not gaps or index in (inside[0], inside[-1]) or index % 2 or low - _NEAR <= places[index] <= high + _NEAR
        ]


@dataclass(frozen=True)
class Window:
    """The range of bits per weight in which points are computed; settings outside are not encoded."""

    least: float = 0.0
    most: float = float("inf")
    #: Take every n-th setting.
    stride: int = 1
    #: Bits per weight of the budget, if less may be tried far from it; None where all sizes count.
    bits: float | None = None
    #: The methods within reach, by name; None where all are tried.
    reach: Mapping[str, Reach] | None = None

    def tries(self, method: Method) -> bool:
        """Whether a method is tried; dense storage, and what every plan is held against, always are.

        Lossless codes are not: where they are far beyond the budget, packing them takes time and no plan takes them.
        """
        return self.reach is None or self.reaches(method) or method.dense or method.plain

    def reaches(self, method: Method) -> bool:
        """Whether a method was found to be within reach, and nothing more has to be found out about it."""
        return self.reach is not None and method.name in self.reach

    def offered(self, method: Method, settings: Sequence[Setting]) -> Sequence[Setting]:
        """Settings of a method that are tried."""
        if method.elastic is not None and len(settings) > 2:
            settings = settings[:: self.stride]
        reach = None if self.reach is None else self.reach.get(method.name)
        return settings if reach is None else reach.of(method, settings, gaps=self.stride == 1)
