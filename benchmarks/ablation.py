"""What each ingredient of the quality per byte bought: every one taken out of, or added to, one plain encoding.

The plain encoding is entropy-constrained quantization with one step for the whole model, as `--preset fast` begins
with. It is measured at some steps, which gives a curve of quality over exact artifact bytes; a variant is measured at
one step, and compared with the curve at its own bytes (linear in the logarithm of both). Choices were made on the
development text; the test text was measured once, for the table.

`python benchmarks/ablation.py [minilm] [smollm2] [--only PART]`; figures are saved as they come.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from common import CACHE, _brown_files, brown, load_results, save_results, windows
from models import TITLES, model_folder
from torch import Tensor

import octavo.encoding.reconstruct as reconstruction
from octavo import coding
from octavo.allocation.budget import Budget
from octavo.allocation.encoded import as_weights, seal
from octavo.allocation.plans import Plan
from octavo.allocation.profiles import Point
from octavo.allocation.workspace import Workspace
from octavo.artifact import pack
from octavo.calibration.evidence import Evidence
from octavo.calibration.inmemory import replaced
from octavo.calibration.watches import DAMPING
from octavo.encoding.finish import Built
from octavo.forms import Form, Grid
from octavo.methods import get_method
from octavo.methods.quantize.entropy import Entropy
from octavo.opening import begin, open_request
from octavo.request import Request
from octavo.sources.narrowing import Narrowing
from octavo.sources.sites import Site
from octavo.sources.tokens import text_batches
from octavo.system.executors import Local
from octavo.system.progress import silent
from octavo.targets import get_target

#: Steps of the plain curve, and those at which variants are measured: near ratios 16 and 8, and near 45 and 58 MB.
CURVE = {"minilm": (2.6e-4, 1.9e-4, 1.1e-4, 7.5e-5), "smollm2": (2.6e-4, 1.9e-4, 1.3e-4)}
STEPS = {"minilm": (2.1e-4, 8.5e-5), "smollm2": (2.2e-4, 1.5e-4)}

Encoder = Callable[[Site, Tensor, Evidence, float], Form]


def plain(site: Site, weight: Tensor, evidence: Evidence, step: float) -> Form:
    """Everything that the method does on its own."""
    return Entropy().encode(weight, {"step": step}, evidence)


def without_rate(site: Site, weight: Tensor, evidence: Evidence, step: float) -> Form:
    """Nearest levels, whatever they cost in bits."""
    return Entropy(rate=0.0).encode(weight, {"step": step}, evidence)


def without_rows(site: Site, weight: Tensor, evidence: Evidence, step: float) -> Form:
    """Every output weighs the same within a site; sites still differ by their mean."""
    rows = evidence.rows.mean().expand(site.rows).clone()
    return plain(site, weight, replace(evidence, rows=rows), step)


def without_feedback(site: Site, weight: Tensor, evidence: Evidence, step: float) -> Form:
    """Columns weigh by their second moment, and errors are not passed on."""
    if evidence.columns is None:
        return plain(site, weight, evidence, step)
    return plain(site, weight, Evidence(evidence.rows, torch.diag(evidence.columns.diagonal())), step)


@dataclass(frozen=True)
class Priced(Form):
    """A matrix with the form by which its bytes are counted: what would be stored beside that takes a few bytes a site."""

    counted: Form
    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.counted.shape

    def tensors(self) -> dict[str, Tensor]:
        return self.counted.tensors()

    def meta(self) -> dict[str, Any]:
        return self.counted.meta()

    @classmethod
    def restore(cls, tensors: Any, meta: Any, shape: Any) -> Priced:
        raise NotImplementedError("for measuring only")

    def dense(self) -> Tensor:
        return self.matrix


def rotated(site: Site, weight: Tensor, evidence: Evidence, step: float) -> Form:
    """Random rotation of the inputs of linear layers (QuIP#, arXiv 2402.04396), undone after decoding."""
    if site.kind != "linear" or evidence.columns is None:
        return plain(site, weight, evidence, step)
    generator = torch.Generator().manual_seed(site.columns)
    turn = torch.linalg.qr(torch.randn(site.columns, site.columns, generator=generator)).Q
    turned = Evidence(evidence.rows, turn.t() @ evidence.columns @ turn)
    form = plain(site, weight @ turn, turned, step)
    return Priced(form, form.dense() @ turn.t())


def corrected(site: Site, weight: Tensor, evidence: Evidence, step: float) -> Form:
    """A correction of rank 8 in 4 bits for every linear layer (EoRA, arXiv 2410.21271)."""
    if site.kind != "linear" or evidence.columns is None:
        return plain(site, weight, evidence, step)
    return get_method("eora").encode(weight, {"step": step, "rank": 8, "bits": 4}, evidence)


def centroids(site: Site, weight: Tensor, evidence: Evidence, step: float) -> Form:
    """Levels -1 and 1 moved to where they cost least, one float a site."""
    form = plain(site, weight, evidence, step)
    assert isinstance(form, Grid)
    ones = replace(form, codes=torch.where(form.codes.abs() == 1, form.codes, 0))
    error, direction = weight - form.dense(), ones.dense()
    moved = direction if evidence.columns is None else direction @ evidence.columns
    moved = moved * evidence.rows[:, None]
    share = float((error * moved).sum() / (direction * moved).sum().clamp_min(1e-30))
    return Priced(form, form.dense() + share * direction)


def trellis(site: Site, weight: Tensor, evidence: Evidence, step: float) -> Form:
    """Dependent quantizers on a trellis, with the same steps."""
    return get_method("trellis").encode(weight, {"step": step}, evidence)


ENCODERS: dict[str, Encoder] = {
    "rate-aware rounding": without_rate,
    "weights of outputs (gradients) beside those of inputs": without_rows,
    "error feedback over columns": without_feedback,
    "trellis codes": trellis,
    "incoherence rotation of inputs": rotated,
    "low-rank correction, rank 8": corrected,
    "reconstruction points of levels ±1": centroids,
}


class Bench:
    """A model with its evidence and two texts to measure on."""

    def __init__(self, name: str) -> None:
        self.name, folder = name, model_folder(name)
        if name == "minilm":
            calibration, test = brown()
            development = _sentences(set(test))
            asked = Request(folder, data=calibration)
            self.texts = {"development": text_batches(folder, development), "test": text_batches(folder, test)}
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokens, test = windows(tokenizer)
            batches = [{"input_ids": piece} for piece in tokens.split(4)]
            asked = Request(folder, data=batches, objective="kl")
            self.texts = {
                "development": [{"input_ids": piece} for piece in _running(tokenizer).split(2)],
                "test": [{"input_ids": piece} for piece in test[::3].split(2)],
            }
        folder = CACHE / "ablation" / name
        self.opened = open_request(asked, get_target("disk"), silent)
        room = Workspace(folder, self.opened.identity(), resume=folder.exists())
        self.run = begin(self.opened, room, Local(), silent)
        self.module = self.opened.source.module
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=name != "minilm")
        with replaced(self.module, {}), self.autocast:
            self.references = {
                text: [r.to(torch.bfloat16) if name != "minilm" else r for r in self.opened.objective.reference(self.module, b)]
                for text, b in self.texts.items()
            }  # fmt: skip

    def measure(self, weights: dict[str, Tensor]) -> dict[str, float]:
        """Mean divergence from the source on both texts."""
        new = {self.opened.source.parameters[name]: weight for name, weight in weights.items()}
        with replaced(self.module, new), self.autocast:
            return {
                text: float(self.opened.objective.measure(self.module, batches, [r.float() for r in self.references[text]]).mean())
                for text, batches in self.texts.items()
            }  # fmt: skip

    def encode(self, encoder: Encoder, step: float, change: dict[str, Evidence] | None = None) -> dict[str, Form]:
        """Forms of all sites."""
        evidence = {**self.run.calibration.evidence, **(change or {})}
        return {
            site.name: encoder(site, self.opened.matrix(site), evidence[site.name], step) for site in self.opened.sites
        }

    def row(self, forms: dict[str, Form], step: float) -> tuple[dict[str, Any], Built]:
        """Bytes and quality of forms; and the whole as a plan that was built."""
        packed = {name: pack(form) for name, form in forms.items()}
        contents = seal(self.opened, packed, Narrowing.SCALE)
        weights = {name: self.opened.site(name).layout.from_matrix(form.dense(), self.opened.site(name).shape)
                   for name, form in forms.items()}  # fmt: skip
        kept = {name: item.tensor().to(item.dtype) for name, item in contents.kept.items()}
        quality = self.measure({**weights, **{n: t for n, t in kept.items() if n in self.opened.source.parameters}})
        points = {name: Point("entropy", {"step": step}, item.bytes, 0.0) for name, item in packed.items()}
        plan = Plan(Budget(contents.bytes, "ablation"), points, 0.0, 0)
        held = (
            {**as_weights(self.opened, packed), **kept}
            if not any(isinstance(f, Priced) for f in forms.values())
            else {}
        )
        built = Built(
            plan,
            packed,
            contents,
            contents.bytes,
            contents.bytes,
            float(self.run.measure(held).mean()) if held else 0.0,
        )
        return {"step": step, "bytes": contents.bytes, **quality}, built


def _sentences(test: set[str]) -> list[str]:
    """384 sentences of the files that the test sentences come from, none of which is one."""
    side = [
        line for k, (_, lines) in enumerate(_brown_files()) if k % 2 for line in lines if 6 <= len(line.split()) <= 40
    ]
    side = [line for line in side if line not in test]
    return [side[i] for i in np.random.default_rng(1).choice(len(side), 384, replace=False)]


def _running(tokenizer: Any) -> Tensor:
    """Four windows of 512 tokens from odd-numbered files of Brown, no news."""
    files = [" ".join(lines) for number, (name, lines) in enumerate(_brown_files()) if number % 2 and name[1] != "a"]
    tokens = tokenizer(" ".join(files), add_special_tokens=False).input_ids
    starts = np.linspace(0, len(tokens) - 512, 4).astype(int)
    return torch.tensor([tokens[start : start + 512] for start in starts])


def frequencies(bench: Bench, power: float) -> dict[str, Evidence]:
    """Evidence of the word embedding with token frequencies to another power."""
    site = max((s for s in bench.opened.sites if s.kind == "embedding"), key=lambda s: s.rows)
    counts = torch.zeros(site.rows, dtype=torch.float64)
    for batch in bench.opened.calibration_data:
        tokens = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(tokens)).bool()
        counts += torch.bincount(tokens[mask], minlength=site.rows)
    missing = (counts == 1).sum() / counts.sum()
    share = counts / counts.sum() * (1 - missing)
    share[counts == 0] = missing / (counts == 0).sum()
    weights = share**power / (share**power).sum() * bench.run.calibration.tokens / bench.run.calibration.sequences
    weights = (weights + DAMPING * weights.mean()).float()
    old = bench.run.calibration.evidence[site.name]
    return {site.name: replace(old, rows=weights, terms=())}


def run(name: str, only: list[str] | None) -> None:
    """Measure one model and save its part of the results."""
    bench, start = Bench(name), time.perf_counter()

    def done(part: str, row: dict[str, Any]) -> None:
        # Other models may be measured at the same time.
        results = load_results("ablation")
        mine = results.setdefault("models", {}).setdefault(
            name, {"title": TITLES[name], "metric": bench.opened.objective.metric}
        )
        mine[part] = [*(old for old in mine.get(part, []) if old["step"] != row["step"]), row]
        save_results("ablation", {"models": results["models"]})
        print(f"{time.perf_counter() - start:6.0f} s  {name} {part} {row}", flush=True)

    wanted = lambda part: not only or any(word in part for word in only)  # noqa: E731
    for step in CURVE[name] if wanted("plain") else ():
        done("plain", bench.row(bench.encode(plain, step), step)[0])
    for step in STEPS[name]:
        if any(map(wanted, ("reconstruction", "classes"))):
            forms = bench.encode(plain, step)
            row, built = bench.row(forms, step)
            done("plain", row)
        if wanted("classes of rows and columns in the coder"):
            flat = sum(
                len(coding.encode(form.codes.flatten())) - len(coding.encode(form.codes)) for form in forms.values()
            )
            done("classes of rows and columns in the coder", {**row, "bytes": row["bytes"] + flat})
        if wanted("reconstruction"):
            fit = reconstruction._Fit(bench.run, built)
            fit.learn(reconstruction.POSITIONS["default"])
            for part, gains in (("reconstruction of norms and biases", False), ("reconstruction with row gains", True)):
                found = fit.built(gains=gains)
                tensors = {
                    **as_weights(bench.opened, found.packed),
                    **{n: k.tensor().float() for n, k in found.contents.kept.items()},
                }
                tensors = {n: t for n, t in tensors.items() if n in bench.opened.source.parameters}
                done(part, {"step": step, "bytes": found.bytes, **bench.measure(tensors)})
        for part, encoder in ENCODERS.items():
            if wanted(part):
                done(part, bench.row(bench.encode(encoder, step), step)[0])
        # A tied embedding weighs its rows as a head as well.
        for power in (0.0, 1.0) if name == "minilm" else ():
            if wanted(f"token frequencies to the power {power:g}"):
                change = frequencies(bench, power)
                done(f"token frequencies to the power {power:g}", bench.row(bench.encode(plain, step, change), step)[0])


def main() -> None:
    """Measure the models asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["minilm", "smollm2"])
    parser.add_argument("--only", action="append", help="measure only what has this in its name; may be repeated")
    asked = parser.parse_args()
    for name in asked.models:
        run(name, asked.only)


if __name__ == "__main__":
    main()
