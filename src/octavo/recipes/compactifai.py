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
from octavo.recipes.base import Arm, Check, Finding, Trial, difference, recipe
from octavo.recipes.stored import quantized, through_file
from octavo.training import fit, formed, next_token, settle

#: Elements of the factors as a share of those of the matrices.
_SHARES = (0.5, 0.25)
#: Learning rates of healing, one chosen for every arm on development text.
_RATES = (1e-4, 3e-4, 1e-3)
_STEPS, _BATCH = 24, 8
#: Steps after which rates are compared.
_TRIED = 8
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
_CHAINS = ("MPO, 2 sites", "MPO, 3 sites")
_METHODS = {"SVD": _svd, **{name: _mpo(sites) for name, sites in zip(_CHAINS, (2, 3), strict=True)}}


@dataclass
class _Bench:
    """The model, with the data for measuring its forms."""

    trial: Trial
    model: Any
    windows: dict[str, Tensor]
    arms: list[Arm] = field(default_factory=list)

    def matrices(self) -> dict[str, Tensor]:
        """Matrices of attention and MLPs, by name."""
        return {
            name: weight.detach()
            for name, weight in self.model.named_parameters()
            if ".layers." in name and weight.ndim == 2
        }

    def factored(self, method: str, share: float, spared: int = 0) -> dict[str, Form]:
        """Factors of matrices with the given share of all elements; spared first layers count as dense.

        Unused budget of a matrix passes to the next, so that sizes are equal.
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

    def healed(self, forms: Mapping[str, Form], lr: float, seed: int, steps: int) -> _Healed:
        """Train these forms in place of the model's matrices for a part of an epoch."""
        model = copy.deepcopy(self.model)
        formed(model, forms)
        steps = 4 if self.trial.quick else steps
        draw = models.shuffled(self.windows["train"], size=_BATCH, seed=100 + seed)

        def batches(epoch: int) -> Iterator[dict[str, Tensor]]:
            for _, (ids,) in zip(range(steps), draw(epoch), strict=False):
                yield {"input_ids": ids}

        fit(model, batches, next_token, lr=lr, seed=seed)
        return model, settle(model)

    def runs(self, forms: Mapping[str, Form]) -> tuple[float, list[_Healed]]:
        """The rate of least perplexity on development text after a few steps, and a healed model for every seed."""
        first = self.trial.seeds[0]
        tried = {rate: self.healed(forms, rate, first, _TRIED)[0] for rate in _RATES}
        lr = min(tried, key=lambda rate: models.perplexity(tried[rate], self.windows["development"]))
        return lr, [self.healed(forms, lr, seed, _STEPS) for seed in self.trial.seeds]

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
    dense = bench.add("dense, float16", size, [base])
    trial.step("more training of the dense model")
    longer = bench.add_healed("dense, with the steps of healing", *bench.runs({}))
    cases = [(method, share, 0) for method in _METHODS for share in _SHARES]
    # The paper leaves the first blocks alone.
    cases.append((_CHAINS[0], max(_SHARES), 1))
    pairs: dict[tuple[str, float, int], tuple[Arm, Arm]] = {}
    kept: dict[str, _Healed] = {}
    for method, share, spared in cases:
        name = f"{method}, {share:.0%} of the elements{', first layer dense' * spared}"
        trial.step(name)
        forms = bench.factored(method, share, spared)
        size, value = bench.stored(forms)
        cut = bench.add(name, size, [value])
        lr, runs = bench.runs(forms)
        pairs[method, share, spared] = cut, bench.add_healed(f"{name}, healed", lr, runs)
        if share == max(_SHARES):
            kept[name] = runs[0]
    trial.step("quantized")
    few, plain = _quantize(bench, kept)
    trial.step("layer by layer")
    depth = {method: _by_depth(bench, method, min(_SHARES), base) for method in ("SVD", _CHAINS[0])}
    checks, reason = _judged(dense, longer, pairs, depth)
    winner = min(few, key=lambda arm: arm.mean)
    reason += (
        f" Quantized, the best of the factored has {winner.mean:.4g} ({winner.name}, {winner.bytes:,} bytes), and the "
        f"dense matrices, without any healing, {plain.shown} ({plain.bytes:,} bytes)."
    )
    return Finding(bench.arms, checks, reason)


def _quantize(bench: _Bench, kept: Mapping[str, _Healed]) -> tuple[list[Arm], Arm]:
    """Healed factors in few bits, and dense matrices in fewer bits at the bytes of the largest of them."""
    few = []
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
        few.append(bench.add(f"{name}, healed, in {_BITS:g} bits", size, [value]))
    size = max(arm.bytes for arm in few)

    def dense(bits: float) -> dict[str, Form]:
        return {name: quantized(Dense(weight), bits) for name, weight in bench.matrices().items()}

    low, high = 0.5, 8.0
    for _ in range(5 if bench.trial.quick else 8):
        middle = (low + high) / 2
        low, high = (middle, high) if through_file(bench.model, dense(middle)).bytes <= size else (low, middle)
    size, value = bench.stored(dense(low))
    return few, bench.add("dense matrices, quantized to that size, not healed", size, [value])


def _by_depth(bench: _Bench, method: str, share: float, base: float) -> list[float]:
    """The increase of the mean negative log-likelihood from factoring one layer only, by depth."""
    forms, added = bench.factored(method, share), []
    for layer in range(bench.model.config.num_hidden_layers):
        alone = {name: form for name, form in forms.items() if f".layers.{layer}." in name}
        size, value = bench.stored(alone)
        added.append(math.log(value / base))
        bench.add(f"{method}, {share:.0%} of the elements in layer {layer + 1} alone", size, [value])
    return added


def _judged(
    dense: Arm,
    longer: Arm,
    pairs: Mapping[tuple[str, float, int], tuple[Arm, Arm]],
    depth: Mapping[str, Sequence[float]],
) -> tuple[list[Check], str]:
    # In nats a token above the better of the dense model and the dense model after the same steps, by seed.
    best = [min(dense.mean, value) for value in longer.values]
    recovered, told = [], []
    for (method, _, _), (cut, healed) in pairs.items():
        lost = [math.log(cut.mean / value) for value in best]
        left = [math.log(mine / value) for mine, value in zip(healed.values, best, strict=True)]
        ahead = difference([value / 2 for value in lost], left)
        if method in _CHAINS:
            recovered.append(ahead.surely > 0)
        told.append(
            f"{cut.name}: {statistics.fmean(lost):.3f} nats lost, {statistics.fmean(left):.3f} left, which is {ahead} "
            "below a half"
        )
    half = len(next(iter(depth.values()))) // 2
    early, inner, late = (
        {method: statistics.fmean(added[part] or added[:1]) for method, added in depth.items()}
        for part in (slice(half), slice(1, half), slice(-half, None))
    )
    deep = "; ".join(
        f"{method}: {early[method]:.3f} nats in the first {half} layers ({inner[method]:.3f} without the very first), "
        f"{late[method]:.3f} in the last"
        for method in depth
    )
    chains = [method for method in depth if method in _CHAINS]
    checks = [
        Check("Healing recovers more than half of what truncation lost.", all(recovered), f"{'; '.join(told)}."),
        Check("Late layers lose less than early ones.", all(late[name] < early[name] for name in chains), f"{deep}."),
        Check(
            "They do so even without the very first layer.",
            all(late[name] < inner[name] for name in chains),
            f"{deep}.",
        ),
    ]
    shown = "; ".join(f"{cut.name} {arm.shown}" for cut, arm in pairs.values())
    return checks, f"Perplexity after healing: {shown} (dense {dense.shown}, {longer.shown} with as many steps)."
