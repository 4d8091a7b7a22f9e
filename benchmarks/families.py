"""What factorization adds: the chosen plan with all families against the best plan without it, at the same bytes.

On MiniLM, SmolLM2-135M and the small Llama of the studies, preset best, ratios 8, 12 and 16, judged on texts that neither
calibration nor the choice of the plan saw. What was measured and encoded before is used again. Writes docs/results/families.json.

    python benchmarks/families.py [minilm] [smollm2] [llama]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import CACHE, brown, load_results, minilm, save_results, stat_bytes, windows
from models import model_folder

import octavo
from octavo.allocation.counting import MARGIN
from octavo.allocation.solver import allocate
from octavo.calibration.objective import KL, Cosine, Objective
from octavo.encoding.finish import Built, contest
from octavo.encoding.reconstruct import reconstruct, reserve
from octavo.methods import methods
from octavo.recipes.frame import Lab, get_study
from octavo.recipes.frame.bases import language_model
from octavo.saving import Compressed
from octavo.sources.tokens import text_batches

RATIOS = (8, 12, 16)


@dataclass
class Case:
    """A source, what it is calibrated on, and how it is judged."""

    source: Any
    data: Any
    objective: Objective
    test: list[Any]
    reference: Callable[[], Any]


def encoder() -> Case:
    """MiniLM and the Brown corpus."""
    from transformers import AutoModel

    calibration, test = brown()
    load = lambda: AutoModel.from_pretrained(minilm()).eval()  # noqa: E731
    return Case(minilm(), calibration, Cosine(), text_batches(minilm(), test), load)


def smollm2() -> Case:
    """SmolLM2-135M-Instruct, on the windows of the benchmark beside other tools."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder("smollm2")
    calibration, test = windows(AutoTokenizer.from_pretrained(folder))
    load = lambda: AutoModelForCausalLM.from_pretrained(folder).float().eval()  # noqa: E731
    return Case(folder, _batches(calibration, 16), KL(), _batches(test, 2), load)


def llama() -> Case:
    """The Llama of six layers that the studies train."""
    model, found = language_model(Lab(get_study("trp")))
    # Windows are in random order.
    calibration, test = found.train[:256], found.test[:512]
    return Case(model, _batches(calibration, 32), KL(), _batches(test, 32), lambda: model)


def _batches(ids: torch.Tensor, size: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": part} for part in ids.split(size)]


CASES: dict[str, Callable[[], Case]] = {"minilm": encoder, "llama": llama, "smollm2": smollm2}


def compare(name: str, ratio: int, case: Case, reference: list[torch.Tensor]) -> dict[str, Any]:
    """One ratio: the plan that Octavo chose, and the one that it would choose without the family."""
    work = CACHE / "families" / name
    done = octavo.compress(
        case.source, ratio=ratio, data=case.data, objective=case.objective, preset="best", workspace=work, resume=True
    )
    report = done.save(work / f"all-{ratio}", overwrite=True)
    without = replace(done, built=_without(done), rival=None)
    without.save(work / f"without-{ratio}", overwrite=True)
    sites = [site for site in report["sites"] if site["family"] == "factorize"]
    return {
        "model": name, "ratio": ratio, "budget": done.budget.bytes, "metric": case.objective.metric,
        "bytes": stat_bytes(work / f"all-{ratio}"), "without_bytes": stat_bytes(work / f"without-{ratio}"),
        "held_back": done.built.quality, "without_held_back": without.built.quality,
        "quality": judge(case, reference, work / f"all-{ratio}"),
        "without_quality": judge(case, reference, work / f"without-{ratio}"),
        "factorized_sites": len(sites), "sites": len(report["sites"]),
        "factorized_bytes": sum(site["bytes"] for site in sites),
        "factorized_methods": sorted({site["method"] for site in sites}), "unused": report["unused"],
    }  # fmt: skip


def _without(done: Compressed) -> Built:
    """What is made of the same curves without the points of the family, by the steps of ``octavo.compress``."""
    names = {name for name, cls in methods().items() if cls.family != "factorize"}
    curves = [replace(curve, points=[p for p in curve.points if p.method in names]) for curve in done.profile.curves]
    profile, asked = replace(done.profile, curves=curves), done.budget
    free = replace(asked, bytes=asked.bytes - reserve(done.opened, asked.bytes))
    best, _ = contest(done.run, profile, allocate(profile, free, margin=MARGIN), free)
    return reconstruct(done.run, best, asked.bytes)


def judge(case: Case, reference: list[torch.Tensor], folder: Path) -> float:
    """Divergence on the test texts of what was read back."""
    model = case.reference()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = octavo.Artifact(folder).state()
    model.load_state_dict({name: state[name] for name in kept if name in state}, strict=False)
    value = float(case.objective.measure(model, case.test, reference).mean())
    model.load_state_dict(kept)
    return value


def main() -> None:
    asked = sys.argv[1:] or list(CASES)
    rows = {(row["model"], row["ratio"]): row for row in load_results("families").get("rows", [])}
    for name in asked:
        case = CASES[name]()
        reference = case.objective.reference(case.reference(), case.test)
        for ratio in RATIOS:
            rows[name, ratio] = compare(name, ratio, case, reference)
            print(json.dumps(rows[name, ratio]), flush=True)
            save_results("families", {"rows": list(rows.values())})


if __name__ == "__main__":
    main()
