"""Finding the plan of least loss within a latency.

Every matrix is offered as it is, in the forms that integer kernels run, and as two factors. What a point costs is
seconds, measured on this machine by shape and kernel; what it loses is the expected loss of its weights and of its
inputs, which such kernels round as well. The solver is that of :mod:`octavo.allocation.solver`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from octavo.allocation.budget import Budget
from octavo.allocation.encoded import encode_all, form_of, narrowing_of, seal
from octavo.allocation.opened import Opened, Run
from octavo.allocation.plans import Plan
from octavo.allocation.profiles import Curve, Point, Profile
from octavo.allocation.solver import solve
from octavo.artifact import Packed
from octavo.calibration.evidence import Evidence
from octavo.encoding.finish import Built
from octavo.errors import BudgetError
from octavo.forms import Form
from octavo.methods import Method, Setting, methods
from octavo.runtimes.onnx.activations import rounding_loss, watch
from octavo.runtimes.onnx.exporting import check_graph
from octavo.runtimes.onnx.given import Tokens
from octavo.runtimes.onnx.graph import SITE, open_inputs, trace
from octavo.runtimes.onnx.kernels import FLOAT, kernel_of, lower
from octavo.runtimes.onnx.latency import Table, compare
from octavo.runtimes.onnx.opened import dense_forms
from octavo.runtimes.onnx.sessions import Session
from octavo.sources.sites import Site
from octavo.sources.source import Source
from octavo.targets.speed.asked import Asked

#: The baseline that speed is counted against.
DENSE = "torch float32"
#: The exported graph with all weights in float32.
WIDE = "onnxruntime float32"
#: Plans aim this share below the latency asked for; two measurements of one file differ by as much.
_RESERVE = 0.04
_ROUNDS = 5
#: Seconds that a comparison of whole models takes.
_SECONDS = 3.0
_NOT_A_POINT = 2**62


def offered() -> list[str]:
    """Names of the methods that have settings for speed, dense storage first."""
    found = [cls for cls in methods().values() if cls.speed_settings is not Method.speed_settings]
    return [cls.name for cls in sorted(found, key=lambda cls: not cls.dense)]


@dataclass(frozen=True)
class Candidate:
    """One way to store and run a site.

    Parameters
    ----------
    seconds
        Of the site alone, at the shape asked for.
    loss
        Expected increase of the model's loss, from weights and rounded inputs.
    """

    method: str
    setting: Setting
    kernel: str
    bytes: int
    seconds: float
    loss: float


@dataclass
class Anchors:
    """Whole models that were measured, which tie the sum of a plan's sites to the latency of a file.

    Parameters
    ----------
    dense
        Seconds of the source in PyTorch in float32.
    fixed, scale
        A whole file takes ``fixed`` seconds and ``scale`` times what its sites take alone.
    """

    dense: float
    fixed: float
    scale: float


@dataclass(frozen=True)
class Timed:
    """A plan for speed that was built and measured.

    Parameters
    ----------
    kernels
        Site to kernel, of the sites that the exported graph runs.
    seconds, speedup
        Of one call of the exported model, and times as fast as the source in PyTorch in float32.
    """

    asked: Asked
    built: Built
    kernels: dict[str, str]
    seconds: float
    speedup: float


class Search:
    """Finds the plan of least loss within the latency asked for."""

    def __init__(self, run: Run, shape: tuple[int, int]) -> None:
        self.run, self.opened, self.shape = run, run.opened, shape
        opened = self.opened
        self.model, kinds = trace(opened.source)
        self.dense = {name: form for name, form in dense_forms(opened.source).items() if name in kinds}
        check_graph(opened.source, self.model, self.dense)
        known = {site.name for site in opened.sites}
        self.matrices = [name for name, kind in kinds.items() if kind == SITE and name in known]
        self.inputs = open_inputs(self.model)
        self.agreed: dict[tuple[str, str], Setting] = {}
        self.table = Table(math.prod(shape))
        self.ranges = watch(opened.source, self.matrices, opened.calibration_data)
        self.candidates = {site.name: self._candidates(site) for site in opened.sites}
        self.table.save()
        self.anchors = self._anchors()
        curves = [Curve(site.name, site.kind, site.shape, _points(self.candidates[site.name])) for site in opened.sites]
        source = opened.source
        self.profile = Profile(source.title, source.fingerprint(), source.original_bytes, source.weights, 0, curves)

    def plan(self, asked: Asked) -> Timed:
        """The plan of least loss within what was asked for, built and measured."""
        names = list(self.candidates)
        width = max(map(len, self.candidates.values()))
        costs = np.full((len(names), width), _NOT_A_POINT, dtype=np.int64)
        losses = np.full((len(names), width), np.inf)
        for row, name in enumerate(names):
            found = self.candidates[name]
            costs[row, : len(found)] = [round(c.seconds * self.anchors.scale * 1e9) for c in found]
            losses[row, : len(found)] = [c.loss for c in found]
        dense = self.anchors.dense
        allowed = asked.allowed(dense) * (1 - _RESERVE)
        aim = allowed
        best: Timed | None = None
        fastest = 0.0
        for attempt in range(_ROUNDS):
            left = max(round((aim - self.anchors.fixed) * 1e9), int(costs.min(1).sum()))
            chosen = {name: self.candidates[name][k] for name, k in zip(names, solve(costs, losses, left), strict=True)}
            built, kernels, session = self._build(chosen, asked)
            calls = runs(self.opened.source, self.shape, {"exported": session})
            pair = compare(calls, DENSE, seconds=_SECONDS)
            taken = pair["exported"]
            # By the least times: a busy machine must not drive the plan to where nothing but the loss changes.
            speedup = pair[DENSE]["least"] / taken["least"]
            self.run.progress("measure", attempt + 1, _ROUNDS)
            fastest = max(fastest, speedup)
            # The machine may have been slower when the baseline was measured first: the ratio is what counts.
            seconds = dense / speedup if asked.seconds is None else taken["least"]
            if seconds <= allowed and (best is None or built.quality < best.built.quality):
                best = Timed(asked, built, kernels, taken["seconds"], taken["speedup"])
            if (attempt and best is not None) or 0.97 * allowed <= seconds <= allowed:
                break
            if left <= int(costs.min(1).sum()) and seconds > allowed:
                break
            aim *= allowed / seconds
        if best is None:
            limit = math.floor(fastest * (1 - _RESERVE) * 100) / 100
            raise BudgetError(
                f"{asked.words} at {self.shape[0]} x {self.shape[1]} tokens cannot be reached on this "
                f"machine: the fastest file measured is {fastest:.2f} times as fast as PyTorch in float32, and "
                f"{_RESERVE:.0%} are left free for what two measurements differ by. "
                f"Ask for a speedup of at most {limit:g}.",
                limit,
            )
        return best

    def _build(self, chosen: Mapping[str, Candidate], asked: Asked) -> tuple[Built, dict[str, str], Session]:
        """Encode a plan, export it, and measure what it loses when onnxruntime runs it."""
        opened = self.opened
        packed = {name: self._encode(opened.site(name), c.method, c.setting) for name, c in chosen.items()}
        forms = {name: self._form(name, packed[name]) if name in packed else self.dense[name] for name in self.dense}
        kernels = {name: chosen[name].kernel for name in self.matrices}
        session = Session(lower(self.model, forms, kernels).SerializeToString())
        contents = seal(opened, packed, narrowing_of(self.run))
        points = {name: Point(c.method, {**c.setting}, packed[name].bytes, c.loss) for name, c in chosen.items()}
        total = contents.bytes
        self.profile.fixed_bytes = total - sum(item.bytes for item in packed.values())
        budget = Budget(total, asked.words, opened.target.name, opened.target.unit)
        plan = Plan(budget, points, sum(c.loss for c in chosen.values()), self.profile.fixed_bytes)
        losses = divergences(opened, session)
        built = Built(plan, packed, contents, total, total, float(losses.mean()), float(losses.quantile(0.95)))
        return built, kernels, session

    def _encode(self, site: Site, method: str, setting: Setting) -> Packed:
        chosen = {site.name: Point(method, setting, 0, 0.0)}
        return next(packed for _, packed in encode_all(self.run, chosen))

    def _form(self, name: str, packed: Packed) -> Form:
        return form_of(self.opened.site(name), packed)

    def _candidates(self, site: Site) -> list[Candidate]:
        """All ways to store and run a site; what the graph does not multiply with stays dense."""
        opened = self.opened
        choices: list[tuple[str, Setting]]
        if site.name in opened.pinned:
            choices = [opened.pinned[site.name]]
        else:
            offered = [m for m in opened.methods if m.accepts(site) and (m.dense or site.name in self.matrices)]
            choices = [(method.name, setting) for method in offered for setting in self._settings(method, site)]
        found = [self._candidate(site, method, setting) for method, setting in choices]
        self.run.progress("profile", opened.sites.index(site) + 1, len(opened.sites))
        return found

    def _settings(self, method: Method, site: Site) -> Sequence[Setting]:
        settings = self.opened.target.offers(method, self.opened.matrix(site), self._evidence(site))
        return [self._agreed(method, site, settings)] if method.scales_inputs and settings else settings

    def _agreed(self, method: Method, site: Site, settings: Sequence[Setting]) -> Setting:
        """The setting of least expected loss for all sites that read the same values and so share their rounding."""
        key = (method.name, self.inputs[site.name])
        if key not in self.agreed:
            group = [self.opened.site(name) for name in self.matrices if self.inputs[name] == key[1]]
            losses = [sum(self._candidate(other, method.name, each).loss for other in group) for each in settings]
            self.agreed[key] = settings[int(np.argmin(losses))]
        return self.agreed[key]

    def _evidence(self, site: Site) -> Evidence:
        return self.run.calibration.evidence[site.name]

    def _candidate(self, site: Site, method: str, setting: Setting) -> Candidate:
        packed = self._encode(site, method, setting)
        form = self._form(site.name, packed)
        evidence = self._evidence(site)
        loss = evidence.loss(form.dense() - self.opened.matrix(site))
        if site.name not in self.matrices:
            return Candidate(method, setting, FLOAT, packed.bytes, 0.0, loss)
        kernel = kernel_of(form)
        ranges = self.ranges.get(site.name)
        if ranges is None:
            kernel = FLOAT
        else:
            loss += rounding_loss(form, kernel, evidence, ranges)
        return Candidate(method, setting, kernel, packed.bytes, self.table.seconds(form, kernel), loss)

    def _anchors(self) -> Anchors:
        """Measure whole models, and fit what the sites' sum leaves out."""
        opened = self.opened
        fastest = {name: min(self.candidates[name], key=lambda c: c.seconds) for name in self.matrices}
        forms = dict(self.dense)
        for name, candidate in fastest.items():
            forms[name] = self._form(name, self._encode(opened.site(name), candidate.method, candidate.setting))
        kernels = {name: candidate.kernel for name, candidate in fastest.items()}
        sessions = {
            WIDE: Session(lower(self.model, self.dense, {}).SerializeToString()),
            "fastest": Session(lower(self.model, forms, kernels).SerializeToString()),
        }
        taken = compare(runs(opened.source, self.shape, sessions), DENSE, seconds=_SECONDS)
        whole, quick = (taken[name]["least"] for name in sessions)
        plain = sum(self.table.seconds(self.dense[name], FLOAT) for name in self.matrices)
        least = sum(candidate.seconds for candidate in fastest.values())
        # Alone, a site finds its weights in the cache, and does not share the rounding of its inputs with others.
        scale = max((whole - quick) / max(plain - least, 1e-9), 0.1)
        return Anchors(taken[DENSE]["least"], max(quick - scale * least, 0.0), scale)


def _points(candidates: Sequence[Candidate]) -> list[Point]:
    return [Point(c.method, dict(c.setting), c.bytes, c.loss) for c in candidates]


def divergences(opened: Opened, session: Session) -> torch.Tensor:
    """Divergence of every held-out example when onnxruntime runs the model."""
    assert opened.source.module is not None
    return opened.objective.measure(
        session, opened.held_data, opened.objective.reference(opened.source.module, opened.held_data)
    )


def runs(
    source: Source, shape: tuple[int, int], sessions: Mapping[str, Session], *, bfloat16: bool = False
) -> dict[str, Any]:
    """Calls to compare: the source in PyTorch, and sessions, on the same tokens."""
    assert source.module is not None
    batch = Tokens(source).batch(shape)
    modules = {DENSE: source.module}
    if bfloat16:
        modules["torch bfloat16"] = copy.deepcopy(source.module).bfloat16()
    calls: dict[str, Any] = {name: partial(module, **batch) for name, module in modules.items()}
    return calls | {name: partial(run.session.run, None, run.feed(batch)) for name, run in sessions.items()}
