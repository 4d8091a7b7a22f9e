"""The lab: what the experiments of all studies share, from trained bases to judged claims."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from octavo.errors import DivergedError, OctavoError
from octavo.forms import Dense, Form
from octavo.recipes.frame.fingerprints import code_of, joined
from octavo.recipes.frame.judging import Gap, Gate, Judged, Verdict, gap, together
from octavo.recipes.frame.records import Arm, BaseRecord, Choice, Found
from octavo.recipes.frame.stored import Stored, quantized, through_file
from octavo.recipes.frame.study import Study
from octavo.sources.sites import Layout
from octavo.system.atomic import write_file, writing
from octavo.system.matmul import coarse_matmul, multiplies_bfloat16
from octavo.training import fit
from octavo.training.losses import LossFunction

#: The folder of trained models and other slow work of studies.
CACHE = Path(os.environ.get("OCTAVO_CACHE", Path.home() / ".cache" / "octavo")) / "recipes"
#: How often a grid may grow beyond its edge.
WIDENED = 3


class UnreachedError(OctavoError):
    """No value of a knob gives a file of the asked size."""


@dataclass
class Lab:
    """One run of a study.

    A study calls :meth:`base` for its trained model, :meth:`choose` for rates, :meth:`train` for every arm, :meth:`fit`
    for arms of equal bytes, :meth:`add` for every figure, and at the end :meth:`gate` and :meth:`judge`.

    Parameters
    ----------
    quick
        Whether to run a miniature: the same code on tiny real data, whose figures prove nothing.
    show
        Called with a description of the current step.
    device
        Where models are trained; everything else happens on the CPU.
    """

    study: Study
    quick: bool = False
    first_seed: int = 0
    show: Callable[[str], Any] = lambda text: None
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def __post_init__(self) -> None:
        self.found = Found()
        self.gates: list[Gate] = []
        self.judged: dict[str, Judged] = {}
        self.reason: list[str] = []
        self._started, self._earlier = time.perf_counter(), 0.0

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the study, or one in a quick run."""
        return tuple(range(self.first_seed, self.first_seed + (1 if self.quick else self.study.seeds)))

    def each_seed(self) -> Iterator[int]:
        """The seeds one after another; a full run that was stopped goes on after the last seed that was done.

        For studies that keep nothing of their own from one seed to the next. What the lab found so far is kept under
        the code of the study until the run is whole.
        """
        if not self.quick and self._kept.exists():
            self.found = Found.from_json(self._kept.read_text(encoding="utf-8"))
            self._earlier = self.found.seconds
            self.step(f"{self.found.seeds} of {len(self.seeds)} seeds are done; to start over remove {self._kept}")
        for seed in self.seeds[self.found.seeds :]:
            yield seed
            self.found.seeds += 1
            self.found.seconds = self.seconds
            if not self.quick:
                write_file(self._kept, self.found.to_json())

    def forget(self) -> None:
        """Remove what was kept for a run that is whole now."""
        if not self.quick:
            self._kept.unlink(missing_ok=True)

    @property
    def _kept(self) -> Path:
        """The file of a run that is not whole yet; it depends on code, seeds and device."""
        key = joined({**code_of(self.study.run), "first": str(self.first_seed), "device": self.trained_on})
        return self.cached(f"{self.study.name}-{key}.json")

    @property
    def seconds(self) -> float:
        """How long the run took so far, parts that were stopped included."""
        return self._earlier + time.perf_counter() - self._started

    @property
    def bases(self) -> dict[str, BaseRecord]:
        """The trained models so far, by name."""
        return self.found.bases

    @property
    def choices(self) -> dict[str, Choice]:
        """What was chosen so far, by name."""
        return self.found.choices

    @property
    def arms(self) -> dict[str, Arm]:
        """Everything recorded so far, by name."""
        return self.found.arms

    @property
    def trained_on(self) -> str:
        """The name of the lab's device, and whether :meth:`train` multiplies in bfloat16 there."""
        return self._trains_on(self.study.coarse)

    def _trains_on(self, coarse: bool) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return f"{name} in bfloat16" if coarse and multiplies_bfloat16(self.device.type) else name

    def step(self, text: str) -> None:
        """Say what happens now."""
        self.show(text)

    # Models

    def base(
        self,
        name: str,
        make: Callable[[], nn.Module],
        train: Callable[[nn.Module], Any],
        *,
        data: str,
        coarse: bool = False,
        **settings: Any,
    ) -> nn.Module:
        """A model that is trained once, and kept under the hash of code, data and settings.

        Parameters
        ----------
        make, train
            Return the untrained model, and train it in place. Their modules and what these import are the code.
        data
            A digest of the training data.
        coarse
            Whether it is trained with products in bfloat16, where the device multiplies so natively.
        settings
            Everything else that determines the weights, the seed included: plain values.
        """
        key = joined({**code_of(make, train), "data": data, "settings": json.dumps(settings, sort_keys=True)})
        file = self.cached(f"{name}-{key}.safetensors")
        model = make()
        if file.exists():
            model.load_state_dict(load_file(file))
            with safe_open(file, "pt") as opened:
                known = opened.metadata() or {}
        else:
            self.step(f"training {name}")
            started = time.perf_counter()
            with coarse_matmul(self.device.type, wanted=coarse):
                train(model)
            model.to("cpu")
            known = {"seconds": f"{time.perf_counter() - started:.1f}", "device": self._trains_on(coarse)}
            with writing(file) as aside:
                state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
                save_file(state, aside, metadata=known)
        self.found.bases[name] = BaseRecord(f"{name} ({key})", float(known.get("seconds", 0)), known.get("device", ""))
        return model.eval()

    def cached(self, name: str) -> Path:
        """A file kept between runs; quick runs use a separate folder."""
        folder = CACHE / ("quick" if self.quick else "full")
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def train(
        self,
        model: nn.Module,
        batches: Callable[[int], Iterable[Any]],
        loss: LossFunction,
        *,
        steps: int,
        seed: int,
        arm: str | None = None,
        before: int = 0,
        epochs: int = 1,
        **options: Any,
    ) -> nn.Module:
        """Train a model in place on the lab's device; returns it on the CPU.

        Parameters
        ----------
        batches
            The batches of an epoch by its number; as many epochs are drawn as ``steps`` need.
        arm
            The arm that this training is part of; None for trials. The steps of an arm add up, and all trained arms
            must have as many in the end.
        before
            Steps that the model had already, in its base.
        epochs
            How often the regimen's ``after_epoch`` is called.
        options
            As for :func:`octavo.training.fit`.
        """
        each = max(1, steps // epochs)

        def part(epoch: int) -> Iterator[Any]:
            for batch in itertools.islice(_endless(batches, epoch * steps), each):
                yield tree_map(lambda part: part.to(self.device) if isinstance(part, Tensor) else part, batch)

        model.to(self.device)
        with coarse_matmul(self.device.type, wanted=self.study.coarse):
            fit(model, part, loss, epochs=epochs, seed=seed, **options)
        if arm is not None:
            self.found.steps[arm, seed] = self.found.steps.get((arm, seed), 0) + before + each * epochs
        return model.to("cpu").eval()

    # Choices

    def choose(
        self, name: str, score: Callable[[float], float], grid: Sequence[float], *, higher: bool | None = None
    ) -> float:
        """The value of best development score; a grid whose edge wins grows by its own factor.

        A second call of the same name returns the first winner, so that one seed decides for all. A value with which
        training diverges, or whose figure is not finite, is the worst.

        Parameters
        ----------
        score
            Returns a figure on development data, never on test data.
        grid
            Rising values to try.
        higher
            Whether more is better; by default as the study's metric.
        """
        if name in self.choices:
            return self.choices[name].value
        better = 1 if (self.study.higher if higher is None else higher) else -1
        tried: dict[float, float | None] = {}
        values = list(grid[:1]) if self.quick else list(grid)
        for _ in range(WIDENED + 1):
            for value in values:
                if value not in tried:
                    self.step(f"{name}: trying {value:g}")
                    tried[value] = _tried(score, value)
            finite = {value: figure for value, figure in tried.items() if figure is not None}
            if not finite:
                raise OctavoError(f"{self.study.name}: {name}: no value of {sorted(tried)} gives a finite figure")
            best = max(finite, key=lambda value: better * finite[value])
            known = sorted(tried)
            edge = best in (known[0], known[-1])
            if self.quick or len(grid) < 2 or not edge:
                break
            values = [best * grid[0] / grid[1] if best == known[0] else best * grid[-1] / grid[-2]]
        self.choices[name] = Choice(name, best, {f"{value:g}": tried[value] for value in sorted(tried)}, edge)
        return best

    def fit(
        self,
        make: Callable[[float], Stored],
        size: int,
        low: float,
        high: float,
        *,
        whole: bool = False,
        near: float = 0.02,
    ) -> tuple[float, Stored]:
        """Find the largest knob whose file is no larger than ``size`` bytes, by bisection.

        Parameters
        ----------
        make
            Returns what is stored at a value of the knob; bytes rise with it.
        whole
            Whether the knob is an integer.
        near
            The file must hold at least ``1 - near`` of ``size``; quick runs take the nearest.

        Raises
        ------
        OctavoError
            If no value fits, or none fills the bytes.
        """
        best: tuple[float, Stored] | None = None
        for _ in range(6 if self.quick else 40):
            middle = float(round((low + high) / 2)) if whole else (low + high) / 2
            stored = make(middle)
            if stored.bytes <= size:
                if best is None or stored.bytes > best[1].bytes:
                    best = middle, stored
                if stored.bytes >= (1 - near / 8) * size:
                    break
            low, high = (middle + whole, high) if stored.bytes <= size else (low, middle - whole)
            if low > high or high - low < 1e-4 * max(1.0, abs(high)):
                break
        if best is None or (best[1].bytes < (1 - near) * size and not self.quick):
            held = "none fits" if best is None else f"the nearest has {best[1].bytes}"
            raise UnreachedError(f"no value of the knob gives a file of {size} bytes ({held}); widen its range")
        return best

    # Rivals

    def quantization_alone(self, model: nn.Module, size: int, weights: Mapping[str, Tensor] | None = None) -> Stored:
        """The model with entropy-constrained quantization of its matrices, in a file of ``size`` bytes."""
        given = {n: w for n, w in model.named_parameters() if w.ndim > 1} if weights is None else weights
        matrices = {name: weight.detach().flatten(1) for name, weight in given.items()}

        def at(bits: float) -> Stored:
            return through_file(model, {name: quantized(Dense(matrix), bits) for name, matrix in matrices.items()})

        return self.fit(at, size, 0.05, 16.0)[1]

    def thinner(self, make: Callable[[int], nn.Module], size: int, widths: range) -> int:
        """The largest width whose net, stored dense in 16 bits, is no larger than ``size`` bytes."""

        def at(width: float) -> Stored:
            return through_file(make(int(width)))

        return int(self.fit(at, size, widths[0], widths[-1], whole=True, near=1)[0])

    # Figures

    def stored(
        self,
        model: nn.Module,
        forms: Mapping[str, Form] | None = None,
        layouts: Mapping[str, Layout] | None = None,
    ) -> Stored:
        """Write a model to a file, read it back, and count its bytes (:func:`through_file`)."""
        return through_file(model, forms, layouts=layouts)

    def add(self, arm: str, value: float, size: Stored | int = 0, **also: float) -> None:
        """Record a figure of an arm; call it once for every seed, in the order of the seeds.

        Parameters
        ----------
        value
            The study's metric on test data.
        size
            What was stored, or its bytes.
        also
            Other figures; underscores in their names are shown as spaces.
        """
        row = {name.replace("_", " "): float(figure) for name, figure in also.items()}
        size = size.bytes if isinstance(size, Stored) else size
        self.found.rows.setdefault(arm, []).append((float(value), size, row))

    def ahead(
        self, ours: str, theirs: str, margin: float = 0.0, *, of: str | None = None, higher: bool | None = None
    ) -> Gap:
        """By how much one arm is better than another, seed by seed.

        Parameters
        ----------
        margin
            What it must be ahead by; a negative one allows a loss.
        of
            Another figure than the metric, by its name.
        higher
            Whether more of that figure is better; by default as the metric.
        """
        arms = self.arms
        left, right = (arms[name].values if of is None else arms[name].also[of] for name in (ours, theirs))
        text = f"{ours} over {theirs}" + (f", {of}" if of else "")
        better = self.study.higher if higher is None else higher
        return gap(text, left, right, margin) if better else gap(text, right, left, margin)

    def gate(self, text: str, *gaps: Gap) -> None:
        """State a condition without which nothing can be shown; claims need all gates unless they name theirs."""
        self.gates.append(Gate(text, gaps))

    def judge(self, key: str, *gaps: Gap, needs: Sequence[str] | None = None) -> None:
        """Judge a claim or extra by comparisons that must all hold; without any it is not testable.

        Parameters
        ----------
        key
            The key of the statement in the study.
        needs
            Texts of the gates that it depends on; all by default.
        """
        published = key in self.study.claims
        text = self.study.claims[key] if published else self.study.extras[key]
        failed = tuple(g.text for g in self.gates if not g.passed and (needs is None or g.text in needs))
        verdict = Verdict.NOT_TESTABLE if failed or not gaps else together(gaps)
        self.judged[key] = Judged(text, published, verdict, gaps, failed)

    def say(self, text: str) -> None:
        """Add a sentence on why, no more than the arms show."""
        self.reason.append(text)

    def check(self) -> None:
        """Refuse a run that is not fair or not whole.

        Raises
        ------
        OctavoError
            If trained arms differ in steps, a claim was not judged, or an arm lacks a seed.
        """
        totals = {(arm, seed): count for (arm, seed), count in self.found.steps.items()}
        if len(set(totals.values())) > 1:
            told = ", ".join(f"{arm} (seed {seed}): {count}" for (arm, seed), count in totals.items())
            raise OctavoError(f"{self.study.name}: trained arms have different steps ({told}); train all alike")
        if missing := [key for key in (*self.study.claims, *self.study.extras) if key not in self.judged]:
            raise OctavoError(f"{self.study.name}: not judged: {', '.join(missing)}; call lab.judge for each")
        for name, arm in self.arms.items():
            if len(arm.values) not in (1, len(self.seeds)):
                count = len(arm.values)
                raise OctavoError(f"{self.study.name}: arm {name!r} has {count} figures; add one for every seed")


def _tried(score: Callable[[float], float], value: float) -> float | None:
    """The figure of a value; None where training diverges or the figure is not finite."""
    try:
        found = score(value)
    except DivergedError:
        return None
    return found if math.isfinite(found) else None


def _endless(batches: Callable[[int], Iterable[Any]], first: int) -> Iterator[Any]:
    """The batches of all epochs from a first one on."""
    for number in itertools.count(first):
        epoch = iter(batches(number))
        batch = next(epoch, None)
        if batch is None:
            raise OctavoError(f"batches: epoch {number} has none; give smaller batches or more examples")
        yield batch
        yield from epoch
