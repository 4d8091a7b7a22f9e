"""EK-FAC: its influence estimates and their cost, against iterated solutions; and its worth as a weight of errors."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibration import influence
from octavo.calibration.calibrating import calibrate
from octavo.calibration.objective import Loss, objective
from octavo.methods.factorize.fisher_svd import fitted
from octavo.methods.prune.surgeon import pruned
from octavo.recipes.frame import Gap, Lab, Study, gap, rank_correlation
from octavo.recipes.frame.bases import classifier
from octavo.recipes.frame.data import FASHION, Split, fashion
from octavo.recipes.frame.nets import in_batches, shuffled
from octavo.recipes.testbeds.small_nets import cross_entropies, small_images, small_net
from octavo.sources.source import from_module
from octavo.training import cross_entropy

#: Solver, most passes of an iteration, and the curvature's labels, which are drawn but for one arm.
SOLVERS: dict[str, tuple[str, int, Any]] = {
    "EK-FAC": ("ekfac", 0, "kl"), "LiSSA": ("lissa", 30, "kl"), "conjugate gradients": ("cg", 100, "kl"),
    "2 steps of these": ("cg", 2, "kl"), "K-FAC": ("kfac", 0, "kl"), "diagonal": ("diagonal", 0, "kl"),
    "EK-FAC of true labels": ("ekfac", 0, Loss(cross_entropies)),
}  # fmt: skip
OURS, LISSA, EXACT, SHORT, KFAC, DIAGONAL, TRUE = SOLVERS
#: Shares of the rank at which two factors are as large as the matrix, and of zeros; and what errors are weighed by.
SIZES: dict[str, Any] = {f"low rank {share:g}": partial(fitted, share=share) for share in (0.7, 0.5)}
SIZES |= {f"pruned {share:.0%}": partial(pruned, zeros=share) for share in (0.5, 0.7)}
BLIND, INPUTS, BOTH, FULL = "nothing", "inputs", "inputs and outputs", "EK-FAC"
NETS, NEAR, LOGS = ("dense net", "convolutional net"), "nearness to exact", "log10 seconds"


@Study(
    "ekfac",
    system="EK-FAC",
    source="Grosse et al. (2023), arXiv 2308.03296; George et al. (2018), arXiv 1806.03884",
    metric="rank correlation with losses after retraining on subsets; of a ResNet-8, minus its test loss (nats)",
    higher=True,
    data=FASHION,
    claims={
        "accuracy": "It predicts retraining as well as iterated solutions (within 0.05)",
        "cost": "Solving for all queries takes under a tenth of the time",
    },
    extras={
        "short": "Two steps of CG take longer and predict no better (within 0.05)",
        "kfac": "It is nearer to exact influence than K-FAC",
        "diagonal": "K-FAC is nearer to exact influence than a diagonal",
        "labels": "The model's own labels bring it nearer than true ones",
        "outputs": "Weighing errors by outputs too costs under 0.01 nats",
    },
)
def run(lab: Lab) -> None:
    """Influence on two small nets, which are retrained on halves; then a ResNet-8 under four weights of errors."""
    for seed in lab.seeds:
        lab.step(f"seed {seed}")
        for net in NETS:
            retrained(lab, fashion(lab), net, seed)
        compressed(lab, fashion(lab), seed)

    def each(ours: str, theirs: str, margin: float = 0.0, of: str | None = None) -> list[Gap]:
        higher = None if of is None else of == NEAR
        return [lab.ahead(f"{net}, {ours}", f"{net}, {theirs}", margin, of=of, higher=higher) for net in NETS]

    follows, damage = "exact influence predicts retraining, above 0.3", "errors without weights do damage"
    lab.gate(follows, *(gap(net, lab.arms[f"{net}, {EXACT}"].values, [0.3]) for net in NETS))
    lab.gate(damage, *(lab.ahead("ResNet-8", f"{size}, {BLIND}") for size in SIZES))
    lab.judge("accuracy", *each(OURS, LISSA, -0.05), *each(OURS, EXACT, -0.05), needs=[follows])
    times = [*each(OURS, LISSA, 1.0, LOGS), *each(OURS, EXACT, 1.0, LOGS)]
    lab.judge("cost", *times, needs=[follows])
    lab.judge("short", *each(OURS, SHORT, 0.0, LOGS), *each(OURS, SHORT, -0.05), needs=[follows])
    for key, ours, theirs in (("kfac", OURS, KFAC), ("diagonal", KFAC, DIAGONAL), ("labels", OURS, TRUE)):
        lab.judge(key, *each(ours, theirs, of=NEAR), needs=[follows])
    lab.judge("outputs", *(lab.ahead(f"{s}, {BOTH}", f"{s}, {INPUTS}", -0.01) for s in SIZES), needs=[damage])
    gains = ", ".join(f"{lab.ahead(f'{size}, {FULL}', f'{size}, {BOTH}').mean:+.2g}" for size in SIZES)
    least, most = (10 ** pick(one.mean for one in times) for pick in (min, max))
    lab.say(
        f"Iterations take {least:.0f} to {most:.0f} times as long. Weighing errors, EK-FAC in place of inputs and "
        f"outputs alone gains {gains} nats."
    )


def retrained(lab: Lab, split: Split, net: str, seed: int) -> None:
    """Influence by every solver, and how it ranks the losses after training on random halves."""
    count, queries, halves, epochs = (60, 6, 4, 4) if lab.quick else (500, 20, 32, 30)
    (x, y), asked = small_images(split.train, count, seed), small_images(split.test, queries, seed)

    def learned(which: Tensor) -> nn.Module:
        batches, steps = shuffled(x[which], y[which], size=25, seed=seed), epochs * len(which) // 25
        return lab.train(small_net(net == NETS[1], seed), batches, cross_entropy, steps=steps, seed=seed, lr=1e-2)

    generator = torch.Generator().manual_seed(seed)
    subsets = torch.stack([torch.randperm(count, generator=generator) < count // 2 for _ in range(halves)])
    after = torch.stack([cross_entropies(learned(subset.nonzero()[:, 0]), asked).detach() for subset in subsets], 1)
    model = learned(torch.arange(count))
    examples, found = in_batches((x, y), 100), {}
    for name, (solver, most, labels) in SOLVERS.items():
        options = {"objective": labels, "solver": solver, "steps": min(most, 3) if lab.quick else most, "seed": seed}
        found[name] = influence(model, examples, [asked], cross_entropies, **options)
    for name, one in found.items():
        near = rank_correlation(one.scores, found[EXACT].scores)
        # What is learned lowers the loss.
        predicted = rank_correlation(-one.scores @ subsets.to(x).t(), after)
        lab.add(f"{net}, {name}", predicted, log10_seconds=math.log10(one.seconds), nearness_to_exact=near)


def compressed(lab: Lab, split: Split, seed: int) -> None:
    """A ResNet-8 of low rank or pruned, nothing trained after; errors are weighed by ever more of the curvature."""
    model = classifier(lab, seed)
    source = from_module(model)
    sites = [site for site in source.sites()[0] if site.name.startswith("blocks.")][: 2 if lab.quick else None]
    batches = split.train[0][: 100 if lab.quick else 1000].split(50)
    found = calibrate(source, sites, batches, objective("kl"), seed=seed, curvature="ekfac").evidence
    seen = {FULL: {name: one.curvature for name, one in found.items() if one.curvature is not None}}
    for kind, sides in {BLIND: (False, False), INPUTS: (True, False), BOTH: (True, True)}.items():
        seen[kind] = {name: one.simplified(inputs=sides[0], outputs=sides[1]) for name, one in seen[FULL].items()}
    forms = {
        f"{size}, {kind}": {s.name: make(s.layout.to_matrix(source.read(s.name)), seen[kind][s.name]) for s in sites}
        for size, make in SIZES.items()
        for kind in seen
    }
    for name, made in {"ResNet-8": {}, **forms}.items():
        stored = lab.stored(model, made)
        lost = Loss(cross_entropies).reference(stored.load(model), in_batches(split.test))
        lab.add(name, -float(torch.cat(lost).mean()), stored)
