"""The base class of targets: what a budget counts, and what must be able to run the result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from octavo.allocation.counting import Counting
from octavo.allocation.opened import Opened, Run
from octavo.allocation.plans import Plan
from octavo.allocation.profiles import Profile
from octavo.artifact import Artifact
from octavo.encoding.result import Result
from octavo.encoding.section import Section
from octavo.errors import RequestError
from octavo.methods import ORDINARY, Method, select_methods
from octavo.request import Request, Role, flagged, names
from octavo.sources.sites import Site
from octavo.sources.source import Source
from octavo.system.registry import Registry

T = TypeVar("T", bound="type[Target]")

#: All targets by name: those of this folder, and those of the entry point group ``octavo.targets``.
TARGETS: Registry[type[Target]] = Registry("target", "octavo.targets")


@dataclass(frozen=True)
class Goal:
    """What a budget came to for one source.

    Parameters
    ----------
    plan
        The plan to carry out, if one was given in place of a budget.
    bare
        Whether the plan is carried out without a profile of its sites.
    """

    plan: Plan | None = None
    bare: bool = False


class Target(Counting, ABC):
    """What a budget counts, and what must be able to run the result. One file each.

    A target states what it counts (:class:`~octavo.allocation.counting.Counting`), refuses what it cannot serve, and
    says how its plan is chosen. Targets that count bytes derive from :class:`octavo.targets.sizes.Sizes`, which
    chooses for them.

    Attributes
    ----------
    about
        One line for ``octavo methods --kind targets``.
    budget
        Fields of the request that can state its budget; the first is what ``frontier`` varies.
    unused
        Other fields of the request that mean nothing for it, and are refused.
    folds
        Whether batch normalisation may be folded into the layers before it.
    loads
        Whether the model is needed even where nothing is measured.
    compresses
        Whether there must be something to compress.
    cuts
        Whether units may be removed before forms are found.
    """

    about: ClassVar[str] = ""
    budget: ClassVar[tuple[str, ...]] = ("ratio", "size", "bits")
    #: By default a base, which other runtimes do not add to, and what follows a plan: their forms have no codes that
    #: training may choose freely.
    unused: ClassVar[frozenset[str]] = frozenset({"base", "recover", "minutes"})
    folds: ClassVar[bool] = True
    loads: ClassVar[bool] = False
    compresses: ClassVar[bool] = True
    cuts: ClassVar[bool] = False

    def refuse(self, request: Request) -> None:
        """Refuse choices that mean nothing for this target.

        Raises
        ------
        RequestError
            Naming them.
        """
        self.refuse_named(type(request), request.made())

    def refuse_named(self, kind: type[Request], made: Collection[str]) -> None:
        """Refuse choices by their names, whatever their values."""
        foreign = {name for name in names(kind, Role.BUDGET) if name not in self.budget}
        odd = [name for name in names(kind) if name in made and name in foreign | self.unused]
        if odd:
            raise RequestError(
                f"--for {self.name}: these options cannot be combined with it: {flagged(kind, odd)}; leave them out, "
                f"and state the budget with {flagged(kind, self.budget)}"
            )

    def preset(self, request: Request) -> str:
        """How much is tried."""
        return request.preset

    def methods(self, request: Request) -> list[Method]:
        """The methods to choose from; those for other runtimes are left out."""
        return select_methods(request.methods, request.preset, ORDINARY, changes=request.base is not None)

    def adapted(self, source: Source) -> Source:
        """The source as this target takes it."""
        return source

    def admitted(self, source: Source, sites: list[Site], left: dict[str, str]) -> tuple[list[Site], dict[str, str]]:
        """Sites that can be served, and the reasons for tensors that are left as they are."""
        return sites, left

    def check(self, opened: Opened) -> None:
        """Refuse what can only be told once source and data are open."""
        return

    def stated(self, request: Request) -> None:
        """Refuse a budget that is stated wrongly, before anything is read."""
        return

    @abstractmethod
    def goal(self, opened: Opened) -> Goal:
        """The budget of a request, checked against what can be reached.

        Raises
        ------
        RequestError
            If it is stated wrongly.
        BudgetError
            If it surely cannot be reached.
        """

    def prepare(self, opened: Opened, goal: Goal | None, folder: Path) -> None:
        """Refuse what a run would run into later, such as a full disk, before work starts."""
        return

    @abstractmethod
    def profile(self, run: Run, goal: Goal | None) -> Profile:
        """The curves of all sites; over all budgets if no goal is given."""

    @abstractmethod
    def choose(self, run: Run, profile: Profile, goal: Goal) -> Result:
        """The plan of least loss within the budget, encoded, beside the best uniform one."""

    def plans(self, profile: Profile, requests: Iterable[Request]) -> list[Plan]:
        """The plans of a saved profile for several budgets; no weights are read.

        Raises
        ------
        RequestError
            If a budget is stated wrongly, or the target has no plans without a model.
        BudgetError
            If a budget cannot be reached.
        """
        raise RequestError(
            f"--for {self.name}: its plans are measured on the model; run octavo compress with --profile in place of "
            "octavo plan"
        )

    def plan(self, profile: Profile, request: Request) -> Plan:
        """The plan of a saved profile for a budget; errors are those of :meth:`plans`."""
        return self.plans(profile, [request])[0]

    def row(self, result: Result) -> Mapping[str, Any]:
        """Figures of a result that a frontier shows beside those that all targets have."""
        return {}

    def write(self, result: Result, folder: Path) -> Any:
        """Write what this target needs beside the artifact's own files; what is returned goes to :meth:`verify`."""
        return None

    def files(self, folder: Path, artifact: Artifact) -> Sequence[Path]:
        """The files of the result in its folder: those of the artifact, or another runtime's."""
        return artifact.files()

    def verify(self, result: Result, artifact: Artifact, written: Any) -> Section | None:
        """Measure what was written, read back from the disk: a section of the report, or None."""
        return None


def target(name: str) -> Any:
    """Register a target under the name that ``--for`` takes."""

    def register(cls: T) -> T:
        cls.name = name
        TARGETS.add(name, cls)
        return cls

    return register


def get_target(name: str) -> Target:
    """The target of that name.

    Raises
    ------
    RequestError
        If there is none.
    """
    return TARGETS.get(name)()


def targets() -> Sequence[str]:
    """Names of all targets."""
    return TARGETS.names()
