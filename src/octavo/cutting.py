"""Compressing with a cut: units go before forms are found, and change shapes.

A cut named alone removes as many units as the budget asks for, and nothing is encoded. Beside methods a few levels of
it are tried: forms are solved under each, and the one with the lowest measured loss at the budget is kept. The source
as it is takes part as the level of nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from octavo.allocation.encoded import seal
from octavo.allocation.opened import Opened, Run
from octavo.allocation.plans import Plan
from octavo.allocation.profiles import Profile
from octavo.allocation.solver import unreachable
from octavo.allocation.workspace import Workspace
from octavo.calibration import inputs
from octavo.calibration.calibrating import Calibration, tokens_in
from octavo.calibration.runner import Runner
from octavo.cuts import Cut, Units, removed, renumbered, saved, split_cut, without
from octavo.cuts.transformer_units import COLUMN, TOKEN
from octavo.encoding.cut_trials import CutLevel, CutTrials
from octavo.encoding.finish import measured
from octavo.encoding.result import Result
from octavo.errors import BudgetError, RequestError
from octavo.methods.selecting import dense_method
from octavo.request import Request
from octavo.sources.batches import sequences_in
from octavo.sources.memory import fits
from octavo.sources.narrowing import Narrowing
from octavo.sources.thinned import thinned
from octavo.system.modes import evaluating
from octavo.targets import TARGETS
from octavo.targets.base import Goal
from octavo.targets.sizes import SizeGoal

#: Shares of units that are tried beside methods.
LEVELS = (0.1, 0.2, 0.3)
#: The largest share that a cut alone may remove.
MOST = 0.8
#: The label of the plan of a cut alone.
ALONE = "cut"


def split_request(request: Request) -> tuple[Request, Cut[Any] | None, bool]:
    """The request without the cut that its methods name, that cut, and whether nothing else was named.

    Raises
    ------
    RequestError
        If two cuts are named, or the target counts what a cut does not change.
    """
    rest, cut = split_cut(request.methods or ())
    if cut is None:
        return request, None, False
    if not TARGETS.get(request.target).cuts:
        able = ", ".join(name for name, target in TARGETS.all().items() if target.cuts)
        raise RequestError(f"--for {request.target}: {cut.name} is a cut, which is made for {able} only")
    return replace(request, methods=rest or [dense_method()]), cut, not rest


def refuse_cut(request: Request) -> None:
    """Refuse a cut where the curves of all sites are to be kept, which are those of one shape.

    Raises
    ------
    RequestError
        Naming the cut.
    """
    _, cut = split_cut(request.methods or ())
    if cut is not None:
        raise RequestError(
            f"methods: {cut.name} is a cut, and a profile is of one shape; name it to octavo compress, or leave it out"
        )


@dataclass(frozen=True)
class Cutter:
    """A cut and what it saw of one request's model.

    Parameters
    ----------
    units
        Those whose tensors become smaller.
    scores, evidence
        What the cut says of them, and what it saw.
    """

    cut: Cut[Any]
    opened: Opened
    units: list[Units]
    scores: dict[str, Tensor]
    evidence: Any

    @property
    def module(self) -> nn.Module:
        """The model, before anything is cut."""
        assert self.opened.source.module is not None
        return self.opened.source.module

    def kept(self, share: float, fine: float) -> dict[str, Tensor]:
        """The units that stay where every place gives up a share, and those of the most numerous kind another one."""
        most = max(self.units, key=lambda part: part.count).kind
        shares = {part.name: fine if part.kind == most else share for part in self.units}
        return self.cut.keeping(self.module, self.units, self.scores, shares)

    def level(self, kept: Mapping[str, Tensor]) -> Opened:
        """The request on the source without the units that are not kept."""
        opened = self.opened
        module = self.cut.apply(self.module, kept, self.evidence)
        source, names = thinned(opened.source, module, partial(renumbered, self.units, kept))
        sites = [
            replace(
                site,
                name=names[site.name],
                shape=source.shapes[names[site.name]],
                tied=tuple(names[alias] for alias in site.tied),
            )
            for site in opened.sites
            if site.name in names
        ]
        left = {names[name]: why for name, why in opened.left.items() if name in names}
        pinned = {names[name]: choice for name, choice in opened.pinned.items() if name in names}
        notes = [*opened.notes, *(note for note in source.notes if note not in opened.notes)]
        return replace(opened, source=source, sites=sites, left=left, pinned=pinned, notes=notes)

    def tried(
        self, share: float, kept: Mapping[str, Tensor], alone: float | None, quality: float | None = None
    ) -> CutLevel:
        """The record of a level."""
        gone: dict[str, tuple[int, int]] = {}
        for part in self.units:
            went, total = gone.get(part.kind, (0, 0))
            lost = int((~kept[part.name]).sum()) if part.name in kept else 0
            gone[part.kind] = (went + lost, total + part.count)
        return CutLevel(share, saved(self.module, self.units, kept), alone, quality, gone)

    def trials(self, levels: list[CutLevel], kept: float) -> CutTrials:
        """The record of what was tried."""
        return CutTrials(self.cut.name, self.cut.source, self.opened.source.weights, tuple(levels), kept)


def cutter(cut: Cut[Any], opened: Opened) -> Cutter:
    """Observe the model of a request.

    Raises
    ------
    RequestError
        If the cut does not know the model, or there is no model, no data, or no memory for it as a whole.
    """
    source, where = opened.source, opened.source.path or opened.source.title
    if source.module is None or (cut.needs_data and not opened.measurable):
        wanted = "a model that runs and data for it" if cut.needs_data else "a model whose units it knows"
        raise RequestError(
            f"{where}: {cut.name} needs {wanted} (data: {opened.text}); give "
            f"{'both' if cut.needs_data else 'one'}, or leave the cut out"
        )
    if not fits(source, opened.memory):
        raise RequestError(
            f"{where}: {cut.name} needs the whole model in memory, where it does not fit; leave the cut out"
        )
    inputs.model_of(source, blockwise=False)
    cut = cut.prepared(opened.objective, opened.calibration_data)
    units = [part for part in cut.units(source.module) if part.resizes]
    if any(part.kind == TOKEN for part in units):
        raise RequestError(
            f"{where}: {cut.name} would remove rows of the token table, which changes the numbers of tokens, and the "
            "tokenizer with them; leave that kind out, or cut the module with octavo.cuts"
        )
    if not units:
        raise RequestError(
            f"{where}: {cut} leaves zeros in place of what it removes, which saves no bytes by itself; let it remove "
            "units whose tensors become smaller"
        )
    _check_outputs(opened, units, where)
    evidence = cut.observe(source.module, opened.calibration_data)
    return Cutter(cut, opened, units, cut.scores(source.module, units, evidence), evidence)


def _check_outputs(opened: Opened, units: list[Units], where: object) -> None:
    """Refuse columns where the model returns them: outputs of unequal width cannot be compared."""
    module = opened.source.module
    if module is None or not opened.held_data:
        # Without data nothing is compared.
        return
    batch = opened.held_data[0]
    for part in units:
        if part.kind == COLUMN:
            # In training mode a pass would change the statistics of batch norms.
            with evaluating(module), torch.no_grad():
                thinner = without(module, [part], {part.name: torch.arange(part.count) > 0})
                shapes = [opened.objective.outputs(one, batch).shape for one in (module, thinner)]
            if shapes[0] != shapes[1]:
                raise RequestError(
                    f"{where}: columns are what the model returns, {tuple(shapes[0])}, so its outputs could not be "
                    "compared without some of them; leave that kind out, or give a model with a head"
                )


def cut_alone(found: Cutter, goal: Goal, run: Callable[[Opened, Runner, Calibration], Run]) -> Result:
    """The source with as many units removed as the budget asks for, every tensor stored as it is.

    Parameters
    ----------
    run
        Makes a run of an opened request, its model and its evidence.

    Raises
    ------
    RequestError
        If the request also says how sites are stored.
    BudgetError
        If the units do not weigh enough.
    """
    if found.opened.pinned:
        raise RequestError(
            f"keep: {found.cut.name} alone stores every tensor as it is; leave keep out, or name methods beside the cut"
        )
    reasons = {site.name: "ignored: only a cut was asked for" for site in found.opened.sites}
    found = replace(found, opened=replace(found.opened, sites=[], left={**found.opened.left, **reasons}))
    assert isinstance(goal, SizeGoal)
    asked, most = goal.budget, max(part.count for part in found.units)
    left = partial(_bytes_left, found, seal(found.opened, {}, Narrowing.EXACT).bytes)

    def fits(share: int, fine: int) -> bool:
        return left(found.kept(share / most, fine / most)) <= asked.bytes

    count = bisect_left(range(int(MOST * most) + 1), True, key=lambda number: fits(number, number))
    # Units such as heads are few and large. Those of the most numerous kind use what these leave of the budget.
    fine = bisect_left(range(count), True, key=lambda number: fits(count, number))
    last: dict[str, Tensor] = {}
    while (share := count / most) <= MOST:
        kept = found.kept(share, fine / most)
        if not _alike(kept, last):
            thin = found.level(kept)
            contents = seal(thin, {}, Narrowing.EXACT)
            if contents.bytes <= asked.bytes:
                break
        # Checksums in the manifest have more digits.
        last, count, fine = kept, max(count, fine + 1), fine + 1
    else:
        raise unreachable(asked, found.opened.source.original_bytes, left(found.kept(MOST, MOST)))
    source = thin.source
    profile = Profile(source.title, source.fingerprint(), source.original_bytes, source.weights, contents.bytes, [])
    started = run(thin, inputs.model_of(source, blockwise=False), _seen(thin))
    built = measured(started, profile, Plan(asked, {}, 0.0, contents.bytes, ALONE), {}, contents)
    alone, quality = (started.at_rest, built.quality) if thin.measurable else (None, None)
    level = found.tried(share, kept, alone, quality)
    return Result(started, profile, asked, built, cut=found.trials([level], share))


def _alike(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _seen(opened: Opened) -> Calibration:
    """What a cut rests on; no site has evidence where nothing is encoded."""
    data = opened.calibration_data
    return Calibration({}, sum(map(sequences_in, data)), sum(map(tokens_in, data)), opened.text)


def _bytes_left(found: Cutter, whole: int, chosen: Mapping[str, Tensor]) -> int:
    """Bytes of the artifact of a cut alone, to a few digits in its manifest."""
    kept = found.opened.assembly.kept(Narrowing.EXACT)
    stored = {target: kept[name].stored for name, target in found.opened.source.direct.items() if name in kept}
    gone = removed(found.module, found.units, chosen)
    return whole - sum(number * stored[name].itemsize for name, number in gone.items())


def best_level(found: Cutter, room: Workspace, solved: Callable[[Opened, Workspace], Result]) -> Result:
    """The best of a few levels at one budget, by the loss measured on held-out data.

    Parameters
    ----------
    solved
        Runs an opened request in a folder of work and chooses its plan.

    Raises
    ------
    RequestError
        If there is no data to compare levels by.
    BudgetError
        If no level reaches the budget.
    """
    if not found.opened.measurable:
        raise RequestError(
            f"methods: beside other methods the best level of {found.cut.name} is found by measuring, which needs data "
            f"(data: {found.opened.text}); give data, or name the cut alone"
        )
    levels: list[CutLevel] = []
    reached: dict[float, Result] = {}
    refused: list[BudgetError] = []
    for share in (0.0, *LEVELS):
        kept = found.kept(share, share) if share else {}
        opened = found.level(kept) if share else found.opened
        alone = _divergence(opened) if share else 0.0
        level = found.tried(share, kept, alone)
        levels.append(level)
        if alone >= min((result.built.quality for result in reached.values()), default=alone + 1):
            # Deeper ones lose more still.
            break
        try:
            identity = {**opened.identity(), "cut": repr(found.cut)}
            reached[share] = solved(opened, room.part(f"cut-{share:g}", identity) if share else room)
        except BudgetError as error:
            refused.append(error)
            continue
        levels[-1] = replace(level, quality=reached[share].built.quality)
    if not reached:
        raise max(refused, key=lambda error: error.limit or 0.0)
    share = min(reached, key=lambda share: reached[share].built.quality)
    return replace(reached[share], cut=found.trials(levels, share))


def _divergence(opened: Opened) -> float:
    """What a cut costs before anything is encoded."""
    model = inputs.model_of(opened.source, blockwise=False)
    return float(model.measure(opened.held_data, opened.objective, {}).mean())
