"""A DeepFM on MovieLens-100k at 20 and 100 times smaller: AUC, bytes and lookups, beside the best of the table methods.

    python benchmarks/recommender.py [--ratios 20,100] [--minutes 2]

writes docs/results/recommender.json. octavo.compress gets the trained model and unlabeled examples, without and with the
source as teacher. The table methods are those of the study vector-storage that train from the start as they are stored.
Of them only tables become small, so their perceptron is quantized to as many bits as Octavo's, and each fills the same
bytes. The best of them is chosen on development data. The source's bytes are those in float32.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common import CACHE, load_results, save_results
from torch import Tensor, nn

import octavo
from octavo.forms import Dense
from octavo.recipes.frame import Lab, Stored, get_study, quantized
from octavo.recipes.testbeds.ctr import CTR, ClickKL, auc, clicks, crossed
from octavo.recipes.testbeds.table_arms import CHOSEN, LOOKUP, Comparison, lookup_time, named
from octavo.recipes.testbeds.table_methods import CODED, SHARING, THIN
from octavo.training.tables import settle_tables

SEED, BATCH = 0, 512
#: Share of the bytes of the tables at which a method's knob begins.
_LEAST = 0.01


class Filled(Comparison):
    """Arms whose tables are a method's, and whose other matrices have a few bits a weight."""

    bits = 4.0

    def stored(self, model: nn.Module) -> tuple[nn.Module, Stored, Callable[[Tensor], Tensor]]:
        made = copy.deepcopy(model)
        forms = settle_tables(made)
        last = list(self.counts)[-1]
        form = forms.get(f"{last}.weight")
        rest = {n: w.detach() for n, w in made.named_parameters() if w.ndim > 1 and n not in forms and min(w.shape) > 1}
        coded = {name: quantized(Dense(weight), self.bits) for name, weight in rest.items()}
        return (
            made,
            self.lab.stored(made, {**forms, **coded}),
            form.lookup if form is not None else made.get_submodule(last),
        )


@dataclass(frozen=True)
class Task:
    """The data, the trained model, and the arms of the study."""

    comparison: Filled
    dense: nn.Module

    @property
    def largest(self) -> str:
        """The name of the largest table."""
        return list(self.comparison.counts)[-1]


def ours(task: Task, ratio: float, **more: Any) -> dict[str, Any]:
    """The trained model through a file."""
    data, folder = task.comparison.data, CACHE / "recommender"
    examples = list(data.train[0].split(BATCH))
    done = octavo.compress(task.dense, ratio=ratio, data=examples, objective=ClickKL(), progress=False, **more)
    report = done.save(folder, overwrite=True, progress=False)
    loaded = octavo.load(folder, into=CTR(data.sizes)).eval()
    assert isinstance(loaded, nn.Module)
    form = octavo.Artifact(folder).form(f"{task.largest}.weight")
    rows = len(task.comparison.counts[task.largest])
    rest = [site for site in report.sites if site.name.startswith("mlp")]
    return {
        "tool": "octavo" if not more else "octavo, taught",
        "ratio": ratio,
        "bytes": report.artifact.bytes,
        "auc": auc(loaded, data.test),
        "lookup": lookup_time(form.lookup, rows),
        "bits": 8 * sum(site.bytes for site in rest) / sum(site.parameters for site in rest),
        **({"minutes": done.recovery.minutes, "steps": done.recovery.steps} if done.recovery else {}),
    }


def theirs(task: Task, size: int, bits: float) -> list[dict[str, Any]]:
    """Every table method in the same bytes, best on development data first."""
    found = task.comparison
    found.bits = bits
    rest = found.lab.stored(task.dense, {}).bytes - 2 * found.elements
    share = max(_LEAST, (size - rest * bits / 16) / (2 * found.elements))
    arms = {**SHARING, **CODED, **THIN}
    for name, make in arms.items():
        found.direct(name, make, share, size)
    made = {name: found.lab.arms[named(name, share)] for name in arms if named(name, share) in found.lab.arms}
    rows = [
        {"tool": name, "bytes": arm.bytes, "auc": arm.values[-1], "chosen": arm.also[CHOSEN][-1], "lookup": arm.also[LOOKUP][-1]}
        for name, arm in made.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row["chosen"])


def main() -> None:
    """Train, compress, compare, and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", default="20,100")
    parser.add_argument("--minutes", type=float, default=2, help="how long the source teaches")
    asked = parser.parse_args()
    lab = Lab(get_study("vector-storage"), show=lambda text: print(text, flush=True))
    data = crossed(clicks(lab, shuffle=SEED), [(0, 5)])
    comparison = Filled(lab, data, SEED, {})
    rate = comparison.rate("dense", lambda lr: comparison.trained(comparison.net(), lr, None))
    dense = comparison.trained(comparison.net(), rate, "dense").eval()
    task = Task(comparison, dense)
    whole = sum(4 * weight.numel() for weight in dense.parameters())
    rows = load_results("recommender").get("rows", [])
    for ratio in map(float, asked.ratios.split(",")):
        plain = ours(task, ratio)
        taught = ours(task, ratio, recover="distill", minutes=asked.minutes)
        others = [{**row, "ratio": ratio} for row in theirs(task, plain["bytes"], plain["bits"])]
        rows = [*(row for row in rows if row["ratio"] != ratio), plain, taught, *others]
        print(*rows, sep="\n", flush=True)
        reading = lookup_time(dense.get_submodule(task.largest), len(comparison.counts[task.largest]))
        save_results(
            "recommender",
            {"source_bytes": whole, "auc": auc(dense, data.test), "lookup": reading, "rows": rows},
            f"--ratios {asked.ratios} --minutes {asked.minutes:g}",
        )


if __name__ == "__main__":
    main()
