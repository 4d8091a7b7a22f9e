"""How fast codecs of updates encode and decode on one core, and at which link speed they pay.

A heavy-tailed update of four matrices and four vectors is sent at a ratio of 50, with error feedback where a codec
has it. Medians are given of the steps after those in which feedback builds up. Times are those of the core, so that
other work on the machine does not count. They are those of a process that has imported numba, as a worker does once it
has received 32 MB. Of two workers each encodes one payload and decodes two, as `compress_ddp` does.
Writes docs/results/updates.json. Under two minutes.
"""

from __future__ import annotations

import statistics
import time

import numba  # noqa: F401
import torch
from common import save_results

from octavo.flows import FLOWS, Schema
from octavo.flows.updates import UpdateCodec

RATIO, STEPS, SETTLED, SHAPES = (
    50,
    24,
    8,
    {"embedding": (4096, 256), "up": (1024, 512), "down": (512, 1024), "conv": (256, 128, 3, 3)},
)


def update(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        for suffix, part in (("weight", shape), ("bias", shape[:1])):
            found[f"{name}.{suffix}"] = 1e-3 * torch.randn(part, generator=g) * torch.randn(part, generator=g).exp()
    return found


def measured(codec: UpdateCodec, budget: int) -> dict[str, float]:
    began = time.process_time()
    plan = codec.fit([update(0)], budget)
    fit = time.process_time() - began
    sender, receiver, times, errors, payload = codec.start(plan), codec.start(plan), [], [], b""
    for seed in range(STEPS):
        sent = update(seed)
        began = time.process_time()
        payload = codec.encode(sent, sender)
        encoded = time.process_time()
        found = plan.schema.flat(codec.decode(payload, receiver))
        times.append((encoded - began, time.process_time() - encoded))
        flat = plan.schema.flat(sent)
        errors.append(float((flat - found).square().sum() / flat.square().sum()))
    encode, decode = (statistics.median(part) for part in zip(*times[SETTLED:], strict=True))
    million, saved = plan.schema.elements / 1e6, plan.schema.nbytes - len(payload)
    return {
        "bytes": len(payload), "ratio": plan.schema.nbytes / len(payload), "first_error": errors[0], "fit_seconds": fit,
        "encode_million_values_per_second": million / encode, "decode_million_values_per_second": million / decode,
        "pays_below_mbit_per_second": 8e-6 * saved / (encode + 2 * decode),
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    schema, results = Schema.of(update(0)), {}
    for name, kind in FLOWS.all().items():
        if issubclass(kind, UpdateCodec):
            # Signs have one size, about a 32nd of float32.
            budget = schema.nbytes // (RATIO if name != "sign" else 30)
            results[name] = measured(kind(), budget)
            print(name, {key: round(value, 3) for key, value in results[name].items()}, flush=True)
    save_results("updates", {"elements": schema.elements, "threads": 1, "codecs": results})


if __name__ == "__main__":
    main()
