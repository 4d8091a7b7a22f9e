"""Verdicts: how far one arm is ahead of another, with what certainty, and what follows for a claim."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike

from octavo.errors import MissingExtraError

#: The confidence of every interval.
CONFIDENCE = 0.95


class Verdict(StrEnum):
    """What the figures say of a claim."""

    HOLDS = "holds"
    REFUTED = "refuted"
    UNDECIDED = "undecided"
    NOT_TESTABLE = "not testable"


@dataclass(frozen=True)
class Gap:
    """By how much one series of figures is ahead of another.

    Parameters
    ----------
    text
        What is compared: ``TRP over SVD, fine-tuned``.
    mean
        Mean of the paired differences; positive is in favour of the claim.
    low, high
        The interval of that mean, by the t quantile; both equal the mean if there is one pair.
    margin
        The mean must be above it. A negative one allows a loss.
    pairs
        How many differences there are.
    """

    text: str
    mean: float
    low: float
    high: float
    margin: float
    pairs: int

    @property
    def verdict(self) -> Verdict:
        """Holds if the whole interval is above the margin, refuted if all of it is at most the margin."""
        if self.low > self.margin:
            return Verdict.HOLDS
        return Verdict.REFUTED if self.high <= self.margin else Verdict.UNDECIDED

    def __str__(self) -> str:
        spread = f" ± {(self.high - self.low) / 2:.2g}" if self.pairs > 1 else ""
        least = f" (must be above {self.margin:g})" if self.margin else ""
        return f"{self.text}: {self.mean:+.3g}{spread}{least}"


def gap(text: str, ours: Sequence[float], theirs: Sequence[float], margin: float = 0.0) -> Gap:
    """Compare two series pair by pair; a series of one figure is compared with every figure of the other.

    Raises
    ------
    ValueError
        If the series have different lengths, and neither has one figure.

    Examples
    --------
    >>> print(gap("ours over theirs", [3.0, 4.0, 8.0], [1.0, 3.0, 5.0]))
    ours over theirs: +2 ± 2.5
    >>> gap("ours over theirs", [3.0, 4.0, 8.0], [1.0, 3.0, 5.0]).verdict.value
    'undecided'
    """
    count = max(len(ours), len(theirs))
    if {len(ours), len(theirs)} - {1, count}:
        raise ValueError(f"{text}: {len(ours)} figures cannot be paired with {len(theirs)}")
    left, right = (list(values) * (count if len(values) == 1 else 1) for values in (ours, theirs))
    found = [a - b for a, b in zip(left, right, strict=True)]
    mean = statistics.fmean(found)
    half = quantile(count - 1) * statistics.stdev(found) / math.sqrt(count) if count > 1 else 0.0
    return Gap(text, mean, mean - half, mean + half, margin, count)


def quantile(freedom: int) -> float:
    """The two-sided t quantile of :data:`CONFIDENCE` with so many degrees of freedom."""
    try:
        from scipy.stats import t
    except ImportError as error:
        raise MissingExtraError("studies need scipy: pip install 'octavo[recipes]'") from error
    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))


def rank_correlation(one: ArrayLike, other: ArrayLike) -> float:
    """Spearman's rank correlation of two series; of two tables (rows, columns), the mean over rows.

    Examples
    --------
    >>> rank_correlation([[1, 2, 3], [1, 2, 3]], [[10, 30, 20], [4, 5, 6]])
    0.75
    """
    try:
        from scipy.stats import spearmanr
    except ImportError as error:
        raise MissingExtraError("studies need scipy: pip install 'octavo[recipes]'") from error
    pairs = zip(np.atleast_2d(one), np.atleast_2d(other), strict=True)
    return statistics.fmean(float(spearmanr(*pair).statistic) for pair in pairs)


def together(gaps: Iterable[Gap]) -> Verdict:
    """The verdict of a statement that needs all of these: refuted by any, undecided if any is."""
    found = {gap.verdict for gap in gaps}
    for worst in (Verdict.REFUTED, Verdict.UNDECIDED):
        if worst in found:
            return worst
    return Verdict.HOLDS


@dataclass(frozen=True)
class Gate:
    """A condition without which a study cannot show anything.

    Parameters
    ----------
    text
        The condition: ``the net beats a linear classifier``.
    gaps
        All must hold.
    """

    text: str
    gaps: tuple[Gap, ...]

    @property
    def passed(self) -> bool:
        """Whether it is met with certainty."""
        return together(self.gaps) is Verdict.HOLDS


@dataclass(frozen=True)
class Judged:
    """A statement after the run.

    Parameters
    ----------
    text
        The statement, at most 12 words.
    published
        Whether it was published; otherwise it is a question of our own, an extra.
    verdict
        What the figures say.
    gaps
        The comparisons that decide, of which all must hold.
    failed
        The gates that were not passed, by their text.
    """

    text: str
    published: bool
    verdict: Verdict
    gaps: tuple[Gap, ...]
    failed: tuple[str, ...] = ()


def tally(claims: Iterable[Judged]) -> str:
    """Count verdicts as pages show them.

    Examples
    --------
    >>> tally([Judged("A.", True, Verdict.HOLDS, ()), Judged("B.", False, Verdict.UNDECIDED, ())])
    'published 1/1 · extra 0/1 (1 undecided)'
    """
    claims = list(claims)
    parts = []
    for word, published in (("published", True), ("extra", False)):
        own = [claim.verdict for claim in claims if claim.published is published]
        if not own:
            continue
        open_ones = [
            f"{own.count(kind)} {kind.value}" for kind in (Verdict.UNDECIDED, Verdict.NOT_TESTABLE) if kind in own
        ]
        held = f"{word} {own.count(Verdict.HOLDS)}/{len(own)}"
        parts.append(f"{held} ({', '.join(open_ones)})" if open_ones else held)
    return " · ".join(parts)
