"""How long factorizations take: curves of all ranks of MiniLM's linear layers, and its table as a matrix product operator.

Writes docs/results/factor-speed.json. Under a minute.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from common import brown, minilm, save_results
from transformers import AutoModel

from octavo.calibration.calibrating import calibrate
from octavo.calibration.objective import Cosine
from octavo.methods.factorize.factors import whitened
from octavo.methods.factorize.mpo import bond, decompose, elements, modes
from octavo.sources.source import from_module
from octavo.sources.tokens import text_batches


def main() -> None:
    source = from_module(AutoModel.from_pretrained(minilm()).eval())
    sites, _ = source.sites()
    texts, _ = brown()
    found = calibrate(source, sites, text_batches(minilm(), texts), Cosine())
    linear = [site for site in sites if site.kind == "linear"]
    began = time.perf_counter()
    ranks, losses = 0, []
    for site in linear:
        evidence = found.evidence[site.name]
        parts = whitened(source.read(site.name), evidence.rows, evidence.columns)
        losses.append(parts.losses)
        ranks += len(parts.losses)
    curves = {"layers": len(linear), "points": ranks, "seconds": time.perf_counter() - began}
    print(curves, flush=True)
    table = source.read(next(site.name for site in sites if site.rows == 30522))
    chains: list[dict[str, Any]] = []
    for count in (2, 3):
        split = modes(len(table), count), modes(table.shape[1], count)[::-1]
        chi = bond(*split, table.numel() / 4)
        began = time.perf_counter()
        chain = decompose(table, *split, chi)
        seconds = time.perf_counter() - began
        form = chain.dense()
        chains.append(
            {
                "cores": count, "modes": [list(part) for part in split], "chi": chi,
                "share": elements(*split, chi) / table.numel(), "seconds": seconds,
                "relative_error": float((form.dense() - table).norm() / table.norm()),
            }
        )  # fmt: skip
        print(chains[-1], flush=True)
    save_results(
        "factor-speed",
        {"curves": curves, "table": list(table.shape), "chains": chains, "threads": torch.get_num_threads()},
    )


if __name__ == "__main__":
    main()
