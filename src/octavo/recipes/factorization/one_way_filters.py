"""Wave simulators with one-way filters from the start, against full, thinner and depthwise-separable ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.nets import shuffled
from octavo.recipes.testbeds.waves import GRID, Simulator, Waves, error, error_of_last, pairs, waves
from octavo.sources.sites import Layout
from octavo.training import in_stages, one_way, settle

#: Width of the full net, and steps of every training.
WIDTH, STEPS = 12, 800
#: Rates that every kind of net chooses from.
RATES = (3e-3, 1e-2, 3e-2)
#: Runs of both training sets.
MANY, FEW = 128, 8
#: The largest difference of relative errors that still counts as equal, and the published reduction.
MARGIN, FEWER = 0.01, 3
#: How the transposed convolution's weight is read as a matrix.
LAYOUTS = {"up.weight": Layout("transposed")}

TERMS = (1, 2, 3, 4)
FULL, OURS, THIN, DEPTHWISE = "full filters", "one-way filters", "thinner net", "depthwise-separable"


@Study(
    "one-way-filters",
    system="A-priori one-way filters",
    source="Boukraichi et al. (2023), arXiv 2304.04964",
    metric="relative L2 error of one step on new runs",
    higher=False,
    data="2-D wave equation by finite differences, generated here",
    claims={
        "equal": f"As accurate with {FEWER} times fewer bytes (error within {MARGIN})",
        "overfits": "Trained on few runs, they overfit less: a lower error",
    },
    extras={
        "thin": "Better than a thinner net of the same bytes, many runs",
        "thin few": "So it is with few runs",
        "stable": "After ten own predictions the error is lower",
    },
)
def run(lab: Lab) -> None:
    """Encoder-decoders, trained on many and on few runs; rates are chosen on other runs."""
    many, some = (16, 4) if lab.quick else (MANY, 32)
    fields, velocity = waves(many, 0)
    sets = {MANY: (fields, velocity), FEW: (fields[:FEW], velocity[:FEW])}
    development, test = waves(some, 1), waves(some, 2)
    for seed in lab.seeds:
        lab.step(f"seed {seed}")
        compare(lab, sets, development, test, seed)
    ours = {runs: _name(OURS, TERMS[-1], runs) for runs in sets}
    full, thin = ({runs: _name(net, None, runs) for runs in sets} for net in (FULL, THIN))
    arms = lab.arms
    copied = float((test[0][:, 2:] - test[0][:, 1:-1]).norm() / test[0][:, 2:].norm())
    fewer = arms[full[MANY]].bytes / arms[ours[MANY]].bytes
    base, overfitted = arms[full[MANY]], arms[full[FEW]]
    lab.gate("full filters halve the error of no change", gap("half that error", [copied / 2], base.values))
    lab.gate("a thinner net is worse than full filters", lab.ahead(full[MANY], thin[MANY]))
    lab.gate("few runs are overfitted", gap("few over many by half", overfitted.values, [1.5 * base.mean]))
    lab.judge("equal", lab.ahead(ours[MANY], full[MANY], -MARGIN), gap("times fewer bytes", [fewer], [FEWER]))
    lab.judge("overfits", lab.ahead(ours[FEW], full[FEW]))
    lab.judge("thin", lab.ahead(ours[MANY], thin[MANY]))
    lab.judge("thin few", lab.ahead(ours[FEW], thin[FEW]))
    lab.judge("stable", lab.ahead(ours[MANY], full[MANY], of="error after 10 steps"))
    told = ", ".join(f"{arms[_name(OURS, terms, MANY)].mean:.3f} ({terms})" for terms in TERMS)
    lab.say(
        f"By terms a filter, the error is {told}; full filters have {base.mean:.3f} in {fewer:.1f} times the bytes of "
        f"{TERMS[-1]} terms. On {FEW} runs they have {overfitted.mean:.3f} and {arms[ours[FEW]].mean:.3f}."
    )


def compare(lab: Lab, sets: dict[int, Waves], development: Waves, test: Waves, seed: int) -> None:
    """All nets of one seed, trained on both sets for the same steps."""

    def trained(make: Callable[[], nn.Module], runs: int, lr: float, arm: str | None = None) -> nn.Module:
        torch.manual_seed(seed)
        batches, steps = shuffled(*pairs(sets[runs]), size=16, seed=seed), 8 if lab.quick else STEPS
        return lab.train(make(), batches, _squared, steps=steps, seed=seed, arm=arm, lr=lr)

    def chosen(net: str, make: Callable[[], nn.Module]) -> float:
        return lab.choose(f"rate of {net}", lambda lr: error(trained(make, MANY, lr), development), RATES)

    def full(width: int = WIDTH) -> nn.Module:
        return Simulator(width, 2 * width)

    def measure(net: str, make: Callable[[], nn.Module], lr: float, terms: int | None = None) -> None:
        for runs in sets:
            name = _name(net, terms, runs)
            model = trained(make, runs, lr, name)
            took = _milliseconds(in_stages(model) if terms else model)
            stored = lab.stored(model, settle(model), LAYOUTS)
            model = stored.load(model)
            also = {"error_on_training_runs": error(model, sets[runs]), "ms_for_16_snapshots": took}
            lab.add(name, error(model, test), stored, **also, error_after_10_steps=error_of_last(model, test))

    rate = chosen(OURS, lambda: one_way(full(), TERMS[-1]))
    for terms in TERMS:
        measure(OURS, lambda terms=terms: one_way(full(), terms), rate, terms)  # type: ignore[misc]
    width = lab.thinner(full, lab.arms[_name(OURS, TERMS[-1], MANY)].bytes, range(2, WIDTH))
    rivals = {FULL: full, THIN: lambda: full(width), DEPTHWISE: lambda: Simulator(WIDTH, 2 * WIDTH, depthwise=True)}
    for net, make in rivals.items():
        measure(net, make, chosen(net, make))


def _name(net: str, terms: int | None, runs: int) -> str:
    return f"{net}{f', {terms} a filter' if terms else ''}, {runs} runs"


def _squared(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    inputs, targets = batch
    return (model(inputs) - targets).square().mean()


@torch.inference_mode()
def _milliseconds(model: nn.Module) -> float:
    """Processor time of a forward pass, the least of five."""
    inputs, taken = torch.randn(16, 3, GRID, GRID, generator=torch.Generator().manual_seed(0)), []
    for _ in range(5):
        started = time.process_time()
        model(inputs)
        taken.append(1e3 * (time.process_time() - started))
    return min(taken)
