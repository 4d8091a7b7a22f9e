"""Turbo-VBI: weights that are needed come in runs, against a prior of independent weights and pruned neurons."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from octavo.cuts import Units, without
from octavo.cuts.chains import chain_units
from octavo.cuts.choosing import best_across
from octavo.forms import Dense, Form, Sparse
from octavo.recipes.frame import Lab, Stored, Study, gap
from octavo.recipes.frame.data import FASHION, Split, fashion
from octavo.recipes.frame.nets import in_batches, shuffled
from octavo.training import Regimen, accuracy, cross_entropy
from octavo.training.clustered_support import SupportPrior
from octavo.training.regimens.gradual_pruning import GradualPruning
from octavo.training.regimens.turbo_vbi import SOURCE, TurboVBI
from octavo.training.regimens.vtrans import VTrans

#: Steps of the dense base and of every arm after it, and the share of these in which survivors are tuned.
BASE, STEPS, TUNED = 1100, 1100, 0.35
#: Densities of the prior to choose from, the mean length of its runs, and weights of the group lasso.
DENSITIES, RUN, PRESSURES = (0.03, 0.1, 0.3), 3.0, (1e-5, 1e-4, 1e-3)
#: Points of accuracy that the smallest file may lose to the dense net on development data.
LOSS = 2.0

DENSE, OURS, ALONE, MIXED = "dense", "Turbo-VBI", "independent support", "Turbo-VBI, pixels permuted"
LASSO, VIB, MAGNITUDE, CODED = "group lasso", "VIB masks of neurons", "gradual magnitude", "quantization alone"
RUNS, BYTES = "mean length of runs", "bytes of the file"


@Study(
    "turbo-vbi",
    system="Turbo-VBI with a three-layer prior",
    source=SOURCE,
    metric="test accuracy (%)",
    higher=True,
    data=FASHION,
    claims={
        "runs": "Its surviving weights come in longer runs than with independent support",
        "bytes": "At equal accuracy (within 0.5 points) its file has fewer bytes",
        "lasso": "More accurate than group lasso in the same bytes",
        "vib": "More accurate than VIB masks of neurons in the same bytes",
    },
    extras={
        "order": "With permuted pixels its runs are shorter",
        "magnitude": "More accurate than gradual magnitude pruning in the same bytes",
        "coded": "More accurate than quantization alone in the same bytes",
    },
)
def run(lab: Lab) -> None:
    """LeNet-300-100; rivals have the bytes that Turbo-VBI found for itself, and as many steps."""
    for seed in lab.seeds:
        lab.step(f"seed {seed}")
        compare(lab, fashion(lab), seed)
    arms = lab.arms
    share = [size / arms[DENSE].bytes for size in arms[OURS].also[BYTES]]
    lab.gate("the dense net is above 85%, a linear one has 84%", gap("accuracy", arms[DENSE].values, [85]))
    lab.gate("weights went: the file has under half of the dense bytes", gap("half less the share", [0.5], share))
    lab.gate("there is room: nets with fewer neurons are worse than dense", lab.ahead(DENSE, LASSO))
    lab.judge("runs", lab.ahead(OURS, ALONE, of=RUNS))
    lab.judge("bytes", lab.ahead(OURS, ALONE, -0.5), lab.ahead(OURS, ALONE, of=BYTES, higher=False))
    lab.judge("order", lab.ahead(OURS, MIXED, of=RUNS))
    for key, rival in (("lasso", LASSO), ("vib", VIB), ("magnitude", MAGNITUDE), ("coded", CODED)):
        lab.judge(key, lab.ahead(OURS, rival))
    ours, alone = arms[OURS], arms[ALONE]
    lab.say(
        f"Turbo-VBI keeps {ours.shown} % of the dense net's {arms[DENSE].shown} % in {ours.bytes:,} bytes. Independent "
        f"support has {alone.shown} % in {alone.bytes:,}, and gradual magnitude {arms[MAGNITUDE].shown} % in "
        f"{arms[MAGNITUDE].bytes:,}."
    )


class GroupLasso(Regimen):
    """The norms of all neurons' incoming weights, times the root of their number, are added to the loss."""

    def __init__(self, units: Sequence[Units], pressure: float) -> None:
        self.units, self.pressure = units, pressure

    def penalty_of(self, model: nn.Module) -> Tensor:
        """The penalty of all layers but the last."""
        return self.pressure * torch.cat(list(norms(model, self.units).values())).sum()


def norms(model: nn.Module, units: Sequence[Units]) -> dict[str, Tensor]:
    """The norm of every neuron's incoming weights, times the root of their number."""
    rows = {part.name: model.get_parameter(f"{part.name}.weight") for part in units}
    return {name: weight.norm(dim=1) * weight.shape[1] ** 0.5 for name, weight in rows.items()}


def compare(lab: Lab, split: Split, seed: int) -> None:
    """All arms of one seed, from the same trained net and on the same batches."""
    before, steps = (24, 24) if lab.quick else (BASE, STEPS)
    noisy = round((1 - TUNED) * steps)
    pixels, examples = split.train[0][0].numel(), len(split.train[0])
    order = torch.randperm(pixels, generator=torch.Generator().manual_seed(seed))

    def trained(arm: str | None, model: nn.Module, steps: int, done: int = 0, mixed: bool = False, **how: Any) -> Any:
        images = split.train[0].flatten(1)
        batches = shuffled(images[:, order] if mixed else images, split.train[1], size=100, seed=10 * seed + bool(done))
        how |= {"optimizer": lambda module: torch.optim.Adam(module.parameters(), 2e-3), "before": done}
        return lab.train(model, batches, cross_entropy, steps=steps, seed=seed, arm=arm, **how)

    def right(stored: Stored, model: nn.Module, part: tuple[Tensor, Tensor], mixed: bool = False) -> float:
        images = part[0].flatten(1)[:, order] if mixed else part[0].flatten(1)
        return 100 * accuracy(stored.load(copy.deepcopy(model)), in_batches((images, part[1]), 1000))

    def add(arm: str, model: nn.Module, forms: Mapping[str, Form], mixed: bool = False) -> int:
        stored, masks = lab.stored(model, forms), [form.mask for form in forms.values() if isinstance(form, Sparse)]
        also = {"mean_length_of_runs": length_of_runs(masks)} if masks else {}
        lab.add(arm, right(stored, model, split.test, mixed), stored, bytes_of_the_file=stored.bytes, **also)
        return stored.bytes

    torch.manual_seed(seed)
    layers = nn.Linear(pixels, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, split.classes)
    begun = trained(None, nn.Sequential(*layers), before)
    turned = copy.deepcopy(begun)
    turned[0].weight.data = begun[0].weight.data[:, order].clone()
    units = chain_units(begun)

    def sparse(arm: str | None, regimen: Regimen, mixed: bool = False) -> tuple[nn.Module, Mapping[str, Form]]:
        model = trained(arm, copy.deepcopy(turned if mixed else begun), steps, before, mixed, regimen=regimen)
        return model, regimen.hand_over(model).forms

    def bayes(density: float, run: float | None) -> TurboVBI:
        return TurboVBI(examples, SupportPrior(density, run), tuned=TUNED)

    dense = trained(DENSE, copy.deepcopy(begun), steps, before)
    whole, least = add(DENSE, dense, {}), right(lab.stored(dense), dense, split.development) - LOSS

    def density(run: float | None) -> float:
        """The density of the smallest file that is accurate enough."""

        def score(density: float) -> float:
            model, forms = sparse(None, bayes(density, run))
            stored = lab.stored(model, forms)
            return -stored.bytes - 1e6 * max(0.0, least - right(stored, model, split.development))

        return lab.choose(f"density of {'independent weights' if run is None else 'runs'}", score, DENSITIES)

    chosen = density(RUN)
    size = add(OURS, *sparse(OURS, bayes(chosen, RUN)))
    add(ALONE, *sparse(ALONE, bayes(density(None), None)))
    add(MIXED, *sparse(MIXED, bayes(chosen, RUN), mixed=True), mixed=True)

    def largest(share: float) -> Stored:
        weights = {name: weight.detach() for name, weight in begun.named_parameters() if weight.ndim > 1}
        least = torch.cat([weight.abs().flatten() for weight in weights.values()]).quantile(1 - share)
        masks = {name: weight.abs() > least for name, weight in weights.items()}
        return lab.stored(begun, {name: Sparse(mask, Dense(weights[name][mask][None])) for name, mask in masks.items()})

    zeros = 1 - lab.fit(largest, size, 0.001, 0.9)[0]
    add(MAGNITUDE, *sparse(MAGNITUDE, GradualPruning(sparsity=zeros, end=1 - TUNED, across=True)))

    def lasso(arm: str | None, pressure: float) -> nn.Module:
        model = trained(None, copy.deepcopy(begun), noisy, before, regimen=GroupLasso(units, pressure))
        scores = {name: values.detach() for name, values in norms(model, units).items()}

        def thin(gone: float) -> nn.Module:
            return without(model, units, best_across(scores, gone))

        gone = 1 - lab.fit(lambda kept: lab.stored(thin(1 - kept)), size, 0.02, 1.0, near=1)[0]
        return trained(arm, thin(gone), steps - noisy, before + noisy)

    def pressed(pressure: float) -> float:
        model = lasso(None, pressure)
        return right(lab.stored(model), model, split.development)

    add(LASSO, lasso(LASSO, lab.choose("weight of the group lasso", pressed, PRESSURES)), {})
    masks = VTrans(units, min(0.9, 0.99 * size / whole), tuned=TUNED)
    model = trained(VIB, copy.deepcopy(begun), steps, before, regimen=masks)
    add(VIB, without(model, units, masks.hand_over(model).kept), {})
    coded = lab.quantization_alone(dense, size)
    lab.add(CODED, right(coded, dense, split.test), coded, bytes_of_the_file=coded.bytes)


def length_of_runs(masks: Sequence[Tensor]) -> float:
    """The mean number of neighbours in a row that are all kept."""
    runs = sum(int(mask[:, 0].sum() + (mask[:, 1:] & ~mask[:, :-1]).sum()) for mask in masks)
    return sum(int(mask.sum()) for mask in masks) / max(1, runs)
