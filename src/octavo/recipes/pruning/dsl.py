"""Dynamic Sparse Learning of a recommender: tables that are sparse from the first step on, against dense rivals."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor, nn

from octavo.forms import Form
from octavo.recipes.frame import Gap, Lab, Stored, Study, gap
from octavo.recipes.testbeds.ctr import MOVIELENS
from octavo.recipes.testbeds.likes import LightGCN, Likes, Popular, bpr, likes, recall, triples
from octavo.training import Regimen
from octavo.training.regimens.drop_and_grow import SOURCE, DropAndGrow
from octavo.training.regimens.gradual_pruning import GradualPruning

#: Shares of the weights that are kept.
HALF, TENTH = 0.5, 0.1
#: Elements of a row; steps of every arm; those after pruning at once; likes of a step; updates of the masks.
WIDTH, STEPS, TUNED, BATCH, UPDATES = 64, 600, 150, 4096, 10
#: Rates of training, and of fine-tuning.
RATES, TUNING = (5e-3, 1e-2, 2e-2), (1e-3, 3e-3, 1e-2)

#: A model, and the forms of its tables.
Made = tuple[nn.Module, Mapping[str, Form]]

DENSE, POPULAR = "dense", "most popular"
SMALL, STATIC, PRUNED = "smaller dense", "random mask", "dense, then pruned"
GRADUAL, RANDOM, OURS, CODED = "gradual pruning", "random growth", "DSL", "quantization alone"
NDCG, ROWS = "NDCG@20 (%)", "spread of row sizes"


@Study(
    "dsl",
    system="Dynamic Sparse Learning",
    source=SOURCE,
    metric="test recall@20 (%)",
    higher=True,
    data=MOVIELENS,
    claims={
        "half": "With half the weights its recall is the dense one's (1 point)",
        "tenth": "With a tenth of the weights, too (1 point)",
        "pruned": "Never dense, it equals dense training, then pruning (1 point)",
        "static": "It beats a random mask that never changes",
    },
    extras={
        "smaller": "It beats a smaller dense model of equal bytes",
        "growth": "Growing by gradients beats growing at random",
        "gradual": "It beats gradual pruning, which begins dense",
        "quantized": "It beats quantization alone at equal bytes",
    },
)
def run(lab: Lab) -> None:
    """A LightGCN of two layers; every seed has its own random split of the likes."""
    for seed in lab.each_seed():
        lab.step(f"seed {seed}")
        compare(lab, likes(lab, seed), seed)
    arms = lab.arms
    lab.gate("the dense model beats popularity", lab.ahead(DENSE, POPULAR))
    lab.gate("there is room: a smaller dense model is worse", lab.ahead(DENSE, named(SMALL, TENTH)))
    moved = arms[named(OURS, TENTH)].also["moved"]
    lab.gate("masks changed: a third of the weights moved", gap("share over a third", moved, [1 / 3]))
    for key, density in (("half", HALF), ("tenth", TENTH)):
        lab.judge(key, lab.ahead(named(OURS, density), DENSE, -1.0))
    lab.judge("pruned", *both(lab, PRUNED, -1.0))
    for key, rival in (("static", STATIC), ("smaller", SMALL), ("growth", RANDOM), ("gradual", GRADUAL)):
        lab.judge(key, *both(lab, rival))
    lab.judge("quantized", *both(lab, CODED))
    spread = {name: fmean(arms[named(name, TENTH)].also[ROWS]) for name in (STATIC, OURS)}
    rivals = (OURS, PRUNED, GRADUAL, RANDOM, STATIC, SMALL, CODED)
    shown = ", ".join(f"{name} {arms[named(name, TENTH)].shown}" for name in rivals)
    lab.say(
        f"Recall@20 is {arms[DENSE].shown} % dense. With a tenth of the weights, or as many bytes: {shown}. The "
        f"deviation of row sizes is {spread[OURS]:.2g} of their mean, under a random mask {spread[STATIC]:.2g}. "
        "Dense tensors hold the masks here; the memory that sparse training could save is not measured."
    )


def named(name: str, density: float) -> str:
    """The name of an arm."""
    return f"{name}, {density:.0%}"


def both(lab: Lab, rival: str, margin: float = 0.0) -> list[Gap]:
    """By how much it is ahead of a rival at both densities."""
    return [lab.ahead(named(OURS, density), named(rival, density), margin) for density in (HALF, TENTH)]


def compare(lab: Lab, data: Likes, seed: int) -> None:
    """All arms of one seed."""
    steps, tuned = (24, 6) if lab.quick else (STEPS, TUNED)
    batches = triples(data, size=512 if lab.quick else BATCH, seed=seed)

    def net(width: int = WIDTH) -> nn.Module:
        torch.manual_seed(seed)
        return LightGCN(data, width)

    def trained(
        arm: str | None, lr: float, regimen: Regimen | None = None, *, model: nn.Module | None = None,
        count: int = steps, width: int = WIDTH,
    ) -> Made:  # fmt: skip
        made = lab.train(
            model or net(width), batches, bpr, steps=count, seed=seed, arm=arm, before=steps - count, regimen=regimen,
            optimizer=adam(lr),
        )  # fmt: skip
        return made, {} if regimen is None else regimen.forms(made)

    def best(name: str, make: Callable[[float], Made], grid: Sequence[float] = RATES) -> float:
        return lab.choose(f"rate of {name}", lambda lr: recall(make(lr)[0], data, data.development)[0], grid)

    def sparse(density: float, growth: str = "gradient", updates: int = UPDATES) -> DropAndGrow:
        return DropAndGrow(density, updates, growth=growth, across=True, seed=seed)

    regimens: dict[str, Callable[[float], Regimen]] = {
        STATIC: lambda density: sparse(density, updates=0),
        RANDOM: lambda density: sparse(density, "random"),
        OURS: sparse,
        GRADUAL: lambda density: GradualPruning(1 - density, across=True),
    }

    def rate(name: str, make: Callable[[float], Regimen]) -> float:
        return best(name, lambda lr: trained(None, lr, make(TENTH)))

    def at_once(density: float) -> GradualPruning:
        return GradualPruning(1 - density, start=0.0, end=0.0, across=True)

    def add(arm: str, made: Made, coded: Stored | None = None, **also: float) -> None:
        stored = coded or lab.stored(*made)
        found, ndcg = recall(stored.load(copy.deepcopy(made[0])), data, data.test)
        lab.add(arm, found, stored.bytes, **{NDCG: ndcg, **also})

    large = best(DENSE, lambda lr: trained(None, lr))
    rates = {name: rate(name, make) for name, make in regimens.items()}
    dense, begun = trained(DENSE, large), trained(None, large, count=steps - tuned)[0]
    add(DENSE, dense)
    found, ndcg = recall(Popular(data), data, data.test)
    lab.add(POPULAR, found, 0, **{NDCG: ndcg})
    for density in (TENTH, HALF):

        def pruned(lr: float, arm: str | None = None, density: float = density) -> Made:
            return trained(arm, lr, at_once(density), model=copy.deepcopy(begun), count=tuned)

        def name(arm: str, density: float = density) -> str:
            return named(arm, density)

        made = {arm: trained(name(arm), rates[arm], make(density)) for arm, make in regimens.items()}
        made[PRUNED] = pruned(best(name(PRUNED), pruned, TUNING), name(PRUNED))
        size = lab.stored(*made[OURS]).bytes
        width = lab.thinner(net, size, range(1, WIDTH + 1))

        def smaller(lr: float, arm: str | None = None, width: int = width) -> Made:
            return trained(arm, lr, width=width)

        add(name(SMALL), smaller(best(SMALL, smaller), name(SMALL)))
        add(name(CODED), dense, lab.quantization_alone(dense[0], size))
        for arm, result in made.items():
            also = {ROWS: row_spread(result[1]), "moved": moved(result[1], made[STATIC][1])}
            add(name(arm), result, None, **also)


def adam(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Adam without decay, as recommenders are trained."""
    return lambda model: torch.optim.Adam(model.parameters(), lr)


def row_spread(forms: Mapping[str, Form]) -> float:
    """Standard deviation of the number of weights in a row, over its mean."""
    counts = torch.cat([mask.sum(1) for mask in _masks(forms)]).double()
    return float(counts.std() / counts.mean())


def moved(forms: Mapping[str, Form], first: Mapping[str, Form]) -> float:
    """Share of the weights that are not where those of the first mask were."""
    pairs = list(zip(_masks(forms), _masks(first), strict=True))
    return 1 - sum(int((a & b).sum()) for a, b in pairs) / sum(int(a.sum()) for a, _ in pairs)


def _masks(forms: Mapping[str, Form]) -> list[Tensor]:
    return [form.mask for form in forms.values()]  # type: ignore[attr-defined]
