"""Mutants of artifacts of every form and coding, each loaded in a process of limited memory and time.

    python benchmarks/fuzz.py [--mutants 50000] [--seed 0] [--workers 2] [--seconds S] [--only NUMBER] [--save]

prints counts by kind of change and by seed, keeps failing mutants in build/fuzz, and exits with 1 if there are any.
Mutant NUMBER of a seed is always the same one. With --save docs/results/fuzz.json is written.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from common import save_results
from fuzzing import run
from fuzzing.seeds import check_coverage, write_seeds


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mutants", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--only", type=int)
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="octavo-fuzz-") as root:
        start = time.monotonic()
        seeds = write_seeds(Path(root))
        check_coverage(seeds)
        print(f"{len(seeds)} honest artifacts in {time.monotonic() - start:.0f} s", flush=True)
        import_all()
        honest = {seed.name: run.honest_of(seed) for seed in seeds}
        numbers = [options.only] if options.only is not None else list(range(options.mutants))
        start = time.monotonic()
        tally = work(seeds, honest, options, numbers)
        seconds = time.monotonic() - start
    show(tally, seconds)
    if options.save:
        save_results("fuzz", summary(tally, seconds, options))
    sys.exit(1 if tally.failures else 0)


def import_all() -> None:
    """Import what loads artifacts once, before the processes that load are forked."""
    import sentence_transformers  # noqa: F401
    import transformers

    import octavo.cli.looking
    import octavo.integrations.quantizer  # noqa: F401

    transformers.utils.logging.set_verbosity_error()
    # A fork that collects garbage would otherwise touch, and so copy, every object of this process.
    gc.collect()
    gc.freeze()


def work(seeds: list, honest: dict, options: argparse.Namespace, numbers: list[int]) -> run.Tally:
    """Share the mutants among forks of this process."""
    if options.workers <= 1:
        return run.fuzz(seeds, honest, options.seed, numbers, options.keep, options.seconds)
    outs, children = [], []
    for worker in range(options.workers):
        out, into = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(out)
                tally = run.fuzz(
                    seeds, honest, options.seed, numbers[worker :: options.workers], options.keep, options.seconds
                )
                with open(into, "w", encoding="utf-8") as stream:
                    json.dump(tally.plain(), stream)
                code = 0
            finally:
                if code:
                    import traceback

                    traceback.print_exc()
                os._exit(code)
        os.close(into)
        outs.append(out)
        children.append(child)
    total = run.Tally()
    for out, child in zip(outs, children, strict=True):
        with open(out, encoding="utf-8") as stream:
            content = stream.read()
        if os.waitpid(child, 0)[1] or not content:
            sys.exit("a worker of the fuzzer failed; see above")
        total.add(run.Tally.of(json.loads(content)))
    return total


def table(tally: run.Tally, place: int) -> dict[str, dict[str, int]]:
    """Counts by verdict, of each seed or each mutation."""
    rows: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for key, count in tally.counts.items():
        rows[key[place]][key[2]] += count
    return {
        name: {verdict: rows[name][verdict] for verdict in run.ORDER if rows[name][verdict]} for name in sorted(rows)
    }


def show(tally: run.Tally, seconds: float) -> None:
    """Print the tables."""
    total = sum(tally.counts.values())
    used = [verdict for verdict in run.ORDER if any(key[2] == verdict for key in tally.counts)]
    for place, title in ((0, "seed"), (1, "change")):
        print(f"{title:32}" + "".join(f"{verdict:>10}" for verdict in used))
        for name, row in table(tally, place).items():
            print(f"{name:32}" + "".join(f"{row.get(verdict, 0):>10}" for verdict in used))
        print()
    for key, failure in sorted(tally.failures.items(), key=lambda item: -run.ORDER.index(item[1]["verdict"])):
        print(
            f"{failure['count']:5} x {key}\n        mutant {failure['number']} of {failure['seed']} ({failure['mutation']}), {failure['bytes']} bytes: {failure['detail'][:300]}"
        )
    verdicts = collections.Counter()
    for key, count in tally.counts.items():
        verdicts[key[2]] += count
    print(f"{total} mutants in {seconds:.0f} s: " + ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in used))
    print(f"most memory beyond 4 x the files: {tally.peak / 1e6:.0f} MB")


def summary(tally: run.Tally, seconds: float, options: argparse.Namespace) -> dict:
    """What is saved."""
    return {
        "mutants": sum(tally.counts.values()), "seed": options.seed, "workers": options.workers, "seconds": round(seconds),
        "failing": sum(failure["count"] for failure in tally.failures.values()), "peak_bytes_beyond_4_files": tally.peak,
        "by_change": table(tally, 1), "by_seed": table(tally, 0), "failures": list(tally.failures.values()),
    }  # fmt: skip


if __name__ == "__main__":
    main()
