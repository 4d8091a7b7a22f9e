"""FedZip: updates of clients sparsified, clustered and coded, at ratios in the hundreds of real payloads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from octavo.flows import Schema
from octavo.flows.payload import overhead
from octavo.flows.updates.codes import pack_codes
from octavo.flows.updates.kmeans import KMeansLevels
from octavo.flows.updates.large import largest_each
from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.data import FASHION, Split, fashion
from octavo.recipes.testbeds.federated import (
    Federation,
    Send,
    Tensors,
    coded,
    dealt,
    federate,
    few,
    locally,
    percent,
    plain,
    share_of,
)
from octavo.recipes.testbeds.workers import conv_net

#: Clients, examples of all, rounds; the ratios, the last of which is that of the source; tried rates.
CLIENTS, EXAMPLES, ROUNDS, RATIOS, RATES = 10, 8_000, 15, (100, 300, 1085), (0.03, 0.1, 0.3)
#: The largest norm of a client's gradient. Without it some seeds diverge at a rate that is best for others.
CLIP = 1.0
#: Concentration of classes among clients by the mark of an arm; None deals evenly.
SPLITS = {"": None, ", Dirichlet(0.3)": 0.3}
FEDAVG, OURS, FED_BACK, TOP, ALONE = "FedAvg", "FedZip", "FedZip with feedback", "top-z alone", "a client alone"
SHARE, GAPS, HUFFMAN, TABLES, BOUND = "z (%)", "bytes", "Huffman bytes", "address bytes", "entropy bound (bytes)"


@Study(
    "fedzip",
    system="FedZip",
    source="Malekijoo et al. (2021), arXiv 2102.01593",
    metric="test accuracy (%)",
    higher=True,
    data=FASHION,
    claims={
        "hundred": "It saves 99% of uplink bytes, accuracy within 2 points of FedAvg",
        "thousand": "It does so 1085 times smaller (within 2 points)",
        "clusters": "At the same z, clusters cost less than 1 point",
    },
    extras={
        "feedback": "At 1085 times error feedback gains over 2 points",
        "skewed": "With feedback 300 times hold for skewed classes, too (2 points)",
        "gaps": "Gaps take fewer bytes than Huffman-coded labels and address tables",
    },
)
def run(lab: Lab) -> None:
    """Ten clients, all in every round; the size of a payload is stated, and z is what fits into it."""
    split = fashion(lab)
    for seed in lab.each_seed():
        for mark, concentration in SPLITS.items():
            lab.step(f"seed {seed}{mark}")
            examples, count = (96, 2) if lab.quick else (EXAMPLES, CLIENTS)
            clients = dealt(few(split, examples), count, concentration, seed)

            def net(seed: int = seed) -> nn.Module:
                torch.manual_seed(seed)
                return conv_net(split.train[0].shape[1:], split.classes, hidden=32 if lab.quick else 256)

            rounds = 1 if lab.quick else ROUNDS
            compare(lab, Federation(clients, net, rounds, RATES[0], seed, clip=CLIP), split, mark)
    judge(lab)


def compare(lab: Lab, federation: Federation, split: Split, mark: str) -> None:
    """All arms of one seed and one way of dealing; each has its own rate, since coarse updates bear less."""

    def rated(arm: str, opened: Callable[[], Send]) -> Federation:
        def tried(lr: float) -> float:
            short = replace(federation, lr=lr, rounds=max(federation.rounds // 3, 1))
            return percent(federate(short, opened).net, split.development)

        return replace(federation, lr=lab.choose(f"rate of clients, {arm}{mark}", tried, RATES))

    def record(arm: str, opened: Callable[[], Send]) -> float:
        lab.step(f"{arm}{mark}")
        found = federate(rated(arm, opened), opened)
        lab.add(arm + mark, percent(found.net, split.test), round(found.uplink), **{SHARE: 100 * found.sent})
        return found.sent

    record(FEDAVG, plain)
    whole = sum(parameter.nbytes for parameter in federation.make().parameters())
    for ratio in RATIOS:
        # A quick net is too small for such ratios.
        budget = max(whole // ratio, 320 if lab.quick else 1)
        share = record(at_ratio(OURS, ratio), coded(KMeansLevels(False, (2,), layerwise=True), budget))
        record(at_ratio(FED_BACK, ratio), coded(KMeansLevels(True, (2,), layerwise=True), budget))
        if ratio == RATIOS[0]:
            record(TOP, lambda share=share: lambda update: topmost(update, share))  # type: ignore[misc]
    if not mark:
        dense = rated(FEDAVG, plain)
        client = dense.make()
        for _ in range(dense.rounds):
            client = locally(dense, client, dense.clients[0], 0)
        lab.add(ALONE, percent(client.eval(), split.test))
        encoders(lab, dense)


def topmost(update: Tensors, share: float) -> tuple[Tensors, int]:
    """The largest entries of every tensor as floats, with gaps between their places."""
    schema = Schema.of(update)
    flat = schema.flat(update)
    places = largest_each(flat, schema.sizes, round(share * len(flat)))
    gaps, _ = pack_codes(places, torch.ones(len(places)), len(flat), 1)
    kept = torch.zeros(len(flat)).index_copy_(0, places, flat[places])
    return schema.split(kept), overhead(2) + len(gaps) + 4 * len(places)


def encoders(lab: Lab, federation: Federation) -> None:
    """What the source's other encoders take for the first update of a client at every ratio."""
    net = federation.make()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    locally(federation, net, federation.clients[0], 0)
    pairs = zip(net.named_parameters(), before, strict=True)
    update = {name: parameter.detach() - start for (name, parameter), start in pairs}
    whole = sum(tensor.nbytes for tensor in update.values())
    for ratio in RATIOS:
        arrived, size = coded(KMeansLevels(False, (2,), layerwise=True), max(whole // ratio, 320))()(update)
        count, share = whole // 4, share_of(arrived)
        sent = round(share * count)
        # A Huffman code of three labels has lengths 1, 2 and 2; a table has a fixed number of bits for each place.
        huffman, tables = (count + sent) / 8, sent * (math.ceil(math.log2(count)) + 1) / 8
        rest = 1 - share
        bound = (-rest * math.log2(rest) - share * math.log2(share / 2)) * count / 8 if share else 0.0
        also = {GAPS: size, HUFFMAN: huffman, TABLES: tables, BOUND: bound}
        lab.add(f"one update, {ratio} times", 100 * share, size, **also)


def at_ratio(arm: str, ratio: int) -> str:
    """The name of an arm at a ratio."""
    return f"{arm}, {ratio} times"


def judge(lab: Lab) -> None:
    """All claims."""
    arms, (low, middle, high) = lab.arms, RATIOS
    lab.gate("FedAvg is above 70%", gap("accuracy", arms[FEDAVG].values, [70]))
    lab.gate("clients need each other: one alone is worse", lab.ahead(FEDAVG, ALONE, 1.0))
    for key, ratio in (("hundred", low), ("thousand", high)):
        lab.judge(key, *(lab.ahead(at_ratio(OURS, ratio) + mark, FEDAVG + mark, -2.0) for mark in SPLITS))
    lab.judge("clusters", *(lab.ahead(at_ratio(OURS, low) + mark, TOP + mark, -1.0) for mark in SPLITS))
    lab.judge("feedback", lab.ahead(at_ratio(FED_BACK, high), at_ratio(OURS, high), 2.0))
    skewed = list(SPLITS)[-1]
    lab.judge("skewed", lab.ahead(at_ratio(FED_BACK, middle) + skewed, FEDAVG + skewed, -2.0))
    names = [f"one update, {ratio} times" for ratio in RATIOS]
    lab.judge(
        "gaps",
        *(
            gap(f"{rival} over gaps, {name}", arms[name].also[rival], arms[name].also[GAPS])
            for name in names
            for rival in (HUFFMAN, TABLES)
        ),
    )
    told = "; ".join(
        f"{ratio} times, z {sum(arms[at_ratio(OURS, ratio)].also[SHARE]) / len(lab.seeds):.2g}%" for ratio in RATIOS
    )
    lab.say(f"The share of entries that fits: {told}.")
    lab.say("Labels take at least one bit each by Huffman's code, so that it ends at 32 times, whatever z is.")
