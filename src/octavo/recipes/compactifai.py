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
_RATES = (1e-3, 3e-3)
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

    def factored(self, method: str, share: float) -> dict[str, Form]:
        """All matrices in factors; what one does not use of its budget the next one may, so that sizes are equal."""
        forms, left = {}, 0.0
        for name, weight in self.matrices().items():
            left += share * weight.numel()
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

    def runs(self, forms: Mapping[str, Form], lr: float | None) -> tuple[float, list[_Healed]]:
        """A healed model for every seed, and the rate; without one that of least perplexity on development text."""
        first, *others = self.trial.seeds
        tried = {rate: self.healed(forms, rate, first) for rate in (_RATES if lr is None else (lr,))}
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
    longer = bench.add_healed("dense, with the steps of healing", *bench.runs({}, None))
    pairs: dict[tuple[str, float], tuple[float, Arm]] = {}
    kept: dict[str, _Healed] = {}
    for method in _METHODS:
        lr = None
        for share in sorted(_SHARES):
            trial.step(f"{method} at {share:.0%}")
            forms, name = bench.factored(method, share), f"{method}, {share:.0%} of the elements"
            size, cut = bench.stored(forms)
            bench.add(name, size, [cut])
            # The rate is chosen at the smaller size, where more has to be healed.
            lr, runs = bench.runs(forms, lr)
            pairs[method, share], kept[method] = (cut, bench.add_healed(f"{name}, healed", lr, runs)), runs[0]
    trial.step("quantized")
    _quantize(bench, kept)
    trial.step("layer by layer")
    depth = {method: _by_depth(bench, method, min(_SHARES)) for method in _METHODS}
    return _finding(bench, base, longer, pairs, depth)


def _quantize(bench: _Bench, kept: Mapping[str, _Healed]) -> None:
    """Healed factors in few bits, against the dense matrices in still fewer at the same bytes."""
    size = 0
    for method in _METHODS:
        model, found = kept[method]
        size, value = bench.stored({name: quantized(form, _BITS) for name, form in found.items()}, model)
        name = f"{method}, {max(_SHARES):.0%} of the elements, healed, in {_BITS:g} bits"
        bench.add(name, size, [value])

    def dense(bits: float) -> dict[str, Form]:
        return {name: quantized(Dense(weight), bits) for name, weight in bench.matrices().items()}

    low, high = 0.5, 8.0
    for _ in range(5 if bench.trial.quick else 8):
        middle = (low + high) / 2
        low, high = (middle, high) if through_file(bench.model, dense(middle)).bytes <= size else (low, middle)
    bench.add("dense matrices, quantized to that size, not healed", *_one(bench.stored(dense(low))))


def _one(found: tuple[int, float]) -> tuple[int, list[float]]:
    return found[0], [found[1]]


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
    pairs: Mapping[tuple[str, float], tuple[float, Arm]],
    depth: Mapping[str, list[float]],
) -> Finding:
    # Of the log-likelihood that truncation cost, against the model that had the same steps more.
    shares = {
        key: math.log(cut / arm.mean) / max(math.log(cut / min(base, longer.mean)), 1e-6)
        for key, (cut, arm) in pairs.items()
    }
    chains = {key: value for key, value in shares.items() if key[0] != "SVD"}
    told = "; ".join(f"{method} at {share:.0%}: {value:.0%}" for (method, share), value in shares.items())
    half = len(next(iter(depth.values()))) // 2
    ends = {method: (statistics.fmean(a[:half]), statistics.fmean(a[-half:])) for method, a in depth.items()}
    deep = "; ".join(
        f"{method}: {early:.3f} nats in the first {half} layers, {late:.3f} in the last"
        for method, (early, late) in ends.items()
    )
    checks = [
        Check("Healing recovers most of what truncation lost, at every size.", min(chains.values()) > 0.5, f"{told}."),
        Check(
            "Late layers lose less than early ones when one layer is factored alone.",
            all(late < early for method, (early, late) in ends.items() if method != "SVD"),
            f"Mean added loss: {deep}.",
        ),
    ]
    beaten = []
    for share in _SHARES:
        others = {method: pairs[method, share][1] for method in _METHODS}
        figures = ", ".join(f"{method} {arm.mean:.1f}" for method, arm in others.items())
        beaten.append(f"at {share:.0%} of the elements {figures}")
    last = [arm for arm in bench.arms if "bits" in arm.name or "quantized" in arm.name]
    reason = (
        f"After healing, at equal bytes: {'; '.join(beaten)} (dense {base:.1f}, {longer.mean:.1f} with as many steps). "
        f"In {_BITS:g} bits {min(arm.mean for arm in last[:-1]):.1f} is the best of the factored, "
        f"{last[-1].mean:.1f} is what dense matrices quantized to those bytes have without any healing."
    )
    return Finding(bench.arms, checks, reason)
