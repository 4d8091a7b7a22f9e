"""The arms of the benchmark of learnable vector storage: every method at every size, as one seed trains them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from octavo.forms import Dense, Form
from octavo.recipes.frame.lab import UnreachedError
from octavo.recipes.frame.nets import shuffled
from octavo.recipes.frame.stored import Stored, quantized
from octavo.recipes.testbeds.ctr import CTR, ClickData, FilmMeans, auc, click_loss
from octavo.recipes.testbeds.table_methods import AFTERWARDS, CODED, SEARCHED, SHARING, THIN, WIDTH, TableOf, replaced
from octavo.training import DeepLight, Regimen
from octavo.training.tables import CompactTable, FormTable, LowPrecision, settle_tables, tables_of
from octavo.training.tables.by_form import DEVIATION

if TYPE_CHECKING:
    from octavo.recipes.frame import Lab

#: Steps of every arm, examples of a step, rates that are tried.
STEPS, BATCH, RATES = 312, 512, (1e-3, 3e-3, 1e-2)
#: Tables with fewer rows stay dense.
LARGE = 900
#: How much of the bytes of the tables a method must be able to fill, or it is left out at that size.
FILLED = 0.7

DENSE, MEANS, THINNER, ALONE, PRUNED = "dense", "mean of a film", "smaller dense", "quantization alone", "DeepLight"
EIGHT = "8-bit codes"
CHOSEN, LOOKUP, TRAINED = "development AUC (%)", "microseconds a row", "seconds of training"
OVER = "bytes over the stated ones (% of the tables)"


def named(name: str, share: float) -> str:
    """The name of an arm."""
    return f"{name}, {share:.0%}"


class Comparison:
    """All arms of one seed.

    Parameters
    ----------
    knobs
        What sizes the tables of an arm, found by the first seed for all; None where a method cannot fill the bytes.
    """

    def __init__(self, lab: Lab, data: ClickData, seed: int, knobs: dict[str, float | None]) -> None:
        self.lab, self.data, self.seed, self.knobs = lab, data, seed, knobs
        self.steps = 4 if lab.quick else STEPS
        self.batches = shuffled(*data.train, size=256 if lab.quick else BATCH, seed=seed)
        large = [number for number, size in enumerate(data.sizes) if size >= LARGE]
        self.counts = {f"tables.{k}": data.train[0][:, k].bincount(minlength=data.sizes[k]).float() for k in large}
        self.sizes = tuple(len(counts) for counts in self.counts.values())
        self.elements, self.seconds = WIDTH * sum(self.sizes), 0.0
        #: Bytes that files and their tables must have now, and the seconds of every supernet.
        self.size, self.tables, self.halves = 0, 0.0, dict[str, float]()

    def net(self, width: int = WIDTH) -> CTR:
        """An untrained model."""
        torch.manual_seed(self.seed)
        return CTR(self.data.sizes, width)

    def trained(self, model: nn.Module, lr: float, arm: str | None, part: float = 1.0, **options: Any) -> nn.Module:
        """A model after a share of the steps; the others came before."""
        count = round(part * self.steps)
        started = time.perf_counter()
        made = self.lab.train(
            model, self.batches, click_loss, steps=count, seed=self.seed, arm=arm, before=self.steps - count,
            optimizer=lambda module: torch.optim.Adam(module.parameters(), lr), **options,
        )  # fmt: skip
        self.seconds = time.perf_counter() - started
        return made

    def rate(self, name: str, make: Callable[[float], nn.Module]) -> float:
        """The rate of a method, chosen once for all sizes."""
        return self.lab.choose(f"rate of {name}", lambda lr: auc(make(lr), self.data.development), RATES)

    def all(self, shares: Sequence[float]) -> None:
        """Every arm."""
        lr = self.rate(DENSE, lambda lr: self.trained(self.net(), lr, None))
        dense = self.trained(self.net(), lr, DENSE)
        whole = self.lab.stored(dense)
        self.add(DENSE, dense, whole)
        self.lab.add(MEANS, auc(FilmMeans(self.data), self.data.test))
        self.eight()
        nets = self.supernets()
        for share in shares:
            self.tables = share * self.elements * 2
            self.size = round(whole.bytes - self.elements * 2 + self.tables)
            for name, make in {**SHARING, **CODED, **THIN}.items():
                self.direct(name, make, share)
            for name in SEARCHED:
                self.searched(name, nets[name], share)
            self.pruned(share)
            self.afterwards(dense, share)
            self.thinner(share)

    def small(self, make: Callable[[str], nn.Module]) -> CTR:
        """An untrained model with other tables, by their names."""
        torch.manual_seed(self.seed)
        tables = {name: make(name) for name in self.counts}
        return replaced(self.net(), tables)

    def eight(self) -> None:
        """Codes of 255 levels with a fixed step, of whatever bytes."""

        def made(lr: float, arm: str | None = None) -> nn.Module:
            model = self.small(lambda n: LowPrecision(len(self.counts[n]), WIDTH, 127, reach=10 * DEVIATION))
            return self.trained(model, lr, arm)

        self.add(EIGHT, *self.stored(made(self.rate(EIGHT, made), EIGHT)))

    def direct(self, name: str, make: Callable[[TableOf, float], nn.Module], share: float) -> None:
        """A method whose tables train from the start as they are stored."""

        def model(knob: float) -> nn.Module:
            return self.small(lambda n: make(self.table(n, share), knob))

        def untrained(knob: float) -> Stored:
            return self.stored(model(knob))[1]

        arm = named(name, share)
        first = arm not in self.knobs
        fitted = self.knob(arm, untrained)
        if fitted is None:
            return
        knob = fitted
        lr = self.rate(name, lambda lr: self.trained(model(knob), lr, None))
        if first and name in CODED:
            # Codes change their entropy as they train.
            grown = self.stored(self.trained(model(knob), lr, None))[1].bytes - untrained(knob).bytes
            knob = self.knob(arm, untrained, grown, once=False) or knob
        self.add(arm, *self.stored(self.trained(model(knob), lr, arm)))

    def supernets(self) -> dict[str, nn.Module]:
        """Models with the supernets of searches, after half of the steps."""
        found = {}
        for name, method in SEARCHED.items():

            def made(lr: float, net: Callable[[TableOf], CompactTable] = method.net) -> nn.Module:
                return self.trained(self.small(lambda n: net(self.table(n, 1.0))), lr, None, 0.5)

            found[name] = made(self.rate(name, made))
            self.halves[name] = self.seconds
        return found

    def searched(self, name: str, net: nn.Module, share: float) -> None:
        """What a search chose, trained for the other half of the steps."""
        chosen, tables = SEARCHED[name].chosen, tables_of(net)

        def model(forms: Mapping[str, Form]) -> nn.Module:
            assert isinstance(net, CTR)
            return replaced(net, {n: FormTable(form) for n, form in forms.items()})

        arm = named(name, share)
        knob = self.knob(arm, lambda knob: self.stored(model(chosen(tables, knob, None)))[1], once=False)
        if knob is not None:
            forms = chosen(tables, knob, lambda forms: auc(model(forms), self.data.development))
            lr = self.lab.choices[f"rate of {name}"].value
            made = self.trained(model(forms), lr, arm, 0.5)
            self.add(arm, *self.stored(made), seconds=self.halves[name] + self.seconds)

    def pruned(self, share: float) -> None:
        """Plain tables that a regimen prunes."""
        arm = named(PRUNED, share)
        weights = {f"{name}.weight": self.net().get_parameter(f"{name}.weight").detach() for name in self.counts}

        def sized(knob: float) -> Stored:
            forms = {name: AFTERWARDS["magnitude pruning"](weight, knob) for name, weight in weights.items()}
            return self.lab.stored(self.net(), forms)

        knob = self.knob(arm, sized)
        if knob is not None:

            def made(lr: float, arm: str | None = None) -> tuple[nn.Module, Regimen]:
                regimen = DeepLight(min(1 - knob, 0.9999), names=tuple(weights))
                return self.trained(self.net(), lr, arm, regimen=regimen), regimen

            model, regimen = made(self.rate(PRUNED, lambda lr: made(lr)[0]), arm)
            forms = regimen.forms(model)
            self.add(arm, model, self.lab.stored(model, forms), list(forms.values())[-1].lookup)

    def afterwards(self, dense: nn.Module, share: float) -> None:
        """Tables of the trained model, compressed without training."""
        weights = {f"{name}.weight": dense.get_parameter(f"{name}.weight").detach() for name in self.counts}
        alone = {ALONE: lambda weight, knob: quantized(Dense(weight), 0.05 + 15.95 * knob)}
        for name, make in {**AFTERWARDS, **alone}.items():

            def forms(knob: float, make: Callable = make) -> dict[str, Form]:
                return {n: make(weight, knob) for n, weight in weights.items()}

            arm = named(name, share)
            knob = self.knob(arm, lambda knob: self.lab.stored(dense, forms(knob)), once=False)
            if knob is not None:
                found = forms(knob)
                self.add(arm, dense, self.lab.stored(dense, found), list(found.values())[-1].lookup, seconds=0.0)

    def thinner(self, share: float) -> None:
        """A dense model with thinner tables of all fields."""
        arm = named(THINNER, share)
        if arm not in self.knobs:
            try:
                self.knobs[arm] = self.lab.thinner(self.net, self.size, range(1, WIDTH + 1))
            except UnreachedError:
                self.knobs[arm] = None
        width = self.knobs[arm]
        if width is not None:
            net = partial(self.net, int(width))
            made = self.trained(net(), self.rate(THINNER, lambda lr: self.trained(net(), lr, None)), arm)
            self.add(arm, made, self.lab.stored(made))

    def table(self, name: str, share: float) -> TableOf:
        """What is known of a table."""
        return TableOf(self.counts[name], share, self.sizes)

    def knob(self, arm: str, stored: Callable[[float], Stored], grown: int = 0, *, once: bool = True) -> float | None:
        """The knob that fills the bytes, or None.

        Parameters
        ----------
        grown
            Bytes that training adds.
        once
            Whether the first seed finds it for all. Else the first only decides whether there is one.
        """
        if arm in self.knobs and (once or self.knobs[arm] is None):
            return self.knobs[arm]
        self.lab.step(f"sizing {arm}")
        size = self.size - grown
        try:
            self.knobs[arm] = self.lab.fit(stored, size, 0.0, 1.0, near=(1 - FILLED) * self.tables / size)[0]
        except UnreachedError:
            self.knobs.setdefault(arm, None)
        return self.knobs[arm]

    def stored(self, model: nn.Module) -> tuple[nn.Module, Stored, Callable[[torch.Tensor], torch.Tensor]]:
        """The model with plain tables, what is in its file, and how a row of the largest table is read."""
        made = copy.deepcopy(model)
        last = list(self.counts)[-1]
        forms = settle_tables(made)
        form = forms.get(f"{last}.weight")
        return made, self.lab.stored(made, forms), form.lookup if form is not None else made.get_submodule(last)

    def add(
        self,
        arm: str,
        model: nn.Module,
        stored: Stored,
        read: Callable[[torch.Tensor], torch.Tensor] | None = None,
        seconds: float | None = None,
    ) -> None:
        """Quality of what was read back, with the time of a lookup and of the training."""
        made = stored.load(copy.deepcopy(model))
        read = read or made.get_submodule(list(self.counts)[-1])
        also: dict[str, Any] = {
            CHOSEN: auc(made, self.data.development),
            LOOKUP: lookup_time(read, self.sizes[-1]),
            TRAINED: self.seconds if seconds is None else seconds,
        }
        if self.size:
            also[OVER] = 100 * (stored.bytes - self.size) / self.tables
        self.lab.add(arm, auc(made, self.data.test), stored, **also)


@torch.inference_mode()
def lookup_time(read: Callable[[torch.Tensor], torch.Tensor], rows: int, count: int = 256) -> float:
    """Microseconds for one of ``count`` random rows that are read at once, the least of three."""
    index = torch.randint(rows, (count,), generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(3):
        started = time.perf_counter()
        read(index)
        times.append(time.perf_counter() - started)
    return 1e6 * min(times) / count
