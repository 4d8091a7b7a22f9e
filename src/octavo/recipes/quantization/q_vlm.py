"""Q-VLM: clip ratios searched together where activations have much entropy, on the two towers of a speech model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from octavo.calibration.entropy_blocks import activation_entropies, entropy_blocks
from octavo.calibration.objective import KL
from octavo.methods.quantize.clip_search import SOURCE, Clipped, ClipSearch
from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.judging import rank_correlation
from octavo.recipes.testbeds.whisper import prompts, whisper

BITS = 4
#: Two ratios, so that all layers of a tower can be searched together: 5,460 runs of a layer.
SEARCH = ClipSearch(BITS, BITS, ratios=(1.0, 0.85))
#: Prompts of a draw, and those that are judged by.
DRAWN, HELD = 2, 24
#: Parts of the model by their names.
TOWERS = ("model.encoder.layers", "model.decoder.layers")

NONE, ALONE, RANDOM, ENTROPY, JOINT = "no clipping", "layer by layer", "random blocks", "entropy blocks", "all joint"
ERROR, RUNS, RANKS = "error at the ends of the towers", "layers run", "rank correlation of entropy and gain"
MOVED = "blocks that are not entropy blocks (%)"
#: By how much an error may be larger and still be reached, and the share of runs that is far fewer.
NEAR, FEWER = 0.02, 0.1
LayerBlocks = list[tuple[str, ...]]


@Study(
    "q-vlm",
    system="Q-VLM",
    source=SOURCE,
    metric="KL divergence of next tokens (nats)",
    higher=False,
    data="Whisper base, in place of a vision-language model, and spoken prompts (Debian package "
    "asterisk-core-sounds-en-wav); seeds are draws of calibration prompts",
    claims={
        "blocks": "Entropy blocks beat a layer-wise search",
        "reach": "Entropy blocks reach joint error with a tenth of its runs",
        "entropy": "Entropy of a layer predicts what joint search of a pair gains",
    },
    extras={
        "random": "Entropy blocks beat random blocks of the same sizes",
        "clipping": "A layer-wise search beats no clipping",
        "joint": "Joint search of whole towers beats a layer-wise search",
    },
)
def run(lab: Lab) -> None:
    """All matrices of both towers in 4 bits, and all that they read; the rest stays in 16 bits."""
    model = whisper(lab)
    held, drawn = (2, 1) if lab.quick else (HELD, DRAWN)
    heard = prompts(lab, model, held + drawn * len(lab.seeds))
    job = _Comparison(lab, model, heard[:held])
    job.add(NONE, ClipSearch(BITS, BITS, ratios=(1.0,)), job.singles, heard[held : held + drawn])
    for seed in lab.each_seed():
        at = held + drawn * (seed - lab.first_seed)
        job.all(seed, heard[at : at + drawn])
    judge(lab, *job.likelihoods())


def judge(lab: Lab, own: list[float], other: list[float]) -> None:
    """Gates and claims; the likelihoods are those of the source's texts with their own and with other sounds."""
    arms = lab.arms
    sizes = [arms[name].bytes for name in (ALONE, RANDOM, ENTROPY, JOINT)]
    common = {
        "the source hears: other sounds cost its texts over a nat": gap("other over own sound", own, other, 1.0),
        "4 bits do damage, over 0.05 nats": gap("KL without clipping", arms[NONE].values, [0.0], 0.05),
        # All codes have 4 bits, but those of clipped weights have more entropy, by up to 6% if all are clipped.
        "files differ by less than 5%": gap("5% over the difference", [0.05], [max(sizes) / min(sizes) - 1]),
    }
    for text, found in common.items():
        lab.gate(text, found)
    lab.gate("random blocks are others than entropy blocks", gap("blocks that differ", arms[RANDOM].also[MOVED], [0.0]))
    needs = tuple(common)
    joint, ours = arms[JOINT].also, arms[ENTROPY].also
    lab.judge("blocks", lab.ahead(ENTROPY, ALONE), needs=needs)
    lab.judge(
        "reach",
        lab.ahead(ENTROPY, ALONE, of=ERROR, higher=False),
        gap(f"error of {JOINT} and {NEAR:.0%} over {ENTROPY}", [(1 + NEAR) * e for e in joint[ERROR]], ours[ERROR]),
        gap(f"{FEWER:g} of the runs of {JOINT} over those of {ENTROPY}", [FEWER * n for n in joint[RUNS]], ours[RUNS]),
        needs=needs,
    )
    lab.judge("entropy", gap("rank correlation of neighbours", ours[RANKS], [0.0]), needs=needs)
    lab.judge("random", lab.ahead(ENTROPY, RANDOM))
    lab.judge("clipping", lab.ahead(ALONE, NONE), needs=needs)
    lab.judge("joint", lab.ahead(JOINT, ALONE), needs=needs)
    for name in (ALONE, RANDOM, ENTROPY, JOINT):
        arm = arms[name]
        lab.say(
            f"{name}: KL {arm.shown}, error {fmean(arm.also[ERROR]):.4g} after {fmean(arm.also[RUNS]):.0f} runs of a "
            "layer."
        )


@dataclass
class _Comparison:
    """The arms of all draws."""

    lab: Lab
    model: Any
    held: Sequence[Any]

    def __post_init__(self) -> None:
        self.objective = KL()
        self.reference: list[Tensor] = self.objective.reference(self.model, self.held)
        self.towers = [
            [f"{tower}.{name}" for name, _ in self.model.get_submodule(tower).named_children()] for tower in TOWERS
        ]
        self.singles: LayerBlocks = [(name,) for tower in self.towers for name in tower]

    def all(self, seed: int, batches: Sequence[Any]) -> None:
        """The arms of a draw."""
        found = [activation_entropies(self.model, tower, batches) for tower in self.towers]
        chosen = [entropy_blocks(entropies) for entropies in found]
        draws = np.random.default_rng(seed)
        self.add(ALONE, SEARCH, self.singles, batches)
        own = [block for blocks in chosen for block in blocks]
        others = [block for blocks in chosen for block in _shuffled(blocks, draws)]
        moved = 100 * fmean(block not in own for block in others)
        self.add(RANDOM, SEARCH, others, batches, **{MOVED: moved})
        gains = [[self.gain(pair, batches) for pair in pairwise(tower)] for tower in self.towers]
        entropies = [list(values.values())[:-1] for values in found]
        ranks = fmean(map(_ranks, entropies, gains))
        self.add(ENTROPY, SEARCH, own, batches, **{RANKS: ranks})
        self.add(JOINT, SEARCH, [tuple(tower) for tower in self.towers], batches)

    def gain(self, pair: tuple[str, str], batches: Sequence[Any]) -> float:
        """The share of the error behind two layers that their joint search saves; all others are not rounded."""
        self.lab.step(f"pair {' '.join(pair)}")
        alone, joint = (SEARCH.search(self.model, blocks, batches) for blocks in ([pair[:1], pair[1:]], [pair]))
        return 1 - joint.errors[-1] / alone.errors[-1]

    def add(self, arm: str, search: ClipSearch, blocks: LayerBlocks, batches: Sequence[Any], **also: float) -> None:
        """Search, store and read back, and record the figures of an arm."""
        self.lab.step(arm)
        found = search.search(self.model, blocks, batches)
        ends = {tower[-1] for tower in self.towers}
        error = fmean(e for block, e in zip(blocks, found.errors, strict=True) if block[-1] in ends)
        quality, size = self.stored(found)
        self.lab.add(arm, quality, size, **{ERROR: error, RUNS: found.runs}, **also)

    def stored(self, found: Clipped) -> tuple[float, int]:
        """Quality and bytes of the two towers, written to a file and read back."""
        model = copy.deepcopy(self.model)
        parts = nn.ModuleList(model.get_submodule(tower) for tower in TOWERS)
        forms = {
            f"{number}{name.removeprefix(tower)}": form
            for number, tower in enumerate(TOWERS)
            for name, form in found.forms.items()
            if name.startswith(f"{tower}.")
        }
        stored = self.lab.stored(parts, forms)
        stored.load(parts)
        with found.rounding_inputs(model):
            lost = self.objective.measure(model, self.held, self.reference)
        return float(lost.mean()), stored.bytes

    @torch.inference_mode()
    def likelihoods(self) -> tuple[list[float], list[float]]:
        """Mean log-likelihoods of the source's texts, each with its own sound and with that of the next prompt."""
        rows: tuple[list[float], list[float]] = ([], [])
        for number, batch in enumerate(self.held):
            tokens = batch["decoder_input_ids"]
            for row, other in zip(rows, (batch, self.held[number - 1]), strict=True):
                given = {**batch, "input_features": other["input_features"]}
                logs = self.model(**given).logits[:, :-1].log_softmax(-1)
                row.append(float(logs.gather(2, tokens[:, 1:, None])[:, 3:].mean()))
        return rows


def _shuffled(blocks: LayerBlocks, draws: np.random.Generator) -> LayerBlocks:
    """Blocks of the same sizes in another order, if there is one."""
    own, names = tuple(map(len, blocks)), [name for block in blocks for name in block]
    others = sorted({*permutations(own)} - {own}) or [own]
    ends = np.cumsum([0, *others[draws.integers(len(others))]]).tolist()
    return [tuple(names[a:b]) for a, b in pairwise(ends)]


def _ranks(entropies: Sequence[float], gains: Sequence[float]) -> float:
    """Rank correlation; 0 if joint search gains nothing anywhere."""
    return rank_correlation(entropies, gains) if max(gains) > min(gains) else 0.0
