"""N2N learning: smaller nets found by policies, against as many at random, shared credit, and thinning evenly."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from octavo.methods.policies import Credit
from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.data import FASHION, Split, fashion
from octavo.recipes.frame.nets import in_batches, shuffled
from octavo.training import accuracy, cross_entropy
from octavo.training.chain_nets import ChainNet, ConvLayer
from octavo.training.n2n import FoundNet, Trials, lessons, random_search, reward, searched, taught

#: Images that candidates learn from, in batches of 25, and those that they are measured on.
LEARNED, SCORED = 1_000, 1_000
#: Updates of the two policies, the nets of each, and learning rates. The authors' are 100 and 100 of 5, 0.003 and 0.1.
REMOVALS, SHRINKAGES, ROLLOUTS, RATES = 8, 10, 5, (5e-2, 5e-2)
#: Steps of everything that is trained in full, in batches of 64, and rates to choose from.
STEPS, PEAKS = 500, (1e-2, 3e-2)
TEACHER, OURS, MOVED, SHARED = "teacher", "N2N", "N2N from a small teacher's policies", "N2N with shared credit"
RANDOM, EVEN = "random search", "thinned evenly"
#: The mean reward of all nets that a search tried.
MEAN = "mean reward"


@Study(
    "n2n",
    system="N2N learning",
    source="Ashok et al. (2018), arXiv 1709.06030",
    metric="test accuracy (%)",
    higher=True,
    data=f"{FASHION}, averaged to 14 x 14",
    claims={
        "small": "Ten times fewer parameters at similar accuracy (within 2 points)",
        "moved": "Policies of a small teacher raise rewards under a larger one",
    },
    extras={
        "random": "Its net has more reward than random search's, at equal evaluations",
        "curve": "Its candidates earn more than random ones on average",
        "credit": "Candidates earn more if each has its own advantage",
        "even": "Its net has more reward than the teacher thinned evenly",
    },
)
def run(lab: Lab) -> None:
    """A teacher of nine convolutions; all searches try as many nets, each after an epoch on few images."""
    split = smaller(fashion(lab))
    for seed in lab.each_seed():
        lab.step(f"seed {seed}")
        search(lab, split, seed)
    arms = lab.arms
    lab.gate("the teacher is above 80%", gap("accuracy", arms[TEACHER].values, [80]))
    lab.gate("thinning evenly costs accuracy", lab.ahead(TEACHER, EVEN))
    lab.gate("nets found have under half the parameters", gap("times fewer", arms[OURS].also["times fewer"], [2]))
    lab.judge("small", lab.ahead(OURS, TEACHER, -2.0), gap("times fewer", arms[OURS].also["times fewer"], [10]))
    lab.judge("moved", lab.ahead(MOVED, OURS, of=MEAN))
    lab.judge("random", lab.ahead(OURS, RANDOM, of="reward"))
    lab.judge("curve", lab.ahead(OURS, RANDOM, of=MEAN))
    lab.judge("credit", lab.ahead(OURS, SHARED, of=MEAN))
    lab.judge("even", lab.ahead(OURS, EVEN, of="reward"))
    lab.say(
        f"N2N's nets have {statistics.fmean(arms[OURS].also['times fewer']):.0f} times fewer parameters. Their test "
        f"accuracy is {arms[OURS].shown} %, that of their teachers {arms[TEACHER].shown} %."
    )


def search(lab: Lab, split: Split, seed: int) -> None:
    """All searches of one seed, and the nets that they found, trained in full."""
    wide = 4 if lab.quick else 8
    whole, little = chain(split, wide, 3), chain(split, wide // 2, 2)
    test, development = in_batches(split.test), in_batches(split.development)
    images = split.train[0][: 64 if lab.quick else LEARNED].split(25)
    few = 64 if lab.quick else SCORED
    scored = in_batches((split.development[0][:few], split.development[1][:few]))
    removals, shrinkages, rollouts = (1, 2, 2) if lab.quick else (REMOVALS, SHRINKAGES, ROLLOUTS)

    def trained(
        net: ChainNet, arm: str | None, lr: float, teacher: nn.Module | None = None, part: int = 1
    ) -> nn.Module:
        def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            for x, y in shuffled(*split.train, size=32 if lab.quick else 64, seed=seed)(epoch):
                yield (x, y) if teacher is None else lessons(teacher, [x])[0]

        torch.manual_seed(seed)
        loss, steps = taught if teacher else cross_entropy, (8 if lab.quick else STEPS) // part
        return lab.train(net.module(), batches, loss, steps=steps, seed=seed, arm=arm, lr=lr)

    peak = lab.choose("rate", lambda lr: accuracy(trained(whole, None, lr, part=2), development), PEAKS)
    teacher, small = trained(whole, TEACHER, peak), trained(little, None, peak)
    best = accuracy(teacher, test)
    trials = Trials(teacher, images, scored, rate=peak, seed=seed)

    def searching(given: Trials, credit: Credit = Credit.TO_GO, start: FoundNet | None = None) -> FoundNet:
        return searched(
            given, removals=removals, shrinkages=shrinkages, rollouts=rollouts, rates=RATES, credit=credit, start=start,
            seed=seed,
        )  # fmt: skip

    lab.step(f"seed {seed}: policies of the small teacher")
    before = searching(Trials(small, images, scored, rate=peak, seed=seed))
    found: dict[str, FoundNet] = {}
    for name, credit, start in (
        (OURS, Credit.TO_GO, None),
        (MOVED, Credit.TO_GO, before),
        (SHARED, Credit.SHARED, None),
    ):
        lab.step(f"seed {seed}: {name}")
        found[name] = searching(trials, credit, start)
    lab.step(f"seed {seed}: {RANDOM}")
    others = random_search(trials, found[OURS].evaluations, seed)
    earned = {name: list(one.rewards) for name, one in found.items()} | {RANDOM: [trial.reward for trial in others]}
    nets = {name: one.best.net for name, one in found.items()}
    nets[RANDOM] = max(others, key=lambda trial: trial.reward).net
    nets[EVEN] = evenly(whole, nets[OURS].parameters)
    stored = lab.stored(teacher)
    lab.add(TEACHER, 100 * best, stored, reward=0.0, times_fewer=1.0)
    for name, net in nets.items():
        model = trained(net, name, peak, teacher)
        stored = lab.stored(model)
        share = accuracy(stored.load(model), test)
        value = reward(1 - net.parameters / whole.parameters, share / best)
        mean = {MEAN: statistics.fmean(earned[name])} if name in earned else {}
        lab.add(name, 100 * share, stored, reward=value, times_fewer=whole.parameters / net.parameters, **mean)


def chain(split: Split, width: int, each: int) -> ChainNet:
    """Three stages of ``each`` convolutions, of width, twice and four times the width."""
    stages = [
        [ConvLayer(width << stage)] * (each - 1) + [ConvLayer(width << stage, pooled=stage < 2)] for stage in range(3)
    ]
    return ChainNet(split.train[0].shape[1], tuple(layer for stage in stages for layer in stage), split.classes)


def evenly(net: ChainNet, parameters: int) -> ChainNet:
    """The net with an equal share of the channels of all layers, as many as have at most these parameters."""
    thinner = [net.shrunk([share / 100] * len(net.layers)) for share in range(100, 0, -1)]
    return next(one for one in thinner if one.parameters <= parameters or one is thinner[-1])


def smaller(split: Split) -> Split:
    """The images at half the height and width."""
    train, development, test = ((avg_pool2d(x, 2), y) for x, y in (split.train, split.development, split.test))
    return Split(train, development, test, split.digest, split.classes)
