"""Solving a profile at many ratios, for the slider of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import ROUND_FLOOR, Context

from octavo.allocation.plans import Plan
from octavo.allocation.profiles import Curve, Profile
from octavo.encoding.result import Result
from octavo.errors import RequestError
from octavo.methods import Setting
from octavo.report.repeated_call import pieces
from octavo.report.sites import BARS, role
from octavo.report.stops import Explorer, ExplorerRow, Stop
from octavo.report.text import figures, plain, setting, things
from octavo.request import Request

#: About so many plans are solved.
STOPS = 60
#: More sites than this are told by at most so many roles, which keeps the page under two megabytes.
DETAILED, _ROLES = 256, 64
#: A ratio this many times another is worth a stop of its own.
_APART = 1.004


def explorer_of(
    done: Result, plans: Callable[[Profile, Sequence[Request]], Sequence[Plan]], command: str, call: str
) -> Explorer:
    """Plans of a finished compression's profile, from the smallest ratio that its curves reach to the largest.

    Parameters
    ----------
    plans
        Solves a profile for several requests, as the target does for ``octavo plan``.
    command, call
        The recorded command line, and the Python call that stands for it where that is none.
    """
    profile, request = done.profile, done.opened.request
    if not profile.curves:
        return Explorer(why="Nothing was encoded, so there is nothing to choose.")
    if request.plan is not None:
        return Explorer(why="A plan was carried out, so no other choices were measured.")
    ratios = _ratios(profile, done.opened.target.margin, request.ratio)
    if len(ratios) < 2:
        return Explorer(why="The settings that were tried allow no other size.")
    try:
        solved = plans(profile, [Request(None, ratio=ratio) for ratio in ratios])
    except RequestError as error:
        return Explorer(why=f"{error}.")
    return _told(profile, ratios, solved, done.run.at_rest, pieces(command, call), _notes(done))


def _ratios(profile: Profile, margin: float, asked: float | None) -> list[float]:
    """Ratios of three digits in even steps of the logarithm, with the one that was asked for among them."""
    finest = sum(min(curve.points, key=lambda point: (point.loss, point.bytes)).bytes for curve in profile.curves)
    least = max(1.0, _short(profile.original_bytes * (1 - margin) / (profile.fixed_bytes + finest)))
    most = _short(profile.original_bytes / profile.smallest)
    if most < least * _APART:
        return []
    steps = min(STOPS - 1, int(math.log(most / least) / math.log(_APART)))
    found = {_short(least * (most / least) ** (step / steps)) for step in range(1, steps)} | {least, most}
    return sorted(found | ({asked} if asked is not None and least <= asked <= most else set()))


def _short(ratio: float) -> float:
    """A ratio in three digits, rounded down so that it can be reached."""
    return float(Context(prec=3, rounding=ROUND_FLOOR).create_decimal(ratio))


def _notes(done: Result) -> tuple[str, ...]:
    bits, notes = done.profile.options.get("bits"), []
    if bits:
        notes.append(
            f"Settings around {figures(bits)} bits per weight were measured, and those of methods that were far behind "
            "only at a few sites of every kind. Far from there better plans may exist: octavo profile measures all "
            "sizes."
        )
    if done.cut is not None:
        notes.append("All plans are of the model as it was cut here. The command decides again how much is cut.")
    return tuple(notes)


def _told(
    profile: Profile,
    ratios: Sequence[float],
    plans: Sequence[Plan],
    at_rest: float,
    command: tuple[str, ...],
    notes: tuple[str, ...],
) -> Explorer:
    curves = profile.curves
    roles = [curve.site if len(curves) <= BARS else role(curve.site) for curve in curves]
    names, bar_of = _largest(roles, curves, BARS)
    if len(curves) <= DETAILED:
        rows = [ExplorerRow(curve.site, 1, bar) for curve, bar in zip(curves, bar_of, strict=True)]
        row_of = list(range(len(curves)))
    else:
        labels, row_of = _largest(roles, curves, _ROLES)
        rows = [ExplorerRow(label, row_of.count(row), bar_of[row_of.index(row)]) for row, label in enumerate(labels)]
    methods, settings = _Numbers(), _Numbers()

    def stop(ratio: float, plan: Plan) -> Stop:
        cells: dict[tuple[int, int, int], tuple[int, int, float]] = {}
        for curve, row in zip(curves, row_of, strict=True):
            point = plan.points[curve.site]
            chosen = settings[_shown(point.setting)] if rows[row].sites == 1 else -1
            key = (row, methods[point.method], chosen)
            number, size, loss = cells.get(key, (0, 0, 0.0))
            cells[key] = (number + 1, size + point.bytes, loss + profile.corrected(curve, point.loss))
        return Stop(
            ratio,
            plan.budget.bytes,
            plan.bytes,
            plan.expected + at_rest,
            tuple((*key, number, size, float(f"{loss:.4g}")) for key, (number, size, loss) in cells.items()),
        )

    stops = tuple(stop(ratio, plan) for ratio, plan in zip(ratios, plans, strict=True))
    return Explorer(
        notes=notes,
        command=command,
        fixed=profile.fixed_bytes,
        methods=tuple(methods),
        settings=tuple(settings),
        bars=tuple(names),
        rows=tuple(rows),
        stops=stops,
    )


def _largest(roles: Sequence[str], curves: Sequence[Curve], limit: int) -> tuple[list[str], list[int]]:
    """The names of at most so many roles, most weights first, and one for the rest; and for every curve its number."""
    weights: dict[str, int] = {}
    for name, curve in zip(roles, curves, strict=True):
        weights[name] = weights.get(name, 0) + math.prod(curve.shape)
    ordered = sorted(weights, key=lambda name: -weights[name])
    numbers = {name: min(number, limit) for number, name in enumerate(ordered)}
    placed = [numbers[name] for name in roles]
    rest = placed.count(limit)
    return [*ordered[:limit], *([f"the rest: {things(rest, 'site')}"] if rest else [])], placed


def _shown(choice: Setting) -> str:
    return plain(setting(choice), 80)


class _Numbers(dict[str, int]):
    """Numbers of names in the order in which they are first asked for."""

    def __missing__(self, name: str) -> int:
        self[name] = len(self)
        return self[name]
