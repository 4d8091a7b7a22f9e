"""What the page's slider moves over: plans of one profile at many ratios, as records.

Everything that repeats is named once and then counted from 0, so that sixty plans take tens of kilobytes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExplorerRow:
    """A site, or sites of one role that are told together.

    Parameters
    ----------
    sites
        How many they are.
    bar
        Number of the bar that they are drawn in.
    """

    name: str
    sites: int
    bar: int


@dataclass(frozen=True)
class Stop:
    """The plan at one ratio, as ``octavo plan --ratio`` solves it.

    Parameters
    ----------
    budget, bytes
        Bytes that the ratio allows, and that the plan takes.
    expected
        Its expected loss, after correction by measured plans; with what a cut costs, if there is one.
    cells
        For every row and method: numbers of the row, the method and the setting (-1 where sites differ in it), how many
        sites these are, and their bytes and expected loss together.
    """

    ratio: float
    budget: int
    bytes: int
    expected: float
    cells: tuple[tuple[int, int, int, int, int, float], ...]


@dataclass(frozen=True)
class Explorer:
    """Plans at many ratios.

    Parameters
    ----------
    why
        Why there are none; empty if there are.
    notes
        What their range rests on.
    command
        The call that carries a plan out, in pieces; the ratio stands between them.
    fixed
        Bytes of everything that is not a site.
    methods, settings, bars
        Names that are counted from 0.
    stops
        From the smallest ratio to the largest.
    """

    why: str = ""
    notes: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    fixed: int = 0
    methods: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    bars: tuple[str, ...] = ()
    rows: tuple[ExplorerRow, ...] = ()
    stops: tuple[Stop, ...] = ()

    def __post_init__(self) -> None:
        rows, methods, settings = range(len(self.rows)), range(len(self.methods)), range(-1, len(self.settings))
        for stop in self.stops:
            if any(not (cell[0] in rows and cell[1] in methods and cell[2] in settings) for cell in stop.cells):
                raise ValueError(f"the stop at ratio {stop.ratio:g} names a row, method or setting that is not there")
        if any(not 0 <= row.bar < len(self.bars) for row in self.rows):
            raise ValueError("a row names a bar that is not there")
