"""CompactifAI: attention and MLP matrices of a language model as matrix product operators, healed, then quantized."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from octavo.forms import Dense, Form, LowRank
from octavo.methods.factorize.factors import whitened
from octavo.methods.factorize.mpo import bond, decompose, elements, modes
from octavo.recipes import data, models
from octavo.recipes.base import Arm, Check, Finding, Trial, recipe
from octavo.recipes.stored import quantized, through_file
from octavo.train import fit, formed, next_token, settle

#: Elements of the factors as a share of those of the matrices.
_SHARES = (0.5, 0.25)
#: Learning rates of healing, one chosen for every arm on development text.
_RATES = (1e-4, 3e-4, 1e-3)
_STEPS, _BATCH = 32, 8
#: Bits a coefficient of the cores that are quantized after healing.
_BITS = 4.0


def _svd(weight: Tensor, budget: float) -> tuple[Form, int]:
    rank = max(1, int(budget / sum(weight.shape)))
    parts = whitened(weight, most=rank)
    return LowRank(Dense(parts.left), Dense(parts.right)), rank * sum(weight.shape)


def _mpo(sites: int) -> Callable[[Tensor, float], tuple[Form, int]]:
    def factor(weight: Tensor, budget: float) -> tuple[Form, int]:
        rows, columns = modes(weight.shape[0], sites), modes(weight.shape[1], sites)[::-1]
        chi = bond(rows, columns, budget)
        return decompose(weight, rows, columns, chi).dense(), elements(rows, columns, chi)

    return factor


#: A model, and the forms that its matrices were trained in.
_Healed = tuple[nn.Module, dict[str, Form]]
_METHODS = {"SVD": _svd, "MPO, 2 sites": _mpo(2), "MPO, 3 sites": _mpo(3)}


@dataclass
class _Bench:
    """The model, and what its forms are measured by."""

    trial: Trial
    model: Any
    windows: dict[str, Tensor]
    arms: list[Arm] = field(default_factory=list)

    def matrices(self) -> dict[str, Tensor]:
        """Those of attention and MLPs, by name."""
        return {
            name: weight.detach()
            for name, weight in self.model.named_parameters()
            if ".layers." in name and weight.ndim == 2
        }

    def factored(self, method: str, share: float, spared: int = 0) -> dict[str, Form]:
        """Matrices in factors with that share of all elements, the first layers, if any are spared, counted as dense.

        What a matrix does not use of its budget the next one may, so that sizes are equal.
        """
        forms, left, layers = {}, 0.0, self.model.config.num_hidden_layers
        for name, weight in self.matrices().items():
            if int(name.split(".layers.")[1].split(".")[0]) < spared:
                continue
            left += (share * layers - spared) / (layers - spared) * weight.numel()
            forms[name], used = _METHODS[method](weight, left)
            left -= used
        return forms

    def stored(self, forms: Mapping[str, Form], module: nn.Module | None = None) -> tuple[int, float]:
        """Bytes of the file, and perplexity on the test's windows of what was read back from it."""
        found = through_file(module or self.model, forms)
        return found.bytes, models.perplexity(found.load(copy.deepcopy(self.model)), self.windows["test"])

    def healed(self, forms: Mapping[str, Form], lr: float, seed: int) -> _Healed:
        """The model after a part of an epoch, with these forms trained in the place of its matrices."""
        model = copy.deepcopy(self.model)
        formed(model, forms)
        steps = 4 if self.trial.quick else _STEPS
        draw = models.shuffled(self.windows["train"], size=_BATCH, seed=100 + seed)

        def batches(epoch: int) -> Iterator[dict[str, Tensor]]:
            for _, (ids,) in zip(range(steps), draw(epoch), strict=False):
                yield {"input_ids": ids}

        fit(model, batches, next_token, lr=lr, seed=seed)
        return model, settle(model)

    def runs(self, forms: Mapping[str, Form]) -> tuple[float, list[_Healed]]:
        """The rate of least perplexity on development text after healing, and a healed model for every seed."""
        first, *others = self.trial.seeds
        tried = {rate: self.healed(forms, rate, first) for rate in _RATES}
        lr = min(tried, key=lambda rate: models.perplexity(tried[rate][0], self.windows["development"]))
        return lr, [tried[lr], *(self.healed(forms, lr, seed) for seed in others)]

    def add_healed(self, name: str, lr: float, runs: Sequence[_Healed]) -> Arm:
        """Remember an arm of healed models."""
        found = [self.stored(forms, model) for model, forms in runs]
        return self.add(name, found[0][0], [value for _, value in found], **{"learning rate": lr})

    def add(self, name: str, size: int, values: list[float], **also: float) -> Arm:
        """Remember an arm."""
        self.arms.append(Arm(name, size, tuple(values), also))
        return self.arms[-1]


@recipe(
    "compactifai",
    system="CompactifAI",
    source="Tomut et al. (2024), arXiv 2401.14109",
    claim="Of a language model whose attention and MLP matrices became matrix product operators, a brief retraining "
    "recovers most of what truncation lost, and late layers can be compressed more than early ones.",
    metric="perplexity on test text (lower is better)",
    data=data.TEXT,
)
def run(trial: Trial) -> Finding:
    """Two and three sites against SVD at equal bytes, before and after healing; by depth; then quantized."""
    model, windows = models.language_model(trial)
    # A quarter of the text to measure on, evenly spaced, tells arms apart and takes a quarter of the time.
    windows = {part: found if part == "train" or trial.quick else found[::4] for part, found in windows.items()}
    bench = _Bench(trial, model, windows)
    size, base = bench.stored({})
    bench.add("dense, float16", size, [base])
    trial.step("more training of the dense model")
    longer = bench.add_healed("dense, with the steps of healing", *bench.runs({}))
    cases = [(method, share, 0) for method in _METHODS for share in _SHARES]
    # The paper leaves the first blocks alone.
    cases += [(method, max(_SHARES), 1) for method in ("SVD", "MPO, 2 sites")]
    pairs: dict[str, tuple[float, Arm]] = {}
    kept: dict[str, _Healed] = {}
    for method, share, spared in cases:
        name = f"{method}, {share:.0%} of the elements{', first layer dense' * spared}"
        trial.step(name)
        forms = bench.factored(method, share, spared)
        size, cut = bench.stored(forms)
        bench.add(name, size, [cut])
        lr, runs = bench.runs(forms)
        pairs[name] = cut, bench.add_healed(f"{name}, healed", lr, runs)
        if share == max(_SHARES):
            kept[name] = runs[0]
    trial.step("quantized")
    _quantize(bench, kept)
    trial.step("layer by layer")
    depth = {method: _by_depth(bench, method, min(_SHARES)) for method in ("SVD", "MPO, 2 sites")}
    return _finding(bench, base, longer, pairs, depth)


def _quantize(bench: _Bench, kept: Mapping[str, _Healed]) -> None:
    """Healed factors in few bits, against the dense matrices in still fewer at the same bytes."""
    size = 0
    for name, (model, found) in kept.items():
        narrow = {site: quantized(form, _BITS) for site, form in found.items()}
        # A layer that was spared is quantized too.
        parameters = dict(model.named_parameters())
        narrow.update(
            (site, quantized(Dense(parameters[site].detach()), _BITS))
            for site in bench.matrices()
            if site not in narrow
        )
        size, value = bench.stored(narrow, model)
        bench.add(f"{name}, healed, in {_BITS:g} bits", size, [value])

    def dense(bits: float) -> dict[str, Form]:
        return {name: quantized(Dense(weight), bits) for name, weight in bench.matrices().items()}

    low, high = 0.5, 8.0
    for _ in range(5 if bench.trial.quick else 8):
        middle = (low + high) / 2
        low, high = (middle, high) if through_file(bench.model, dense(middle)).bytes <= size else (low, middle)
    size, value = bench.stored(dense(low))
    bench.add("dense matrices, quantized to that size, not healed", size, [value])


def _by_depth(bench: _Bench, method: str, share: float) -> list[float]:
    """What it adds to the mean negative log-likelihood to factor one layer alone, by its depth."""
    forms, added = bench.factored(method, share), []
    base = math.log(bench.arms[0].mean)
    for layer in range(bench.model.config.num_hidden_layers):
        alone = {name: form for name, form in forms.items() if f".layers.{layer}." in name}
        size, value = bench.stored(alone)
        added.append(math.log(value) - base)
        bench.add(f"{method}, {share:.0%} of the elements in layer {layer + 1} alone", size, [value])
    return added


def _finding(
    bench: _Bench,
    base: float,
    longer: Arm,
    pairs: Mapping[str, tuple[float, Arm]],
    depth: Mapping[str, list[float]],
) -> Finding:
    # In nats a token above the better of the dense model and the dense model after the same steps.
    best = min(base, longer.mean)
    losses = {name: (math.log(cut / best), math.log(arm.mean / best)) for name, (cut, arm) in pairs.items()}
    told = "; ".join(f"{name}: {cut:.3f} nats lost, {left:.3f} left" for name, (cut, left) in losses.items())
    half = len(next(iter(depth.values()))) // 2
    halves = {
        method: (
            statistics.fmean(added[:half]),
            statistics.fmean(added[1:half] or added[:1]),
            statistics.fmean(added[-half:]),
        )
        for method, added in depth.items()
    }
    deep = "; ".join(
        f"{method}: {early:.3f} nats in the first {half} layers ({inner:.3f} without the very first), "
        f"{late:.3f} in the last"
        for method, (early, inner, late) in halves.items()
    )
    chains = [value for name, value in losses.items() if name.startswith("MPO")]
    late_halves = [value for method, value in halves.items() if method.startswith("MPO")]
    checks = [
        Check(
            "Healing recovers most of what truncation lost.", all(left < cut / 2 for cut, left in chains), f"{told}."
        ),
        Check(
            "Late layers lose less than early ones.", all(late < early for early, _, late in late_halves), f"{deep}."
        ),
        Check(
            "They do so even without the very first layer.",
            all(late < inner for _, inner, late in late_halves),
            f"{deep}.",
        ),
    ]
    healed = "; ".join(f"{name} {arm.mean:.1f}" for name, (_, arm) in pairs.items())
    *few, plain = [arm for arm in bench.arms if f"{_BITS:g} bits" in arm.name or "quantized" in arm.name]
    winner = min(few, key=lambda arm: arm.mean)
    reason = (
        f"Perplexity after healing, at equal bytes: {healed} (dense {base:.1f}, {longer.mean:.1f} with as many steps). "
        f"Quantized, the best of the factored has {winner.mean:.1f} ({winner.name}), and the dense matrices in those "
        f"bytes, without any healing, {plain.mean:.1f}."
    )
    return Finding(bench.arms, checks, reason)
