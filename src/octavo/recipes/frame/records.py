"""What a run of a study has found: arms, choices and bases; and how they are kept while it is not whole."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Arm:
    """One of the compared variants.

    Parameters
    ----------
    name
        The treatment and its size.
    bytes
        Bytes of the artifact's files, the mean over seeds; 0 if nothing is stored.
    values
        The study's metric, one value per seed.
    also
        Other figures by name, one value per seed each.
    steps
        Training steps that led to it, those of its base included.
    """

    name: str
    bytes: int
    values: tuple[float, ...]
    also: Mapping[str, tuple[float, ...]]
    steps: int = 0

    @property
    def mean(self) -> float:
        """Mean over all seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds, None of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def shown(self) -> str:
        """Mean and spread, for texts."""
        return f"{self.mean:.4g}" if self.spread is None else f"{self.mean:.4g} ± {self.spread:.2g}"


@dataclass(frozen=True)
class Choice:
    """A knob that was chosen on development data.

    Parameters
    ----------
    name
        What was chosen, and for which arm.
    value
        The winner.
    scores
        Development figure by the value that was tried; None where training diverged.
    edge
        Whether the winner lies at the edge of everything that was tried.
    """

    name: str
    value: float
    scores: Mapping[str, float | None]
    edge: bool


@dataclass(frozen=True)
class BaseRecord:
    """A trained model that a study started from.

    Parameters
    ----------
    name
        Its name and the key of its cache: code, data and settings.
    seconds
        How long it took to make, on ``device``.
    """

    name: str
    seconds: float
    device: str


@dataclass
class Found:
    """Everything that a run has recorded so far, but for its verdicts, which come last.

    Parameters
    ----------
    rows
        By arm, for every seed: the metric, bytes, and other figures by name.
    steps
        Training steps by arm and seed.
    choices, bases
        By name.
    seeds, seconds
        How many seeds are done, and how long that took.
    """

    rows: dict[str, list[tuple[float, int, dict[str, float]]]] = field(default_factory=dict)
    steps: dict[tuple[str, int], int] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    bases: dict[str, BaseRecord] = field(default_factory=dict)
    seeds: int = 0
    seconds: float = 0.0

    def to_json(self) -> bytes:
        """As a file holds it."""
        state = {
            "rows": self.rows,
            "steps": [[*key, count] for key, count in self.steps.items()],
            "choices": [asdict(choice) for choice in self.choices.values()],
            "bases": {name: asdict(base) for name, base in self.bases.items()},
            "seeds": self.seeds,
            "seconds": self.seconds,
        }
        return json.dumps(state).encode()

    @classmethod
    def from_json(cls, text: str) -> Found:
        """The inverse of :meth:`to_json`."""
        state = json.loads(text)
        return cls(
            {arm: [(value, size, also) for value, size, also in rows] for arm, rows in state["rows"].items()},
            {(arm, seed): count for arm, seed, count in state["steps"]},
            {choice["name"]: Choice(**choice) for choice in state["choices"]},
            {name: BaseRecord(**base) for name, base in state["bases"].items()},
            state["seeds"],
            state["seconds"],
        )

    @property
    def arms(self) -> dict[str, Arm]:
        """All arms by name."""
        found = {}
        for name, rows in self.rows.items():
            values, sizes, others = zip(*rows, strict=True)
            also = {key: tuple(row[key] for row in others if key in row) for row in others for key in row}
            steps = max((count for (arm, _), count in self.steps.items() if arm == name), default=0)
            found[name] = Arm(name, round(statistics.fmean(sizes)), values, also, steps)
        return found
