"""Targets that count bytes: curves of all sites, one multiplier, the plans that it must beat."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from octavo.allocation.budget import Budget
from octavo.allocation.budget import budget as budget_of
from octavo.allocation.curves import build_profile
from octavo.allocation.opened import Opened, Run
from octavo.allocation.plans import EDITED, Plan, read_plan
from octavo.allocation.profiles import Profile
from octavo.allocation.solver import PointTable, allocate, labelled, unreachable
from octavo.encoding.carrying import carry_out, pinned_by
from octavo.encoding.disk_use import refuse_full_disk
from octavo.encoding.finish import contest
from octavo.encoding.reconstruct import reconstruct, reserve
from octavo.encoding.result import Result
from octavo.errors import RequestError
from octavo.request import Request
from octavo.sources.source import Source
from octavo.targets.base import Goal, Target


@dataclass(frozen=True)
class SizeGoal(Goal):
    """A budget in bytes."""

    budget: Budget = field(kw_only=True)


class Sizes(Target):
    """A target that counts bytes of some kind."""

    #: Whether :meth:`smallest` is an estimate where the source can be measured, and somewhat less can be reached.
    estimates: ClassVar[bool] = False

    @abstractmethod
    def smallest(self, opened: Opened, asked: Budget) -> int | None:
        """The least bytes that can be reached, if a budget is surely below; None if it may be reached."""

    def stated(self, request: Request) -> None:
        """Refuse a budget that is stated wrongly, before anything is read."""
        if request.plan is None:
            self._of(1, 1, request)

    def goal(self, opened: Opened) -> SizeGoal:
        """The budget of ratio, size or bits, or that of a plan."""
        request, source = opened.request, opened.source
        if request.plan is not None:
            if request.recover != "none":
                raise RequestError("recover: a plan is carried out as it is written; leave recover or plan out")
            plan = self._requested_plan(opened, Path(request.plan))
            return SizeGoal(plan, budget=plan.budget)
        asked = self._of(source.original_bytes, source.weights, request)
        # What is close to the limit goes through, and is decided when the profile is known.
        smallest = self.smallest(opened, asked)
        if smallest is not None:
            raise unreachable(asked, source.original_bytes, smallest, roughly=self.estimates and opened.measurable)
        return SizeGoal(budget=asked)

    def prepare(self, opened: Opened, goal: Goal | None, folder: Path) -> None:
        """Refuse a disk on which the run will not fit."""
        if not opened.request.resume:
            refuse_full_disk(opened, folder, goal.budget.bytes if isinstance(goal, SizeGoal) else 0)

    def profile(self, run: Run, goal: Goal | None) -> Profile:
        """The curves of all sites around a budget, or of all sizes."""
        if not isinstance(goal, SizeGoal) or goal.bare:
            profile = build_profile(run, None, corrected=goal is None)
            run.clock.lap("profile")
            return profile
        profile = build_profile(run, goal.budget.bytes * 8 / run.opened.source.elements)
        if profile.smallest > goal.budget.bytes:
            # Settings far coarser than the budget were not tried; what can be reached at all depends on them.
            profile = build_profile(run, 0.0)
        run.clock.lap("profile")
        return profile

    def choose(self, run: Run, profile: Profile, goal: Goal) -> Result:
        """The best of the mixed plan and its rivals, finished to use the budget exactly."""
        assert isinstance(goal, SizeGoal)
        opened, asked, clock = run.opened, goal.budget, run.clock
        if goal.plan is not None:
            run = pinned_by(run, goal.plan)
            built, profile = carry_out(run, profile, goal.plan)
            clock.lap("encode")
            return Result(run, profile, asked, built)
        spared = asked.bytes - reserve(opened, asked.bytes)
        free = asked if profile.smallest > spared else replace(asked, bytes=spared)
        considered = self.considered(profile, free)
        chosen = allocate(considered, free, margin=self.margin)
        clock.lap("plan")
        # Named methods exclude all others, and so does a preset.
        plain = any(method.plain for method in opened.methods)
        built, rival = contest(run, profile, considered, chosen, free, plain=plain)
        clock.lap("encode")
        built = reconstruct(run, built, asked.bytes)
        clock.lap("reconstruct")
        return Result(run, profile, asked, built, rival)

    def plans(self, profile: Profile, requests: Iterable[Request]) -> list[Plan]:
        """The plans of a saved profile for several budgets; no weights are read."""
        budgets = [self._of(profile.original_bytes, profile.weights, request) for request in requests]
        choices = PointTable(profile)
        # Profiles of earlier versions do not say what was pinned.
        more: dict[str, Any] = {"fingerprint": profile.fingerprint, "pinned": tuple(profile.options.get("pinned", ()))}
        plans = []
        for asked in budgets:
            considered = self.considered(profile, asked)
            table = choices if considered is profile else PointTable(considered)
            plans.append(replace(table.allocate(asked, margin=self.margin), **more))
        return plans

    def _of(self, original_bytes: int, weights: int, request: Request) -> Budget:
        given = {name: getattr(request, name) for name in ("ratio", "size", "bits")}
        return self._stated(original_bytes, weights, given)

    def _stated(self, original_bytes: int, weights: int, given: Mapping[str, Any]) -> Budget:
        return budget_of(original_bytes, weights, **given, target=self.name, unit=self.unit)

    def _requested_plan(self, opened: Opened, file: Path) -> Plan:
        """The plan of a file, if it can be that of what was opened, and no size is given beside it.

        Raises
        ------
        RequestError
            If it is for other sites or another target, or has another form of a site than the user asks for now.
        """
        request, source = opened.request, opened.source
        if any(getattr(request, name) is not None for name in ("ratio", "size", "bits")):
            raise RequestError("a plan has its own budget: leave out ratio, size and bits")
        plan = read_plan(file, [site.name for site in opened.sites])
        if plan.budget.target != self.name:
            raise RequestError(
                f"{file}: its budget counts bytes for {plan.budget.target}, not for {self.name}; ask for the same "
                "target"
            )
        for name, (method, setting) in opened.pinned.items():
            point = plan.points[name]
            if (point.method, point.setting) != (method, setting):
                raise RequestError(
                    f"{file}: site {name!r} has {labelled(point.method, point.setting)}, and --keep asks for "
                    f"{labelled(method, setting)}; change one of them"
                )
        plan = replace(plan, budget=replace(plan.budget, unit=self.unit))
        same = not plan.fingerprint or plan.fingerprint == source.fingerprint()
        if not same:
            opened.notes.append("the plan was made for another source: its sizes were finished for this one")
        # In other words a budget that was edited, or that of another source, would be a ratio or a rate that it is not.
        if same and (plan.label != EDITED or self._says(plan.budget, source)):
            return plan
        size = {"ratio": None, "size": plan.budget.bytes, "bits": None}
        return replace(plan, budget=self._stated(source.original_bytes, source.weights, size))

    def _says(self, budget: Budget, source: Source) -> bool:
        """Whether a budget's words and its bytes are the same for a source."""
        words = budget.asked.removesuffix(self.unit.removeprefix("bytes")).replace(" bits per weight", "").split(" ", 1)
        given: dict[str, Any] = {words[0] if len(words) == 2 else "bits": words[-1]}
        try:
            meant = self._stated(source.original_bytes, source.weights, given)
        except (RequestError, TypeError):
            return False
        return meant.bytes == budget.bytes
