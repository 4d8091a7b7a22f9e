"""JLCM: a codebook for each group of rows, learned together with its codes, step by step of what it adds."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch

from octavo.calibration.calibrating import calibrate
from octavo.calibration.evidence import Evidence
from octavo.calibration.inputs import model_of
from octavo.forms import Form
from octavo.methods import Method, Setting
from octavo.methods.quantize.jlcm import JointCodebooks
from octavo.methods.quantize.kmeans import KMeans
from octavo.methods.quantize.rtn import RoundToNearest
from octavo.opening import Opened, open_request
from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.bases import minilm
from octavo.recipes.testbeds.drift import Drift
from octavo.request import Request
from octavo.system.progress import silent
from octavo.targets import get_target

BITS = (2, 3)
#: Blocks that are compressed, and the share of the calibration batches that a draw has.
LAYERS, SHARE = 1, 0.5
#: Half of the steps of the method's defaults, which a softmax over all values makes slow.
SHORTER = {"rounds": 2, "steps": 50, "rate": 0.01}

GRID, BOOK, GROUPS, BOOKS, SOFTMAX, PROXIMAL, FEEDBACK, CODED = (
    "uniform grid", "one k-means book", "books of groups", "books learned", "codes learned, softmax",
    "codes learned, proximal", "one k-means book, error feedback", "bytes for entropy coding",
)  # fmt: skip
LADDER = (GRID, BOOK, GROUPS, BOOKS, SOFTMAX, PROXIMAL)


@Study(
    "jlcm",
    system="JLCM",
    source="Yvinec et al. (2023), arXiv 2309.17361",
    metric="1 - cosine to the source",
    higher=False,
    data="all-MiniLM-L6-v2 and its built-in text; seeds are draws of calibration text",
    claims={
        "grouped": "Books of groups of similar rows beat one book",
        "books": "Learned books beat those of k-means",
        "codes": "Learned codes beat nearest ones",
        "proximal": "Proximal gradients of codes beat those of a softmax",
    },
    extras={
        "book": "One k-means book beats a uniform grid of as many values",
        "feedback": "Learned codes beat one book with error feedback",
        "coded": "It beats entropy coding alone, without data, at equal bytes",
    },
)
def run(lab: Lab) -> None:
    """The matrices of MiniLM's first block at 2 and 3 bits; every row has a scale in all arms."""
    opened = open_request(Request(minilm(), methods=["keep"]), get_target("disk"), silent)
    model_of(opened.source, blockwise=False)
    assert opened.source.module is not None
    job = Drift(
        lab, "MiniLM", opened.source.module, opened.objective, opened.held_data[: 1 if lab.quick else None], LAYERS
    )
    steps = {"rounds": 1, "steps": 1} if lab.quick else SHORTER
    methods: dict[str, Method] = {
        GRID: RoundToNearest(),
        BOOK: KMeans(feedback=False),
        GROUPS: JointCodebooks(rounds=0),
        BOOKS: JointCodebooks(mapping="nearest"),
        SOFTMAX: JointCodebooks(mapping="softmax", **steps),  # type: ignore[arg-type]
        PROXIMAL: JointCodebooks(**steps),  # type: ignore[arg-type]
        FEEDBACK: KMeans(),
    }
    sizes = BITS[:1] if lab.quick else BITS
    for seed in lab.seeds:
        evidence = drawn(opened, job, seed, 2 if lab.quick else None)
        for bits in sizes:
            for name, method in methods.items():
                setting: Setting = {"bits": bits, "group": "row"} if name == GRID else {"values": 2**bits}
                forms: Mapping[str, Form] = {
                    n: method.encode(weight, setting, evidence[n]) for n, weight in job.weights.items()
                }
                job.add(named(name, bits), forms)
    for bits in sizes:
        size = job.bytes[named(PROXIMAL, bits)]
        job.add(named(CODED, bits), lab.quantization_alone(job.part(job.module), size, job.weights))
        damage = job.lost[named(GRID, bits)]
        lab.gate(f"{bits} bits do damage, over 0.01", gap("1 - cosine of the grid", damage[0], [0.0], 0.01))

    def ahead(ours: str, theirs: str) -> list:
        return [lab.ahead(f"MiniLM, {named(ours, bits)}", f"MiniLM, {named(theirs, bits)}") for bits in sizes]

    for key, (theirs, ours) in zip(("book", "grouped", "books"), pairwise(LADDER[:4]), strict=True):
        lab.judge(key, *ahead(ours, theirs))
    lab.judge("codes", *ahead(PROXIMAL, BOOKS))
    lab.judge("proximal", *ahead(PROXIMAL, SOFTMAX))
    lab.judge("feedback", *ahead(PROXIMAL, FEEDBACK))
    lab.judge("coded", *ahead(PROXIMAL, CODED))
    for bits in sizes:
        shown = ", ".join(f"{name} {lab.arms[f'MiniLM, {named(name, bits)}'].shown}" for name in (*methods, CODED))
        lab.say(f"At {bits} bits: {shown}.")


def named(name: str, bits: int) -> str:
    """The name of an arm."""
    return f"{bits} bits, {name}"


def drawn(opened: Opened, job: Drift, seed: int, few: int | None) -> dict[str, Evidence]:
    """The evidence of the blocks' matrices from a draw of the calibration batches."""
    batches = opened.calibration_data
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [batches[k] for k in order[: few or max(1, round(SHARE * len(batches)))]]
    sites = {site.name: site for site in opened.sites}
    names = {name: next(full for full in sites if full.endswith(f"layer.{name}")) for name in job.weights}
    seen = calibrate(opened.source, [sites[full] for full in names.values()], chosen, opened.objective, seed=seed)
    return {name: seen.evidence[full] for name, full in names.items()}
