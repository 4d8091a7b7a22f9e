"""A run: mutants made, loaded and judged by a few processes, and their counts."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from fuzzing import around, blobs, bombs, damage, headers, trees  # noqa: F401  (they register their mutations)
from fuzzing.cell import MORE, TIMES, Case, Load, load
from fuzzing.draft import MUTATIONS, Draft, Inapplicable, Mutation
from fuzzing.seeds import Seed
from fuzzing.views import Honest

#: Verdicts that no mutant may have.
FAILURES = ("crash", "timeout", "memory", "raw", "silent", "unfilled", "escape")
#: From the best to the worst.
ORDER = ("refused", "foreign", "same", "changed", "told", *reversed(FAILURES))
#: Mutants that are loaded by one process, unless one of them ends it.
_TOGETHER = 16
#: Seeds that are tried for a change, of which few may suit it.
_TRIES = 500
#: Folders of failing mutants of one kind that are kept.
_KEPT = 2


@dataclass
class Tally:
    """What became of many mutants.

    Parameters
    ----------
    counts
        By seed, mutation and verdict.
    peak
        Most memory that a load took beyond `TIMES` times its files.
    failures
        What went wrong, by what it is: how often, and the smallest mutant.
    """

    counts: collections.Counter = field(default_factory=collections.Counter)
    peak: int = 0
    failures: dict[str, dict] = field(default_factory=dict)

    def plain(self) -> dict:
        """The same as plain JSON."""
        counts = [[*key, count] for key, count in self.counts.items()]
        return {"counts": counts, "peak": self.peak, "failures": self.failures}

    @classmethod
    def of(cls, data: dict) -> Tally:
        """Inverse of `plain`."""
        counts = collections.Counter({tuple(key): count for *key, count in data["counts"]})
        return cls(counts, data["peak"], data["failures"])

    def add(self, other: Tally) -> None:
        """Take in another tally."""
        self.counts.update(other.counts)
        self.peak = max(self.peak, other.peak)
        for key, failure in other.failures.items():
            mine = self.failures.setdefault(key, {**failure, "count": 0})
            mine["count"] += failure["count"]
            if failure["bytes"] < mine["bytes"]:
                mine.update({**failure, "count": mine["count"]})


def honest_of(seed: Seed) -> Honest:
    """What a seed gives when it is loaded; raises unless every way of loading it works."""
    views = ("state", *dict.fromkeys(seed.views))
    (found,) = load([Case(seed.folder, views, Honest({}, {}))])
    bad = {view: outcome for view, outcome in found.outcomes.items() if outcome.verdict != "same"}
    if bad:
        raise AssertionError(f"the honest artifact {seed.name} is not loaded: {bad}")
    digests = json.loads(found.outcomes["state"].detail)
    report = seed.folder / "report.json"
    written = hashlib.sha256(report.read_bytes()).hexdigest() if report.is_file() else ""
    models = ("auto", "sentences", "load")
    unfilled = {view: json.loads(found.outcomes[view].detail or "[]") for view in models if view in found.outcomes}
    return Honest(digests, unfilled, written)


@dataclass
class Mutant:
    """A mutant on disk: from which seed, by which change, and how it is loaded."""

    number: int
    seed: Seed
    kind: Mutation
    views: tuple[str, ...]
    place: Path
    size: int

    @property
    def folder(self) -> Path:
        """Where the artifact lies."""
        return self.place / "mutant"


def mutant(seeds: list[Seed], root: int, number: int) -> Mutant:
    """The mutant of a number, written."""
    rng = random.Random(f"{root}:{number}")
    kinds = list(MUTATIONS.values())
    chosen = rng.choices(kinds, [kind.weight for kind in kinds])[0]
    for _ in range(_TRIES):
        seed = rng.choice(seeds)
        draft = Draft.read(seed.folder)
        try:
            chosen.change(draft, rng)
        except (Inapplicable, KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError):
            # A change after another one finds what the first one left; it is another mutant then.
            continue
        place = Path(tempfile.mkdtemp(prefix="octavo-mutant-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        outside = chosen.name.partition(":")[0] in ("config", "companion", "index", "beside")
        views = [view for view in seed.views if not outside or view not in ("inspect", "packed")]
        made = Mutant(number, seed, chosen, ("state", rng.choice(views)), place, 0)
        made.folder.mkdir()
        draft.write(made.folder)
        made.size = sum(file.lstat().st_size for file in made.folder.rglob("*") if not file.is_dir())
        return made
    raise AssertionError(f"no seed gives room for a change of kind {chosen.name!r}")


def fuzz(
    seeds: list[Seed],
    honest: dict[str, Honest],
    root: int,
    numbers: list[int],
    keep: Path,
    seconds: float | None = None,
) -> Tally:
    """Make, load and judge mutants, until time is up if there is a limit."""
    tally, end = Tally(), time.monotonic() + (seconds or 1e9)
    for start in range(0, len(numbers), _TOGETHER):
        if time.monotonic() > end:
            break
        made = [mutant(seeds, root, number) for number in numbers[start : start + _TOGETHER]]
        try:
            cases = [Case(one.folder, one.views, honest[one.seed.name]) for one in made]
            for one, found in zip(made, load(cases), strict=True):
                judge(tally, one, found, keep)
        finally:
            for one in made:
                shutil.rmtree(one.place, ignore_errors=True)
    return tally


def _kind_of(verdict: str, detail: str) -> str:
    """What failures of one cause have in common: the type of the error and where it was raised."""
    if verdict != "raw":
        return detail[:40] if verdict != "memory" else ""
    return f"{detail.partition(':')[0]} {detail.rpartition('[')[2].rstrip(']')}"


def judge(tally: Tally, one: Mutant, found: Load, keep: Path) -> None:
    """Count what became of a mutant, and keep it if it failed."""
    number, seed, kind, folder, views, size = one.number, one.seed, one.kind, one.folder, one.views, one.size
    largest = max(found.peaks.values(), default=0)
    extra = largest - TIMES * size
    tally.peak = max(tally.peak, extra)
    verdict, view, detail = "refused", views[0], ""
    for name, outcome in found.outcomes.items():
        worse = "silent" if outcome.verdict == "changed" and not kind.alters and name == "state" else outcome.verdict
        if ORDER.index(worse) > ORDER.index(verdict):
            verdict, view, detail = worse, name, outcome.detail
    if extra > MORE and verdict not in ("crash", "timeout"):
        # The peak of a view that took none is that of the one before.
        view = next(name for name, peak in found.peaks.items() if peak == largest)
        verdict, detail = "memory", f"{largest >> 20} MB for {size} bytes; {detail}"
    tally.counts[seed.name, kind.name, verdict] += 1
    if verdict in FAILURES:
        key = f"{verdict} | {view} | {kind.name.partition(':')[0]} | {_kind_of(verdict, detail)}"
        failure = {
            "number": number,
            "seed": seed.name,
            "mutation": kind.name,
            "view": view,
            "verdict": verdict,
            "bytes": size,
            "detail": detail[:500],
        }
        known = tally.failures.setdefault(key, {**failure, "count": 0})
        known["count"] += 1
        if size < known["bytes"]:
            known.update(failure)
        if known["count"] <= _KEPT:
            kept = keep / f"{verdict}-{number}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(
                folder,
                kept,
                symlinks=True,
                ignore=lambda place, names: [
                    n
                    for n in names
                    if not (os.path.isfile(os.path.join(place, n)) or os.path.isdir(os.path.join(place, n)))
                ],
            )
            (kept / "mutant.json").write_text(json.dumps(failure, indent=1))
