"""ComPEFT: fine-tunes of one base as signs with one scale, merged after compression, against rivals of equal bytes."""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.flows import Schema
from octavo.flows.deltas.merging import merge
from octavo.flows.payload import overhead
from octavo.flows.updates import UpdateCodec
from octavo.flows.updates.codes import pack_codes, pack_floats, unpack_codes, unpack_floats
from octavo.flows.updates.large import largest
from octavo.flows.updates.mixed import Mixed
from octavo.flows.updates.powersgd import PowerSGD
from octavo.flows.updates.sign import Sign
from octavo.pipeline import compress
from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.data import FASHION, Split, fashion
from octavo.recipes.frame.nets import momentum, shuffled
from octavo.recipes.testbeds.federated import Part, Tensors, coded, percent
from octavo.recipes.testbeds.workers import conv_net
from octavo.system.notes import OctavoWarning
from octavo.training import cross_entropy

#: Units of the hidden layer; steps of the base and of a fine-tune; images of a step, and test images.
SMALL, LARGE, BASE, STEPS, BATCH, TEST = 64, 512, 800, 200, 64, 5_000
#: Shares that are kept, both of the source, and tried scales in standard deviations.
FEW, MANY, SCALES = 0.05, 0.2, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
#: Tried scales of merged differences, and of one bit as multiples of the mean magnitude of each tensor.
MERGED, BITS = (0.25, 0.5, 1.0), (0.25, 0.5, 1.0, 2.0)
WHOLE, BEFORE, OURS, MEAN = "fine-tunes, 16 bits", "base", "ComPEFT", "mean of magnitudes"
PRUNED, RANK, MIXED, BIT = "largest changes, 16 bits", "low rank", "mixed families", "one bit"
JOINED, JOINED_WHOLE = "ComPEFT, merged", "fine-tunes, merged"


def _inverted(x: Tensor) -> Tensor:
    return -x


def _turned(x: Tensor) -> Tensor:
    return x.rot90(1, (2, 3))


def _upside_down(x: Tensor) -> Tensor:
    return x.flip(2)


def _coarse(x: Tensor) -> Tensor:
    return functional.interpolate(functional.avg_pool2d(x, 4), scale_factor=4)


#: What images are made into, for every task; the classes stay.
TASKS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "inverted": _inverted, "turned": _turned, "upside down": _upside_down, "coarse": _coarse,
}  # fmt: skip


@Study(
    "compeft",
    system="ComPEFT",
    source="Yadav et al. (2023), arXiv 2311.13171",
    metric="test accuracy, mean of four tasks (%)",
    higher=True,
    data=f"{FASHION}: inverted, turned, upside down, coarse",
    claims={
        "ratio": "17 times smaller than 16 bits within 1 point",
        "few": "40 times smaller within 1 point",
        "merged": "Merged after compression no worse than merged before (1 point)",
        "larger": "The larger net loses less at the same share",
    },
    extras={
        "bit": "No worse than one bit a change, in fewer bytes",
        "rank": "No worse than low rank of the difference, equal bytes",
        "mean": "The tuned scale beats the mean of the kept magnitudes",
        "mixed": "Mixed families are no worse than ComPEFT, equal bytes",
    },
)
def run(lab: Lab) -> None:
    """Fully fine-tuned nets: the whole difference is one vector, with one threshold and one scale."""
    split = fashion(lab)
    for seed in lab.seeds:
        large = 40 if lab.quick else LARGE
        for hidden in (24 if lab.quick else SMALL, large):
            lab.step(f"seed {seed}, {hidden} units")
            base = base_net(lab, split, hidden, seed)
            tunes = [fine_tuned(lab, base, split, task, seed) for task in list(TASKS)[: 2 if lab.quick else None]]
            compare(lab, split, base, tunes, "" if hidden == large else ", small net")
    judge(lab)


def base_net(lab: Lab, split: Split, hidden: int, seed: int) -> nn.Module:
    """A net trained on the images as they are."""

    def make() -> nn.Module:
        torch.manual_seed(seed)
        return conv_net(split.train[0].shape[1:], split.classes, hidden=hidden)

    def train(model: nn.Module) -> None:
        batches = shuffled(*split.train, size=BATCH, seed=seed)
        lab.train(model, batches, cross_entropy, steps=8 if lab.quick else BASE, seed=seed, optimizer=momentum(0.05))

    return lab.base(f"conv-{hidden}-s{seed}", make, train, data=split.digest, seed=seed, steps=BASE, quick=lab.quick)


def fine_tuned(lab: Lab, base: nn.Module, split: Split, task: str, seed: int) -> Tensors:
    """The difference that a task makes."""
    x, y = split.train[0], split.train[1]
    model, steps = copy.deepcopy(base).train(), 8 if lab.quick else STEPS
    drawn = shuffled(x, y, size=BATCH, seed=seed + 100)

    def batches(epoch: int):  # type: ignore[no-untyped-def]
        return ((TASKS[task](images), labels) for images, labels in drawn(epoch))

    lab.train(model, batches, cross_entropy, steps=steps, seed=seed, optimizer=momentum(0.02))
    before = dict(base.named_parameters())
    return {name: parameter.detach() - before[name].detach() for name, parameter in model.named_parameters()}


def compare(lab: Lab, split: Split, base: nn.Module, tunes: list[Tensors], mark: str) -> None:
    """All arms of one seed and net."""
    few = split.test[0][: 64 if lab.quick else TEST], split.test[1][: 64 if lab.quick else TEST]
    whole = sum(tensor.numel() for tensor in tunes[0].values()) * 2

    def scored(differences: list[Tensors], part: Part) -> float:
        return mean([percent(moved(base, d), on(task, part)) for d, task in zip(differences, TASKS, strict=False)])

    def record(arm: str, make: Callable[[Tensors], tuple[Tensors, int]]) -> list[Tensors]:
        found = [make(tune) for tune in tunes]
        size = round(mean([size for _, size in found]))
        ratio = {"ratio": whole / size} if size else {}
        lab.add(arm + mark, scored([arrived for arrived, _ in found], few), size, **ratio)
        return [arrived for arrived, _ in found]

    def scored_bits(factor: float) -> float:
        return scored([one_bit(factor)(tune)[0] for tune in tunes], split.development)

    def alpha(share: float) -> float:
        def tried(scale: float) -> float:
            return scored([ternary(tune, share, scale)[0] for tune in tunes], split.development)

        return lab.choose(f"scale, {share:.0%} kept{mark}", tried, SCALES)

    halves = record(WHOLE, lambda tune: ({name: t.half().float() for name, t in tune.items()}, whole))
    record(BEFORE, lambda tune: ({name: torch.zeros_like(t) for name, t in tune.items()}, 0))
    for share in (FEW, MANY):
        kept = record(named(OURS, share), lambda tune: ternary(tune, share, alpha(share)))  # noqa: B023
        size = lab.arms[named(OURS, share) + mark].bytes
        record(named(MEAN, share), lambda tune: ternary(tune, share, None))  # noqa: B023
        if mark:
            continue
        codecs: dict[str, UpdateCodec] = {RANK: PowerSGD(feedback=False)}
        codecs |= {MIXED: Mixed(feedback=False)} if share == FEW else {}
        for arm, codec in codecs.items():
            record(named(arm, share), coded_alone(codec, size))
        record(named(PRUNED, share), lambda tune: pruned(tune, share))  # noqa: B023
        if share == MANY:
            record(BIT, one_bit(lab.choose("scale of one bit", scored_bits, BITS)))
            join(lab, base, {JOINED_WHOLE: halves, JOINED: kept}, split.development, few)


def coded_alone(codec: UpdateCodec, budget: int) -> Callable[[Tensors], tuple[Tensors, int]]:
    """A codec that is fitted to every difference."""
    return lambda tune: coded(codec, budget)()(tune)


def one_bit(factor: float) -> Callable[[Tensors], tuple[Tensors, int]]:
    """Signs times the mean magnitude of each tensor and a factor, which its scale would hold."""

    def made(tune: Tensors) -> tuple[Tensors, int]:
        arrived, size = coded_alone(Sign(feedback=False), 1 << 30)(tune)
        return {name: factor * tensor for name, tensor in arrived.items()}, size

    return made


def ternary(tune: Tensors, share: float, scale: float | None) -> tuple[Tensors, int]:
    """The share of largest changes of the whole vector as signs, times a scale in standard deviations of all.

    Without a scale signs stand for the mean magnitude of what is kept. What returns was decoded from the payload.
    """
    schema = Schema.of(tune)
    flat = schema.flat(tune)
    places = largest(flat, round(share * len(flat)))
    step = flat[places].abs().mean() if scale is None else scale * flat.std()
    gaps, signs = pack_codes(places, flat[places].sign(), len(flat), 1)
    parts = [memoryview(part) for part in (gaps, signs, pack_floats(step[None]))]
    read, codes = unpack_codes(parts, len(flat), 1)
    found = torch.zeros(len(flat)).index_copy_(0, read, codes * unpack_floats(parts[2], 1))
    return schema.split(found), overhead(3) + sum(map(len, parts))


def pruned(tune: Tensors, share: float) -> tuple[Tensors, int]:
    """Largest changes of the whole vector in 16 bits."""
    schema = Schema.of(tune)
    flat = schema.flat(tune)
    places = largest(flat, round(share * len(flat)))
    gaps, _ = pack_codes(places, flat[places].sign(), len(flat), 1)
    found = torch.zeros(len(flat)).index_copy_(0, places, flat[places].half().float())
    return schema.split(found), overhead(2) + len(gaps) + 2 * len(places)


def join(lab: Lab, base: nn.Module, tunes: Mapping[str, list[Tensors]], development: Part, test: Part) -> None:
    """One net for all tasks by TIES, from deltas on disk as users have them."""
    with tempfile.TemporaryDirectory(prefix="octavo-") as folder, warnings.catch_warnings():
        # That only differences are stored is what is wanted.
        warnings.simplefilter("ignore", OctavoWarning)
        for arm, differences in tunes.items():
            paths = [Path(folder) / f"{arm} {number}" for number in range(len(differences))]
            for path, difference in zip(paths, differences, strict=True):
                choices = {"methods": ["keep"], "keep": {"*": "float32"}, "preset": "data-free", "size": "100MB"}
                compress(moved(base, difference), base=base, progress=False, **choices).save(path, report=False)  # type: ignore[arg-type]

            def joined(scale: float, paths: list[Path] = paths) -> nn.Module:
                return merge(paths, copy.deepcopy(base), base=base, how="ties", scale=scale)  # type: ignore[no-any-return]

            def over(scale: float, part: Part, joined: Callable[[float], nn.Module] = joined) -> float:
                return mean([percent(joined(scale).eval(), on(task, part)) for task in TASKS])

            best = lab.choose(f"scale of {arm}", lambda scale, over=over: over(scale, development), MERGED)  # type: ignore[misc]
            lab.add(arm, over(best, test), sum(path.stat().st_size for one in paths for path in one.iterdir()))


def moved(base: nn.Module, difference: Tensors) -> nn.Module:
    """The base with a difference added."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(difference[name])
    return model.eval()


def on(task: str, part: Part) -> Part:
    """The images of a task."""
    return TASKS[task](part[0]), part[1]


def mean(values: list[float]) -> float:
    """Their mean."""
    return math.fsum(values) / len(values)


def named(arm: str, share: float) -> str:
    """The name of an arm at a share."""
    return f"{arm}, {share:.0%} kept"


def judge(lab: Lab) -> None:
    """All claims."""
    arms, ours, small = lab.arms, {share: named(OURS, share) for share in (FEW, MANY)}, ", small net"
    lab.gate("fine-tunes are above 75%", gap("accuracy", arms[WHOLE].values, [75]))
    lab.gate("tasks need them: the base is over 10 points worse", lab.ahead(WHOLE, BEFORE, 10.0))
    for key, share, least in (("ratio", MANY, 17), ("few", FEW, 40)):
        reached = gap(f"ratio over {least}", arms[ours[share]].also["ratio"], [least])
        lab.judge(key, lab.ahead(ours[share], WHOLE, -1.0), reached)
    lab.judge("merged", lab.ahead(JOINED, JOINED_WHOLE, -1.0))
    losses = {
        mark: [w - v for w, v in zip(arms[WHOLE + mark].values, arms[ours[FEW] + mark].values, strict=True)]
        for mark in ("", small)
    }
    lab.judge("larger", gap("loss of the small net over that of the large one", losses[small], losses[""]))
    lab.judge("bit", lab.ahead(ours[MANY], BIT))
    lab.judge("rank", *(lab.ahead(ours[share], named(RANK, share)) for share in (FEW, MANY)))
    lab.judge("mean", *(lab.ahead(ours[share], named(MEAN, share)) for share in (FEW, MANY)))
    lab.judge("mixed", lab.ahead(named(MIXED, FEW), ours[FEW], -0.5))
    told = ", ".join(
        f"{mean(list(arms[ours[share]].also['ratio'])):.1f} with {share:.0%} kept" for share in (FEW, MANY)
    )
    lab.say(f"Real ratios to 16 bits: {told}. One bit a change is at most 16 times smaller.")
