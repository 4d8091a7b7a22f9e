"""The way through: request, source, sites, evidence, profile, plan, forms; and its single steps on their own."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from octavo.allocation.opened import Opened, Run
from octavo.allocation.plans import Plan
from octavo.allocation.profiles import Profile
from octavo.allocation.workspace import Workspace, holds_profile
from octavo.cutting import best_level, cut_alone, cutter, refuse_cut, split_request
from octavo.encoding.finish import finish, single_families
from octavo.encoding.recovering import recover
from octavo.encoding.result import Result
from octavo.errors import BudgetError, RequestError
from octavo.methods.selecting import dense_method
from octavo.opening import begin, open_request
from octavo.request import Choices, Request, Role, request_of, shows_options
from octavo.saving import Compressed
from octavo.system import executors
from octavo.system.clock import Clock
from octavo.system.locks import Lock
from octavo.system.matmul import fast_matmul
from octavo.system.notes import by_kind, warn
from octavo.system.paths import checked, checked_output, reason
from octavo.system.progress import Progress, Shown, callback, with_progress
from octavo.system.sealed import unsealed_json
from octavo.targets import Target, get_target

_REQUEST = "request.json"
#: Frames between a verb and its caller, its own and those of its decorators.
_DEPTH = 4


@shows_options
@with_progress
@fast_matmul()
def compress(source: Any, *, progress: Shown = None, **choices: Unpack[Choices]) -> Compressed:
    """Compress a source to the size or speed asked for.

    Parameters
    ----------
    source
        A ``transformers`` folder, a ``.safetensors`` file or index, or any module; or a :class:`octavo.Request`, which
        holds all other parameters too.
    ratio, size, bits
        The budget, exactly one of them: original bytes over artifact bytes, bytes (``"11MB"``), or bits per weight.
    target
        What the budget counts: ``disk``, the bytes of the artifact's files; ``memory``, those that all tensors take
        while the model runs from packed codes (``octavo.load(path, packed=True)``); or ``speed``.
    base
        The model that the source was tuned from: a folder, a file, or a module. The difference to it is compressed
        and stored; ``ratio`` counts the bytes of what changed, in 16 bits, and ``bits`` the weights of the model. It is
        made for ``disk``. Quality is that of the base with the restored difference. Loading needs the same base
        (:func:`octavo.load`).
    speedup, latency, shape
        The budget for ``speed``, exactly one of the first two: times as fast as the source in PyTorch in float32, or
        seconds (``"5ms"``), at ``shape`` sequences x tokens (1 x 32 if not given), on this machine with onnxruntime.
        Its methods and preset are its own.
    data
        A file or list of texts for a text model, a folder of images or sounds for a model that sees or hears, or an
        iterable of batches, such as a ``DataLoader``; a single tensor or mapping is one batch. Without any, the
        built-in English text serves a text model, and other sources are compressed without data. If a tuple is longer
        than ``forward`` takes, such as inputs with labels, the first element goes in; keys that ``forward`` does not
        know are left out. Batches whose rows point to each other, such as graphs, are held back whole.
    forward_args
        Says for each batch what the module is called with: a tuple of positional or a mapping of keyword arguments,
        as in ``lambda batch: (batch.x, batch.edge_index)``.
    objective
        ``cosine``, ``kl``, ``squared`` or an :class:`~octavo.calibration.objective.Objective`; chosen by the source if
        not given.
    curvature
        How errors are weighed against each other: ``kfac``, by inputs and by outputs apart, or ``ekfac``, which
        measures both together in a second pass over the data (:mod:`octavo.calibration.curvature`): more exact, for
        more memory. It needs data and a model that fits in memory.
    methods
        Names of methods or families to use, or methods with knobs; those of the preset if not given. One may be a cut,
        such as ``modegpt``: alone it removes as many units as the budget asks for and nothing is encoded; beside others
        a few of its levels are tried, and forms are solved under each (:mod:`octavo.cutting`).
    preset
        ``fast``, ``default`` or ``best``; or ``data-free``.
    ignore, keep
        Globs of site names to leave alone, and a mapping of globs to choices such as ``float16`` or ``gptq:bits=4``.
    recover
        ``distill`` lets the source teach the compressed model on ``data``, in the forms that are stored and in the same
        bytes (:mod:`octavo.encoding.recovering`). It needs data beyond those of the calibration, without labels, and
        is made for ``disk``. With the default ``none`` nothing follows encoding.
    minutes
        How long to teach.
    plan
        A plan file to carry out instead of allocating: to its budget exactly as :func:`octavo.plan` wrote it, to the
        letter if it was edited.
    workspace
        Folder for unfinished work or a saved profile, which takes about the bytes of the artifact; a temporary one
        if not given. Where temporary files lie in memory, name a folder beside the output for a large model.
    resume
        Use finished steps found in ``workspace``.
    seed
        The same seed gives the same bytes.
    memory
        The most that the run may take (``"6GB"``); by default three quarters of what the machine has. A model that does
        not fit in it as a whole is run block by block.
    executor
        Where sites are profiled and encoded: ``local`` threads, ``ray`` for workers of a Ray cluster on this machine,
        ``ray://host:port`` for those of another. The bytes are the same.
    progress
        None for bars with the time left where standard error is a terminal or this is a notebook, True or False for
        bars or silence, or a callable that is given a step's name, how much of it is done and how much there is.

    Returns
    -------
    Compressed
        Call ``save(path)`` on it.

    Raises
    ------
    RequestError
        If something about the request or the source cannot be served.
    BudgetError
        If the budget cannot be reached; its ``limit`` is the largest that can.
    MissingExtraError
        If an extra that the target needs is not installed.

    Warns
    -----
    OctavoWarning
        Once for every kind of note about the run, such as sites for which there was too little data.

    Examples
    --------
    >>> import octavo, torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
    >>> done = octavo.compress(net, ratio=4, data=torch.randn(64, 64), progress=False)
    >>> done.ratio >= 4
    True
    """
    done = compressed(request_of(source, choices), callback(progress))
    warn(done.notes, _DEPTH)
    return done


def compressed(request: Request, progress: Progress) -> Compressed:
    """The way through, without warnings: they are the result's notes. Errors are those of :func:`compress`."""
    target = get_target(request.target)
    target.refuse(request)
    target.stated(request)
    clock, work = Clock(), None if request.workspace is None else checked_output(request.workspace)
    request, cut, alone = split_request(request)
    if cut is not None and request.base is not None:
        raise RequestError(
            f"base: {cut.name} is a cut, which changes shapes, so that nothing is left to compare; leave it or base out"
        )
    whole = cut is not None and not cut.needs_data
    # A cut takes norms and layers apart, and some scores are the scales of norms.
    folding = cut is None
    opened = open_request(
        request, target, progress, work=work if request.resume else None, folding=folding, module=whole
    )
    goal = target.goal(opened)
    target.prepare(opened, goal, Path(work or tempfile.gettempdir()))
    clock.lap("open")
    with _workspace(work) as (folder, lock), opened.witness.blamed(), executors.executor(request.executor) as executor:
        if goal.plan is not None and not (request.resume and holds_profile(folder, opened.identity())):
            if request.methods is not None:
                raise RequestError("a plan says which method every site gets: leave methods out, and edit the plan")
            # To carry out a plan nothing needs to be measured but what sites there are.
            opened, goal = replace(opened, methods=[dense_method()]), replace(goal, bare=True)
        room = Workspace(folder, opened.identity(), resume=request.resume, witness=opened.witness)

        def solved(opened: Opened, room: Workspace) -> Result:
            run = begin(opened, room, executor, progress, clock)
            clock.lap("evidence")
            return target.choose(run, target.profile(run, goal), goal)

        if cut is None:
            result = solved(opened, room)
        else:
            found = cutter(cut, opened)
            clock.lap("cut")
            run = partial(Run, workspace=room, executor=executor, progress=progress, clock=clock)
            result = cut_alone(found, goal, run) if alone else best_level(found, room, solved)
        if request.recover != "none":
            built, recovery = recover(result, result.budget)
            result = replace(result, built=built, recovery=recovery)
            clock.lap("recover")
        opened.witness.check(every=True)
    done = Compressed(**vars(replace(result, timings=clock.laps)), lock=lock)
    if lock is not None:
        weakref.finalize(done, lock.release)
    else:
        # The encoded forms lie there until they are saved.
        weakref.finalize(done, shutil.rmtree, folder, ignore_errors=True)
    return done


@contextmanager
def _workspace(work: Path | None) -> Iterator[tuple[Path, Lock | None]]:
    """The folder of unfinished work and its lock; a temporary folder without one, which an error removes.

    A killed run leaves its workspace to be resumed, and a temporary one to be swept: never both.
    """
    folder = work or Path(tempfile.mkdtemp(prefix="octavo-"))
    lock = None if work is None else Lock(folder)
    try:
        yield folder, lock
    except BaseException:
        if lock is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            lock.release()
        raise


@shows_options
@with_progress
@fast_matmul()
def profile(source: Any, out: str | Path, *, progress: Shown = None, **choices: Unpack[Choices]) -> Profile:
    """Measure the curves of a source over all budgets of a target and save them in the folder ``out``.

    Other parameters are those of :func:`octavo.compress`, but for a budget. Give the folder to ``compress`` as
    ``workspace`` with ``resume``, or to :func:`plan`, to solve it for any budget.

    Raises
    ------
    RequestError
        If something about the request or the source cannot be served, or it states a budget.

    Examples
    --------
    >>> import octavo, torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
    >>> found = octavo.profile(net, "measured", methods=["rtn"], progress=False)
    >>> [curve.site for curve in found.curves]
    ['0.weight', '2.weight']
    """
    request = request_of(source, choices)
    target = get_target(request.target)
    target.refuse(request)
    refuse_cut(request)
    stated = [name for name in request.made(Role.BUDGET, Role.AFTER) if name != "shape"]
    if stated or request.plan is not None:
        raise RequestError(f"a profile is of all budgets: leave {', '.join(stated or ['plan'])} out, and plan it later")
    opened = open_request(request, target, callback(progress), work=Path(out) if request.resume else None)
    target.prepare(opened, None, Path(out))
    with Lock(out), opened.witness.blamed(), executors.executor(request.executor) as executor:
        room = Workspace(Path(out), opened.identity(), resume=request.resume, witness=opened.witness)
        found = target.profile(begin(opened, room, executor, callback(progress)), None)
        room.write_json(_REQUEST, request.saved())
        opened.witness.check(every=True)
    warn(by_kind(room.damaged, ()), _DEPTH)
    return found


def saved_choices(folder: str | Path) -> dict[str, Any]:
    """The choices with which a saved profile was made.

    Raises
    ------
    RequestError
        If the folder holds no finished profile.
    """
    file = checked(folder) / _REQUEST
    try:
        return unsealed_json(file.parent, file.name, file.read_bytes())
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"{folder}: not a finished profile, {_REQUEST} cannot be read: {reason(error)}") from error


def plan(folder: str | Path, **budget: Any) -> Plan:
    """Solve a saved profile for a budget; no weights are read.

    Parameters
    ----------
    folder
        What :func:`profile` wrote.
    budget
        One of ``ratio``, ``size`` and ``bits``, as for :func:`octavo.compress`.

    Raises
    ------
    RequestError
        If the budget is stated wrongly, or the profile's target has no plans without a model.
    BudgetError
        If the budget cannot be reached.

    Examples
    --------
    >>> import octavo, torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
    >>> found = octavo.profile(net, "curves", methods=["rtn"], progress=False)
    >>> plan = octavo.plan("curves", ratio=4)
    >>> plan.bytes <= plan.budget.bytes
    True
    """
    saved = Profile.load(Path(folder) / "profile.json")
    target = get_target(saved.options["target"])
    request = request_of(None, budget)
    target.refuse(request)
    return target.plan(saved, request)


@dataclass(frozen=True)
class Reached:
    """What was reached at one budget of a frontier.

    Parameters
    ----------
    asked
        The budget: a ratio, or a speedup for speed.
    ratio
        Original bytes over what the budget counts.
    budget, bytes, used
        Bytes that were allowed and that the artifact takes, and the share of the budget that was used.
    quality, uniform
        Mean divergence on held-out data, and that of the best uniform plan at the same bytes.
    winner
        The label of the best plan.
    families
        Quality of the best plan of every single family at the same bytes, if asked for.
    more
        Figures that the target adds.
    error, limit
        Why the budget cannot be reached, and the largest that can; everything else is None then.
    """

    asked: float
    ratio: float | None = None
    budget: int | None = None
    bytes: int | None = None
    used: float | None = None
    quality: float | None = None
    uniform: float | None = None
    winner: str | None = None
    families: dict[str, float] | None = None
    more: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    limit: float | None = None


@shows_options
@with_progress
def frontier(
    source: Any, ratios: Sequence[float], *, families: bool = False, progress: Shown = None, **choices: Unpack[Choices]
) -> list[Reached]:
    """Build and measure a compression at each of several budgets; what they have in common is measured once.

    Parameters
    ----------
    ratios
        Ratios to build; speedups for ``target="speed"``.
    families
        Also build the best plan of every single family at the same bytes.
    choices
        Other keyword arguments of :func:`octavo.compress`. ``workspace`` is the folder for the profile, which is made
        once; one that is there is used.

    Returns
    -------
    list of Reached
        One for each budget, also for those that cannot be reached.

    Raises
    ------
    RequestError
        If something about the request cannot be served.
    BudgetError
        If none of the budgets can be reached.

    Examples
    --------
    >>> import octavo, torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
    >>> rows = octavo.frontier(net, [3, 4], workspace="steps", methods=["rtn"], progress=False)
    >>> [row.ratio >= row.asked for row in rows]
    [True, True]
    """
    request = replace(request_of(source, choices), resume=True)
    target = get_target(request.target)
    target.refuse(request)
    if request.workspace is None:
        raise RequestError("workspace: a frontier keeps its profile there; name a folder")
    if not ratios:
        raise RequestError(f"ratios: give at least one {target.budget[0]}, such as 8")
    asked = [request.asked(**{target.budget[0]: budget}) for budget in ratios]
    for one in asked:
        # Before anything is measured.
        target.stated(one)
    profile(replace(request, workspace=None), request.workspace, progress=progress)
    rows, errors = [], []
    for one, value in zip(asked, ratios, strict=True):
        try:
            rows.append(_reached(compress(one, progress=progress), value, families=families))
        except BudgetError as error:
            errors.append(error)
            rows.append(Reached(value, error=str(error), limit=error.limit))
    if len(errors) == len(rows):
        raise errors[-1]
    return rows


def _reached(done: Result, asked: float, *, families: bool) -> Reached:
    target = done.opened.target
    assert isinstance(target, Target)
    return Reached(
        asked,
        done.ratio,
        done.budget.bytes,
        done.built.bytes,
        done.built.counted / done.budget.bytes,
        done.built.quality,
        done.rival.quality if done.rival else None,
        done.built.plan.label,
        _families(done) if families else None,
        dict(target.row(done)),
    )


def _families(done: Result) -> dict[str, float]:
    """Measured quality of the best plan of every single family at the same bytes."""
    plans = single_families(done.profile, done.budget)
    return {plan.notes[0]: finish(done.run, done.profile, plan, done.budget).quality for plan in plans}
