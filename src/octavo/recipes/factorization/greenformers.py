"""Greenformers: a transformer with low-rank layers against one with low-rank attention, by length."""

from __future__ import annotations

import copy
import statistics
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from octavo.architectures import SequenceClassifier
from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.data import FASHION, fashion
from octavo.recipes.frame.nets import in_batches, shuffled
from octavo.recipes.testbeds.costs import crossing, held, milliseconds
from octavo.training import accuracy, cross_entropy, low_rank

FULL, LRT, LIN = "full layers", "LRT", "Linformer"
THIN, WARM = "thinner full layers", "LRT from the SVD of trained layers"
#: Tokens in every batch that is timed, so that lengths can be compared, and the length at which the paper draws a line.
TOKENS, LENGTHS, LINE = 4096, (128, 256, 512, 1024, 2048), 512
#: Steps of a classifier, and those of them after a warm start; rates to choose from; pixels of a patch's side.
STEPS, LATER, RATES, SIDE = 700, 210, (1e-3, 3e-3, 9e-3), 7
STEP, HELD, RIGHT = "training step (ms)", "held for the backward pass (MB)", "test accuracy (%)"


@Study(
    "greenformers",
    system="Greenformers (Low-Rank Transformer)",
    source="Cahyawijaya (2021), arXiv 2108.10808; Linformer: Wang et al. (2020), arXiv 2006.04768",
    metric=f"processor time of a forward pass over {TOKENS:,} tokens on one thread (ms)",
    higher=False,
    data=FASHION,
    claims={
        "short": "Up to 512 tokens LRT is faster than Linformer",
        "long": "Beyond 512 tokens Linformer is faster than LRT",
        "smaller": "LRT makes the file smaller, and Linformer does not",
        "cheaper": "LRT saves over 30% of the time of training",
    },
    extras={
        "accurate": "LRT is as accurate as full layers (within 1 point)",
        "thin": "LRT is more accurate than thinner full layers of its bytes",
        "warm": "A start from the SVD of trained layers beats a random one",
    },
)
def run(lab: Lab) -> None:
    """Encoders of every length timed, and small ones trained on images in patches."""
    lengths, line, width, projected = ((16, 64), 16, 32, 8) if lab.quick else (LENGTHS, LINE, 256, 128)
    places: dict[str, list[float]] = {"forward pass": [], "training step": []}
    for seed in lab.seeds:
        rows = [timed(lab, seed, length, width, projected) for length in lengths]
        for name, taken in zip(places, zip(*rows, strict=True), strict=True):
            places[name].append(crossing(lengths, [row[LRT] for row in taken], [row[LIN] for row in taken]))
        learned(lab, seed)
    arms = lab.arms
    lab.gate("the full classifier is above 75%", gap("accuracy", arms[FULL].also[RIGHT], [75]))
    lab.gate("thinner full layers are less accurate", lab.ahead(FULL, THIN, of=RIGHT, higher=True))
    for key, ours, theirs in (("short", LRT, LIN), ("long", LIN, LRT)):
        where = [length for length in lengths if (length <= line) == (key == "short")]
        pairs = [(f"{ours}, {length} tokens", f"{theirs}, {length} tokens") for length in where]
        lab.judge(key, *(lab.ahead(*pair, of=of, higher=False) for of in (None, STEP) for pair in pairs), needs=())
    full, thin, linear = ([arms[f"{kind}, {length} tokens"] for length in lengths] for kind in (FULL, LRT, LIN))
    lab.judge("smaller", gap("bytes that LRT saves", [full[0].bytes], [thin[0].bytes]),
              gap("bytes that Linformer adds", [linear[0].bytes], [full[0].bytes]), needs=())  # fmt: skip
    whole, less = (found[lengths.index(line)].also[STEP] for found in (full, thin))
    lab.judge("cheaper", gap("70% of a step over one of LRT (ms)", [0.7 * taken for taken in whole], less), needs=())
    # Multiplications a token: full layers have 12 d^2 + 2 n d, LRT 18 d r + 2 n d, Linformer 12 d^2 + 4 k d.
    even = 6 * width - 9 * (width // 4) + 2 * projected
    lab.judge("accurate", lab.ahead(LRT, FULL, -1.0, of=RIGHT, higher=True))
    lab.judge("thin", lab.ahead(LRT, THIN, of=RIGHT, higher=True))
    lab.judge("warm", lab.ahead(WARM, LRT, of=RIGHT, higher=True))
    met = " and ".join(f"at {statistics.fmean(found):.0f} tokens in a {name}" for name, found in places.items())
    lab.say(f"LRT and Linformer cross {met}; their multiplications are equal at {even}.")


def encoder(kind: str, features: int, length: int, width: int, projected: int, seed: int) -> nn.Module:
    """An encoder of two layers; all of LRT have a quarter of the width as their rank."""
    torch.manual_seed(seed)
    model = SequenceClassifier(features, length, 10, width=width, projected=projected if kind == LIN else None)
    if kind == LRT:
        low_rank(model.layers, width // 4)
    return model


def timed(lab: Lab, seed: int, length: int, width: int, projected: int) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of untrained encoders of one length, forward and in training."""
    count = (256 if lab.quick else TOKENS) // length
    x, y = torch.randn(count, length, width), torch.zeros(count, dtype=torch.long)
    models = {kind: encoder(kind, width, length, width, projected, seed) for kind in (FULL, LRT, LIN)}
    calls = {kind: (lambda model=model: cross_entropy(model, (x, y)).backward()) for kind, model in models.items()}
    steps = milliseconds(calls)
    with torch.inference_mode():
        passes = milliseconds({kind: partial(model, x) for kind, model in models.items()})
    for kind, model in models.items():
        also = {STEP: steps[kind], HELD: held(model, calls[kind]) / 1e6}
        lab.add(f"{kind}, {length} tokens", passes[kind], lab.stored(model), **also)
    return passes, steps


def learned(lab: Lab, seed: int) -> None:
    """Classifiers of images in patches, from the same draws; one of LRT starts at the weights of a full one."""
    split, side = fashion(lab), 4 if lab.quick else SIDE
    parts = (split.train, split.development, split.test)
    train, development, test = ((functional.unfold(x, side, stride=side).mT.contiguous(), y) for x, y in parts)
    (length, features), width, steps, later = train[0].shape[1:], *((32, 6, 2) if lab.quick else (64, STEPS, LATER))

    def made(kind: str, width: int = width) -> nn.Module:
        return encoder(kind, features, length, width, length // 4, seed)

    def trained(model: nn.Module, steps: int, like: str, arm: str | None = None, before: int = 0) -> nn.Module:
        def at(lr: float, steps: int, arm: str | None = None) -> nn.Module:
            one, batches = copy.deepcopy(model), shuffled(*train, size=64, seed=seed)
            return lab.train(one, batches, cross_entropy, steps=steps, seed=seed, arm=arm, before=before, lr=lr)

        score = lambda lr: accuracy(at(lr, steps // 2), in_batches(development))  # noqa: E731
        return at(lab.choose(f"rate of {like}", score, RATES, higher=True), steps, arm)

    models = {kind: trained(made(kind), steps, kind, kind) for kind in (FULL, LRT, LIN)}
    quarter = lab.thinner(lambda k: made(FULL, 4 * k), lab.stored(models[LRT]).bytes, range(2, width // 4))
    models[THIN] = trained(made(FULL, 4 * quarter), steps, THIN, THIN)
    warm = trained(made(FULL), steps - later, FULL)
    low_rank(warm.get_submodule("layers"), width // 4, "svd")
    models[WARM] = trained(warm, later, WARM, WARM, steps - later)
    with torch.inference_mode():
        passes = milliseconds({kind: partial(model, test[0][: TOKENS // length]) for kind, model in models.items()})
    for kind, model in models.items():
        stored = lab.stored(model)
        lab.add(kind, passes[kind], stored, **{RIGHT: 100 * accuracy(stored.load(model), in_batches(test))})
