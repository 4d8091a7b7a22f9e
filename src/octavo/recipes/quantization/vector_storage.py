"""The benchmark of learnable vector storage: methods that shrink the tables of a recommender, at equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from octavo.recipes.frame import Gap, Lab, Study
from octavo.recipes.testbeds.ctr import MOVIELENS, clicks, crossed
from octavo.recipes.testbeds.table_arms import (
    ALONE,
    CHOSEN,
    DENSE,
    EIGHT,
    MEANS,
    OVER,
    PRUNED,
    THINNER,
    Comparison,
    named,
)
from octavo.recipes.testbeds.table_methods import CODED, SEARCHED, SHARING, THIN

#: Bytes of the large tables, as shares of theirs in 16 bits, in which all methods store floats.
SHARES = (0.5, 0.2, 0.1, 0.02)
#: All methods that train their tables small.
METHODS = (*SHARING, *CODED, *THIN, *SEARCHED, PRUNED)


@Study(
    "vector-storage",
    system="Learnable vector storage compression",
    source="Zhang et al. (2023), arXiv 2311.15578",
    metric="test AUC (%)",
    higher=True,
    data=f"{MOVIELENS}, with the crossed field of user and genre",
    claims={
        "eight bits": "8-bit trained tables equal float ones (0.2 points)",
        "changes": "The best method at half the bytes loses at a fiftieth",
        "adaptive": "Own rows for frequent values beat plain hashing",
        "codes": "Fewer codes for rare rows beat equal codebooks",
    },
    extras={
        "mild": "At half the bytes, codes or pruning beat sharing rows",
        "extreme": "At a fiftieth, sharing rows beats codes and pruning",
        "training": "The best trained table beats quantization alone",
        "smaller": "The best trained table beats a smaller dense model",
    },
)
def run(lab: Lab) -> None:
    """A DeepFM with the field of user and genre; all arms have the same steps, and fill the same bytes."""
    shares = (0.5, 0.2) if lab.quick else SHARES
    knobs: dict[str, float | None] = {}
    for seed in lab.seeds:
        lab.step(f"seed {seed}")
        found = clicks(lab, shuffle=seed)
        # User and genre make a long tail. More crossed fields only overfit these data.
        pairs = [(0, 2), (1, 2)] if lab.quick else [(0, 5)]
        Comparison(lab, crossed(found, pairs), seed, knobs).all(shares)
    judged(lab, shares)


def judged(lab: Lab, shares: Sequence[float]) -> None:
    """Gates, claims and what the arms show."""
    mild, extreme = shares[0], shares[-1]

    def at(share: float, names: Sequence[str] = METHODS) -> list[str]:
        """Arms at a size, best first on development data."""
        arms = {named(name, share): lab.arms.get(named(name, share)) for name in names}
        made = {name: sum(arm.also[CHOSEN]) for name, arm in arms.items() if arm is not None}
        return sorted(made, key=lambda name: -made[name])

    def both(ours: str, theirs: str, margin: float = 0.0) -> list[Gap]:
        return [
            lab.ahead(named(ours, share), named(theirs, share), margin)
            for share in shares
            if {named(ours, share), named(theirs, share)} <= set(lab.arms)
        ]

    small = [share for share in shares if named(THINNER, share) in lab.arms]
    lab.gate("the dense model beats the mean rating of a film", lab.ahead(DENSE, MEANS))
    lab.gate("there is room: a smaller dense model is worse", lab.ahead(DENSE, named(THINNER, small[-1])))
    lab.gate("there is damage: hashing to the smallest size is worse", lab.ahead(DENSE, named("hash", extreme)))
    lab.judge("eight bits", lab.ahead(EIGHT, DENSE, -0.2))
    # Among the methods that can be made that small.
    able = [name for name in METHODS if named(name, extreme) in lab.arms]
    winner = named(at(mild, able)[0].rpartition(",")[0], extreme)
    lab.judge("changes", lab.ahead(next(name for name in at(extreme) if name != winner), winner))
    lab.judge("adaptive", *both("AdaptEmb", "hash"))
    lab.judge("codes", *both("MGQE", "DPQ"))
    others = (*CODED, "PEP", PRUNED)
    lab.judge("mild", lab.ahead(at(mild, others)[0], at(mild, tuple(SHARING))[0]))
    lab.judge("extreme", lab.ahead(at(extreme, tuple(SHARING))[0], at(extreme, others)[0]))
    alone = [share for share in shares if named(ALONE, share) in lab.arms]
    lab.judge("training", *(lab.ahead(at(share)[0], named(ALONE, share)) for share in alone))
    lab.judge("smaller", *(lab.ahead(at(share)[0], named(THINNER, share)) for share in small))
    for share in shares:
        order = at(share)
        missing = [name for name in METHODS if named(name, share) not in lab.arms]
        shown = ", ".join(f"{name.rpartition(',')[0]} {lab.arms[name].shown}" for name in order[:3])
        left = f" {', '.join(missing)} cannot fill that size." if missing else ""
        lab.say(f"Best at {share:.0%} on development data: {shown}; dense {lab.arms[DENSE].shown}.{left}")
    most = max((fmean(arm.also[OVER]), name) for name, arm in lab.arms.items() if OVER in arm.also)
    lab.say(f"Of all sized arms, {most[1]} is farthest above its size: by {most[0]:.2g}% of the tables.")
