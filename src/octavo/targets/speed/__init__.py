"""Time of one call on this machine with onnxruntime, and a file that was seen to meet it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from octavo.allocation.opened import Opened, Run
from octavo.allocation.profiles import Profile
from octavo.artifact import Artifact
from octavo.artifact.writing import split_name
from octavo.calibration.evidence import Evidence
from octavo.encoding.result import Result
from octavo.encoding.section import Section
from octavo.errors import RequestError
from octavo.methods import Method, Setting, select_methods
from octavo.request import Request
from octavo.runtimes.onnx.exporting import SHAPE, parse_shape
from octavo.runtimes.onnx.given import Tokens, check_tokens_only
from octavo.runtimes.onnx.sessions import require
from octavo.sources.sentences import members
from octavo.sources.source import Source
from octavo.targets.base import Goal, Target, target
from octavo.targets.speed.asked import Asked, asked_for
from octavo.targets.speed.search import Search, offered
from octavo.targets.speed.written import Written, measured, section
from octavo.targets.speed.written import write as write_model


@dataclass
class Timetable(Profile):
    """A profile whose points were timed on this machine, with the search that timed them."""

    search: Search = field(kw_only=True)


@target("speed")
class Speed(Target):
    """Seconds of one call of the exported model, or times as fast as the source in PyTorch in float32.

    Its methods and preset are its own. ``ignore`` and ``keep`` sites run in float32, unless what is kept is a form that
    an integer kernel runs.
    """

    about = "time of one call with onnxruntime on this machine"
    unit = "time of one call with onnxruntime"
    budget = ("speedup", "latency", "shape")
    # Its methods are those that a kernel runs. It measures here, on the whole model.
    unused = frozenset({"base", "recover", "minutes", "methods", "preset", "plan", "curvature", "memory", "executor"})
    # The module's own graph is what is exported.
    folds = False

    def stated(self, request: Request) -> None:
        """Refuse a budget that is stated wrongly, before anything is read."""
        require()
        self._asked(request)

    def preset(self, request: Request) -> str:
        """Everything is tried."""
        return "best"

    def methods(self, request: Request) -> list[Method]:
        """The methods whose forms are offered."""
        return select_methods(offered(), "best")

    def offers(self, method: Method, weight: Tensor, evidence: Evidence) -> Sequence[Setting]:
        """The settings that are worth their time."""
        return method.speed_settings(weight, evidence)

    def adapted(self, source: Source) -> Source:
        """An encoder's transformer alone, if nothing with weights comes after it."""
        if source.folder is None or not members(source.folder):
            return source
        beside = sorted(name for name in source.shapes if split_name(name)[0])
        if beside:
            raise RequestError(
                f"{source.title}: has layers behind its transformer ({beside[0]}), which a file for onnxruntime would "
                "leave out; compress for disk"
            )
        return replace(source, transformer_only=True)

    def check(self, opened: Opened) -> None:
        """Refuse models that no graph runs."""
        source = opened.source
        check_tokens_only(source)
        scaled = next((site.name for site in opened.sites if site.layout.exponent), None)
        if scaled is not None:
            raise RequestError(
                f"{source.title}: the weights of {scaled!r} are of a size that no kernel of a graph takes; compress "
                "for disk, or scale them"
            )
        if not opened.measurable:
            raise RequestError(f"{source.title}: speed needs a model that runs, and data for it")

    def goal(self, opened: Opened) -> Asked:
        """The speedup or latency asked for."""
        asked = self._asked(opened.request)
        Tokens(opened.source).batch(asked.shape)
        return asked

    def profile(self, run: Run, goal: Goal | None) -> Profile:
        """Every way to store and run every site, encoded, kept in the workspace, and timed."""
        search = self._search(run, goal)
        search.profile.options = {"target": self.name, "pinned": sorted(run.opened.pinned)}
        search.profile.save(run.workspace.path / "profile.json")
        run.clock.lap("profile")
        return Timetable(**vars(search.profile), search=search)

    def choose(self, run: Run, profile: Profile, goal: Goal) -> Result:
        """The plan of least loss that was measured to be as fast as asked for."""
        assert isinstance(goal, Asked)
        assert isinstance(profile, Timetable)
        timed = profile.search.plan(goal)
        run.clock.lap("encode")
        return Result(run, profile.search.profile, timed.built.plan.budget, timed.built, None, timed)

    def row(self, result: Result) -> Mapping[str, Any]:
        """Speed of the exported model as it was built."""
        timed = result.own
        return {"speedup": timed.speedup, "seconds": timed.seconds, "kernels": dict(timed.kernels)}

    def write(self, result: Result, folder: Path) -> Written:
        """Write ``model.onnx``."""
        return write_model(result.own, folder)

    def verify(self, result: Result, artifact: Artifact, written: Any) -> Section:
        """The section on speed and loss of ``model.onnx``, measured from the disk."""
        return section(measured(result, artifact.path, written))

    def _asked(self, request: Request) -> Asked:
        return asked_for(request.speedup, request.latency, SHAPE if request.shape is None else request.shape)

    def _search(self, run: Run, goal: Goal | None) -> Search:
        opened = run.opened
        if opened.source.is_skeleton:
            raise RequestError(
                f"{opened.source.title}: does not fit in memory, and an exported graph holds the whole of it"
            )
        given = opened.request.shape
        shape = goal.shape if isinstance(goal, Asked) else parse_shape(SHAPE if given is None else given)
        return Search(run, shape)
