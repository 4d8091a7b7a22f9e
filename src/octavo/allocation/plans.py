"""Plans, and the YAML files in which they are read and edited."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from octavo.allocation.budget import Budget
from octavo.allocation.profiles import Point
from octavo.errors import RequestError
from octavo.methods import get_method
from octavo.system.atomic import write_file
from octavo.system.paths import checked, checked_output, reason
from octavo.system.replacing import check_file

#: Labels of plans that do not use one setting everywhere.
MIXED, ONE_FAMILY, EDITED = "mixed", "one family", "edited"
#: Version of the files.
_FORMAT = 1
_HEAD = """\
# One entry a site. Change a method or a setting and run: octavo compress SOURCE --plan THIS --out DIR
# As it is, its continuous settings are moved until the artifact uses the budget; once changed, it is kept as it is.
"""


@dataclass
class Plan:
    """The chosen point of every site.

    Parameters
    ----------
    points
        Site name to point. The exact bytes of an estimated point are known once it is encoded.
    label
        :data:`MIXED`, :data:`ONE_FAMILY`, :data:`EDITED`, or the uniform choice.
    fingerprint
        Fingerprint of the source that the plan was made for; empty if unknown.
    pinned
        Sites whose form the user chose.
    origin
        Where the plan is from, for messages.
    """

    budget: Budget
    points: dict[str, Point]
    expected: float
    fixed_bytes: int
    label: str = MIXED
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ""
    pinned: tuple[str, ...] = ()
    origin: str = "the plan"

    @property
    def bytes(self) -> int:
        """Expected artifact bytes."""
        return self.fixed_bytes + sum(point.bytes for point in self.points.values())

    @property
    def is_uniform(self) -> bool:
        """Whether the plan uses one setting everywhere."""
        return self.label not in (MIXED, ONE_FAMILY, EDITED)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write as readable, editable YAML. An existing file may be edited, so only ``overwrite`` replaces it."""
        path = check_file(checked_output(path), overwrite=overwrite)
        sites = {
            name: {"method": p.method, "setting": dict(p.setting), "bytes": p.bytes, "loss": float(f"{p.loss:.4g}")}
            for name, p in self.points.items()
        }
        data = {
            "octavo_plan": _FORMAT,
            "asked": self.budget.asked,
            "budget": self.budget.bytes,
            "target": self.budget.target,
            "label": self.label,
            "source": self.fingerprint,
            "digest": _digest(self.budget, self.points),
            "pinned": list(self.pinned),
            "sites": sites,
        }
        write_file(path, (_HEAD + yaml.safe_dump(data, sort_keys=False)).encode())


def _digest(budget: Budget, points: Mapping[str, Point]) -> str:
    """A digest of a plan's content: a file with another digest was edited."""
    choices = {name: [point.method, point.setting] for name, point in points.items()}
    text = json.dumps([budget.bytes, budget.target, choices], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_plan(path: Path, sites: Iterable[str]) -> Plan:
    """Read a plan; it must name each of the ``sites`` and nothing else.

    It is labelled :data:`EDITED` if its choices or budget differ from those saved. The bytes of tensors that are not
    sites are not in the file.

    Raises
    ------
    RequestError
        If the file is not a plan, or a site is missing or unknown, or a method is unknown.
    """
    try:
        data = yaml.safe_load(checked(path).read_text(encoding="utf-8"))
        if data["octavo_plan"] != _FORMAT:
            raise ValueError(f"octavo_plan is {data['octavo_plan']!r}; this version reads {_FORMAT}")
        points = {str(name): _point(entry) for name, entry in data["sites"].items()}
        asked, target = data["asked"], data.get("target", "disk")
        if not isinstance(asked, str) or not isinstance(target, str):
            raise TypeError("'asked' and 'target' must be strings")
        budget = Budget(int(data["budget"]), asked, target)
        label = MIXED if data.get("digest") == _digest(budget, points) else EDITED
        pinned = tuple(str(name) for name in data.get("pinned", ()))
        source = str(data.get("source", ""))
        plan = Plan(budget, points, math.nan, 0, label, fingerprint=source, pinned=pinned, origin=str(path))
    except RequestError:
        raise
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RequestError(f"{path}: not a plan: {reason(error)}") from error
    except RecursionError as error:
        raise RequestError(f"{path}: not a plan: its values are nested too deeply") from error
    known = set(sites)
    for name in sorted(known ^ set(points)):
        if name in known:
            raise RequestError(f"{path}: site {name!r} is missing; add it, or exclude it with --ignore")
        raise RequestError(f"{path}: site {name!r} is not in the source, or is ignored; remove it")
    for name, point in points.items():
        try:
            get_method(point.method).refuse_unknown(point.setting)
        except RequestError as error:
            raise RequestError(f"{path}: site {name!r}: {error}") from error
    return plan


def _point(entry: Any) -> Point:
    return Point(
        str(entry["method"]), dict(entry["setting"]), int(entry.get("bytes", 0)), float(entry.get("loss", 0)), True
    )
