"""Saving what was trained: forms of weights become an artifact, as they are or compressed further."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from octavo.allocation.budget import Budget
from octavo.allocation.formed_source import with_forms
from octavo.allocation.opened import Opened, Run
from octavo.allocation.plans import MIXED, Plan
from octavo.allocation.profiles import Profile
from octavo.allocation.workspace import Workspace
from octavo.calibration.calibrating import Calibration
from octavo.calibration.inputs import model_of
from octavo.encoding.finish import Built
from octavo.encoding.result import Result
from octavo.errors import RequestError
from octavo.forms import Form
from octavo.forms.leaves import dense_leaves, on_device
from octavo.methods import DATA_FREE, Method
from octavo.methods.selecting import dense_method
from octavo.opening import open_request
from octavo.pipeline import compressed
from octavo.report import Report
from octavo.request import Choices, Request, Role, request_of, shows_options
from octavo.saving import check_writable, save_result
from octavo.sources.modules import unwrapped
from octavo.sources.narrowing import Narrowing
from octavo.sources.pretrained import adopt, is_pretrained
from octavo.sources.sites import Layout, Site
from octavo.sources.source import Source, from_module
from octavo.system.matmul import fast_matmul
from octavo.system.notes import warn
from octavo.system.progress import Progress, Shown, callback, with_progress
from octavo.targets.disk import Disk
from octavo.training import HandOver, forms_of
from octavo.training.formed import layouts_of, plain_copy

#: Forms or tensors by name, alone or beside the module whose parameters they are.
Trained = nn.Module | Mapping[str, Form | Tensor] | tuple[nn.Module, Mapping[str, Form] | HandOver]

#: Frames between the verb and its caller, its own and that of its decorator.
_DEPTH = 3
_BUDGET = ("ratio", "size", "bits")
#: Choices that mean something where nothing is compressed further: what is measured, and on what.
_MEASURED = ("data", "forward_args", "objective")


@shows_options
@with_progress
def save(
    trained: Trained,
    path: str | Path,
    *,
    layouts: Mapping[str, Layout] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    report: bool = True,
    progress: Shown = None,
    **choices: Unpack[Choices],
) -> Report:
    """Write what was trained as an artifact, in the forms in which it was trained.

    Without a budget everything is stored without loss. With one, the parts of the forms (factors, cores, kept values,
    dictionaries) and all other weights are compressed further, as :func:`octavo.compress` does with matrices. The
    artifact is written aside, read back and measured before it gets its name.

    Parameters
    ----------
    trained
        A module, whose weights may still be computed from forms (:func:`octavo.training.formed`); a pair of a module
        and what was handed over, forms by the name of a parameter or a :class:`octavo.training.HandOver`; or only forms
        and tensors by name. The module is not changed.
    path
        The folder to write.
    layouts
        How weights are read as matrices, where forms are not of the usual one, as for :func:`octavo.training.formed`.
    dtype
        What floats are rounded to, such as ``torch.float16``; without a budget only.
    overwrite
        Whether a folder that is not empty is replaced.
    report
        Whether ``report.html`` and ``report.json`` are written beside the artifact.
    progress
        As for :func:`octavo.compress`.
    choices
        Other keyword arguments of :func:`octavo.compress`. A ratio counts the bytes of the dense weights, at their
        stored precision. Without a budget only ``data``, ``forward_args`` and ``objective``, which the report's quality
        is measured by: the distance of the artifact from the module that computes with the given forms.

    Returns
    -------
    Report
        As from :meth:`octavo.Compressed.save`.

    Raises
    ------
    RequestError
        If a name is not that of a parameter, a form does not fit it or is not finite, or the folder or a choice cannot
        be served.
    BudgetError
        If the budget cannot be reached; its ``limit`` is the largest that can.

    Examples
    --------
    >>> import octavo, torch
    >>> from octavo.forms import Dense, LowRank
    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
    >>> factors = LowRank(Dense(torch.randn(64, 8)), Dense(torch.randn(8, 64)))
    >>> report = octavo.save((net, {"0.weight": factors}), "trained", ratio=4, progress=False)
    >>> report.artifact.ratio >= 4, octavo.Artifact("trained").form("0.weight").name
    (True, 'lowrank')
    """
    asked = request_of(None, choices)
    budgeted = {name: choices[name] for name in _BUDGET if choices.get(name) is not None}  # type: ignore[literal-required]
    command = f"octavo.save(trained, path{''.join(f', {name}={value!r}' for name, value in budgeted.items())})"
    _check(asked, dtype, budgeted=bool(budgeted))
    check_writable(Path(path), overwrite=overwrite)
    source = _source_of(trained, layouts, dtype)
    if budgeted:
        with fast_matmul():
            done = compressed(asked.asked(source=source), callback(progress))
        warn(done.notes, _DEPTH)
        return save_result(done, path, overwrite=overwrite, report=report, progress=progress, command=command)
    with tempfile.TemporaryDirectory(prefix="octavo-") as folder:
        result = _as_given(asked.asked(source=source), Path(folder), callback(progress))
        warn(result.notes, _DEPTH)
        return save_result(result, path, overwrite=overwrite, report=report, progress=progress, command=command)


def _check(asked: Request, dtype: torch.dtype | None, *, budgeted: bool) -> None:
    """Refuse choices that mean nothing here."""
    if asked.target != Disk.name:
        raise RequestError(
            f"target: forms are stored on disk, and {asked.target!r} counts something else; leave it out"
        )
    if budgeted and dtype is not None:
        raise RequestError("dtype: with a budget every part gets a precision of its own; leave one of them out")
    odd = [name for name in asked.made(Role.BUDGET, Role.MEASURED, Role.AFTER, Role.RUN) if name not in _MEASURED]
    if odd and not budgeted:
        raise RequestError(
            f"{', '.join(odd)}: says how to compress, and without a budget everything is stored as it is; give ratio=, "
            "size= or bits= as well, or leave it out"
        )
    if dtype is not None and not dtype.is_floating_point:
        raise RequestError(f"dtype is {dtype}; give a floating one, such as torch.float16")


def _source_of(trained: Trained, layouts: Mapping[str, Layout] | None, dtype: torch.dtype | None) -> Source:
    """The source of all that was given: its forms, and tensors that have none."""
    if isinstance(trained, nn.Module):
        trained = (trained, {})
    if isinstance(trained, tuple):
        module, given = trained
        if not isinstance(module, nn.Module):
            raise RequestError(f"save: the first of the pair is {type(module).__name__}; give (module, forms)")
        return _of_module(unwrapped(module), given, layouts, dtype)
    if isinstance(trained, HandOver):
        raise RequestError("save: a hand-over needs the module whose parameters it names; give (module, handed_over)")
    if not isinstance(trained, Mapping):
        raise RequestError(
            f"save: {type(trained).__name__} cannot be stored; give a module, (module, forms), or forms by name"
        )
    return with_forms(_bare(trained), _forms(trained), layouts, dtype)


def _of_module(
    module: nn.Module, given: Mapping[str, Form] | HandOver, layouts: Mapping[str, Layout] | None, dtype: Any
) -> Source:
    if isinstance(given, HandOver):
        if given.kept:
            raise RequestError(
                f"save: units of {next(iter(given.kept))!r} are to be removed first; apply the cut to the module with "
                "Cut.apply, and save what it returns"
            )
        given = given.forms
    forms = _forms({**forms_of(module), **given})
    odd = next((name for name in given if name not in forms), None)
    if odd is not None:
        raise RequestError(
            f"save: {odd!r} is {type(given[odd]).__name__}; give forms, such as octavo.forms.Dense(matrix)"
        )
    _refresh_recurrent(module)
    copied = plain_copy(module, forms)
    source = from_module(copied, title=type(copied).__name__)
    if is_pretrained(copied):
        adopt(source, copied)
    return with_forms(source, forms, {**layouts_of(module), **(layouts or {})}, dtype)


@torch.no_grad()
def _refresh_recurrent(module: nn.Module) -> None:
    """Recurrent layers cache their weights in a list; computed ones that have a gradient could not be copied."""
    for part in module.modules():
        if isinstance(part, nn.RNNBase):
            # Moving them to where they are renews the list.
            part.to(next(part.parameters()).device)


def _forms(given: Mapping[str, Any]) -> dict[str, Form]:
    """The forms among what was given, on the CPU, where they are coded."""
    here = torch.device("cpu")
    return {name: on_device(value, here) for name, value in given.items() if isinstance(value, Form)}


def _bare(given: Mapping[str, Form | Tensor]) -> Source:
    """A source of forms and tensors without a module."""
    odd = next((name for name, value in given.items() if not isinstance(value, Form | Tensor)), None)
    if odd is not None or not given:
        what = "nothing was given" if odd is None else f"{odd!r} is {type(given[odd]).__name__}"
        raise RequestError(f"save: {what}; give forms or tensors by name")

    def dtype_of(value: Form | Tensor) -> torch.dtype:
        return value.dtype if isinstance(value, Tensor) else _dtype_of(value)

    return Source(
        title="weights",
        path=None,
        shapes={name: tuple(value.shape) for name, value in given.items()},
        dtypes={name: dtype_of(value) for name, value in given.items()},
        aliases={},
        read=lambda name: given[name].detach().cpu(),  # type: ignore[union-attr]
    )


def _dtype_of(form: Form) -> torch.dtype:
    """The dtype in which a form was trained."""
    leaves = dense_leaves(form)
    return leaves[0].dtype if leaves else torch.float32


class _AsGiven(Disk):
    """Nothing is compressed."""

    folds = False
    compresses = False

    def methods(self, request: Request) -> list[Method]:
        return [dense_method()]

    def preset(self, request: Request) -> str:
        return request.preset if request.data is not None else DATA_FREE

    def admitted(self, source: Source, sites: list[Site], left: dict[str, str]) -> tuple[list[Site], dict[str, str]]:
        return [], {**{site.name: "no budget was given" for site in sites}, **left}


def _as_given(request: Request, folder: Path, progress: Progress) -> Result:
    """The result of compressing nothing."""
    opened: Opened = open_request(request, _AsGiven(), progress)
    source, contents = opened.source, opened.assembly.contents({}, Narrowing.EXACT)
    model = None if source.module is None else model_of(source, blockwise=False)
    room = Workspace(folder / "work", opened.identity(), resume=False)
    with_no_evidence = Calibration({}, text=opened.text)
    run = Run(opened, model, with_no_evidence, room, None, progress)  # type: ignore[arg-type]
    total, asked = contents.bytes, Budget(contents.bytes, "none")
    profile = Profile(source.title, source.fingerprint(), source.original_bytes, source.weights, total, [])
    built = Built(Plan(asked, {}, 0.0, total, MIXED), {}, contents, total, total, 0.0)
    return Result(run, profile, asked, built)
