"""EoRA (Liu et al., 2024): low-rank compensation of a compressed model in the eigenspace of its inputs."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from octavo.calibration.blocks import Blocks
from octavo.calibration.evidence import Evidence
from octavo.calibration.inputs import model_of, silent
from octavo.calibration.objective import KL, Batch, Objective, mask_of
from octavo.errors import OctavoError
from octavo.forms import Dense, Form
from octavo.methods import Setting, get_method
from octavo.methods.factorize.eora import compensated
from octavo.opening import open_request
from octavo.recipes import data, models
from octavo.recipes.base import Arm, Check, Difference, Finding, Trial, difference, recipe
from octavo.recipes.stored import Stored, quantized, through_file
from octavo.request import Request
from octavo.targets import get_target
from octavo.training import next_token

#: How models are compressed before anything is put back: a method and its setting.
BASES: dict[str, tuple[str, Setting]] = {
    "3-bit": ("rtn", {"bits": 3, "group": 64}),
    "2-bit": ("rtn", {"bits": 2, "group": 64}),
    "2:4": ("magnitude", {"pattern": "2:4", "bits": 8}),
    "2:4 and 4-bit": ("magnitude", {"pattern": "2:4", "bits": 4}),
}
RANKS = (8, 16, 32)
#: Corrections, each with what it knows of the inputs' moment.
KNOWN: dict[str, Callable[[Tensor], Tensor | None]] = {
    "SVD": lambda moment: None,
    "scaled SVD": lambda moment: moment.diagonal().diag(),
    "EoRA": lambda moment: moment,
}
#: Bits a coefficient of the corrections.
_BITS = 4
#: Share of its mean that is added to the diagonal of a moment.
_RIDGE = 1e-6
#: What the bytes of a correction buy in groups of the same bits, and of one bit more: sizes of groups.
_FINER, _MORE = tuple(range(64, 18, -1)), (256, 192, 160, 128, 112, 96, 80, *range(64, 18, -1))
#: Least shares of a file's bytes that another one of no more takes, with a continuous knob and with one of steps.
_AS_MANY, _NEARLY = 0.995, 0.98
#: The rivals that spend a correction's bytes on the weights.
CODED, FINER = "entropy-coded in the bytes of {}, EoRA {}", "{}, finer grid in the bytes of EoRA {}"


@recipe(
    "eora",
    system="EoRA",
    source="Liu et al. (2024), arXiv 2410.21271",
    claim="Low-rank corrections in the eigenspace of the inputs give lower perplexity than those of the weights alone "
    "(SVD) at every rank, and the lower the higher the rank.",
    metric="perplexity (lower is better)",
    data=f"{data.TEXT}; all-MiniLM-L6-v2 and its calibration text from packages",
)
def run(trial: Trial) -> Finding:
    """Four compressions of a language model, and two of MiniLM, with and without corrections."""
    model, windows = models.language_model(trial)
    bases, ranks, size = (list(BASES)[1::2], (2, 4), 16) if trial.quick else (list(BASES), RANKS, 96)
    draws = [_drawn(windows["train"], seed, 16 if trial.quick else 32) for seed in trial.seeds]
    # From all over the test text, which is of two kinds.
    test = windows["test"][:: len(windows["test"]) // size][:size].split(1)

    @torch.inference_mode()
    def losses(loaded: nn.Module) -> Tensor:
        return torch.stack([next_token(loaded, {"input_ids": window}) for window in test])

    compressing = Compressing(model, KL(), losses)
    arms: dict[str, Arm] = {}
    seen: dict[str, Tensor] = {}

    def add(name: str, *found: tuple[Stored, Tensor]) -> None:
        arms[name] = Arm(name, found[0][0].bytes, tuple(float(losses.mean().exp()) for _, losses in found))
        seen[name] = torch.stack([losses for _, losses in found]).mean(0)

    add("as trained", compressing.judged({}))
    for base in bases:
        trial.step(f"language model, {base}")
        add(base, compressing.judged(compressing.base(base)))
        for rank in ranks:
            for correction in KNOWN:
                # What looks at inputs depends on their draw; the scaled SVD is tried on the first alone.
                texts = draws if correction == "EoRA" else draws[:1]
                name = f"{base}, {correction} {rank}"
                add(name, *(compressing.corrected(base, correction, rank, drawn) for drawn in texts))
            budget = arms[f"{base}, EoRA {rank}"].bytes
            add(CODED.format(base, rank), compressing.coded(budget))
            finer = compressing.finer(base, budget)
            if finer is not None:
                add(FINER.format(base, rank), finer)
        found = compressing.corrected(base, "EoRA", ranks[1], draws[0], in_order=False)
        add(f"{base}, EoRA {ranks[1]}, all layers at once", found)
    _minilm(trial, arms, ranks)
    return Finding(list(arms.values()), *_judged(arms, seen, bases, ranks))


def _drawn(windows: Tensor, seed: int, count: int) -> list[Batch]:
    """Calibration windows in batches of 16, none of which is test text."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": part} for part in windows[order[:count]].split(16)]


def _minilm(trial: Trial, arms: dict[str, Arm], ranks: Sequence[int]) -> None:
    """Table columns on MiniLM's embeddings of held-out sentences; in quick runs for its first layer."""
    asked = Request(data.minilm(), methods=["keep"], preset="fast", seed=trial.first_seed)
    job = open_request(asked, get_target("disk"), silent)
    model_of(job.source, blockwise=False)
    assert job.source.module is not None
    texts, held = job.calibration_data, job.held_data
    if trial.quick:
        texts, held = texts[:1], held[:1]
    reference = job.objective.reference(job.source.module, held)

    def drift(loaded: nn.Module) -> Tensor:
        return job.objective.measure(loaded, held, reference)

    compressing = Compressing(job.source.module, job.objective, drift, layers=1 if trial.quick else None)
    for base in ("2-bit",) if trial.quick else ("2-bit", "2:4 and 4-bit"):
        trial.step(f"MiniLM, {base}")
        found = {base: compressing.judged(compressing.base(base))}
        for rank in ranks[:1] if trial.quick else ranks:
            for correction in ("SVD", "EoRA"):
                found[f"{base}, {correction} {rank}"] = compressing.corrected(base, correction, rank, texts)
        for name, (stored, drifts) in found.items():
            arms[name].also.update({"MiniLM 1 - cosine": float(drifts.mean()), "MiniLM bytes": stored.bytes})


def _judged(
    arms: Mapping[str, Arm], seen: Mapping[str, Tensor], bases: Sequence[str], ranks: Sequence[int]
) -> tuple[list[Check], str]:
    """Checks and reason.

    Parameters
    ----------
    seen
        (windows,) losses of every arm on the test windows, means over its draws of calibration text.
    """
    checks = []

    def gaps(ours: str, theirs: str) -> tuple[Difference, Difference]:
        """How much lower the first arm is: its perplexity over draws, and its loss over test windows."""
        over_draws = difference(arms[theirs].values, arms[ours].values)
        return over_draws, difference(seen[theirs].tolist(), seen[ours].tolist())

    def lower(ours: str, theirs: str) -> bool:
        return all(gap.surely > 0 for gap in gaps(ours, theirs))

    def figures(ours: str, theirs: str) -> str:
        over_draws, over_windows = gaps(ours, theirs)
        return (
            f"{arms[ours].shown} against {arms[theirs].shown}, lower by {over_draws} over draws and in nats by "
            f"{over_windows} over windows"
        )

    for base in bases:
        pairs = [(rank, (f"{base}, EoRA {rank}", f"{base}, SVD {rank}")) for rank in ranks]
        checks.append(
            Check(
                f"{base}: EoRA below SVD at every rank, by two standard errors over draws of calibration text and over "
                "test windows.",
                all(lower(*pair) for _, pair in pairs),
                "; ".join(f"rank {rank}: {figures(*pair)}" for rank, pair in pairs) + ".",
            )
        )
        steps = list(pairwise([base, *(f"{base}, EoRA {rank}" for rank in ranks)]))
        checks.append(
            Check(
                f"{base}: the perplexity of EoRA falls with every rank, from that without correction on, by two "
                "standard errors of either kind.",
                all(lower(after, before) for before, after in steps),
                "; ".join(figures(after, before) for before, after in steps) + ".",
            )
        )

    def compared(other: str) -> str:
        cases = [(other.format(base, rank), f"{base}, EoRA {rank}") for base in bases for rank in ranks]
        cases = [(theirs, ours) for theirs, ours in cases if theirs in arms]
        below, above = (sum(lower(*pair[::way]) for pair in cases) for way in (1, -1))
        return f"lower in {below} and higher in {above} of {len(cases)} cases"

    once = [
        arms[f"{base}, EoRA {ranks[1]}, all layers at once"].mean - arms[f"{base}, EoRA {ranks[1]}"].values[0]
        for base in bases
    ]
    reason = (
        "Against EoRA, by two standard errors of either kind, perplexity is "
        f"{compared('{}, scaled SVD {}')} with a diagonal scaling in place of the whole moment, {compared(CODED)} when "
        "there is neither base nor correction, but all the bytes go to entropy-constrained quantization of the weights "
        f"themselves, and {compared(FINER)} when those of the correction go to finer groups or one bit more of the "
        "base, where such a grid takes as many. Without statistics through the layers corrected before, perplexity at "
        f"rank {ranks[1]} changes by {', '.join(f'{change:+.3g}' for change in once)} with the first draw."
    )
    return checks, reason


@dataclass
class Compressing:
    """A model whose blocks are compressed and corrected.

    Parameters
    ----------
    judge
        Returns the metric of a model that was read back, (examples,).
    layers
        Blocks that are compressed, from the first on; None for all.
    """

    model: nn.Module
    objective: Objective
    judge: Callable[[nn.Module], Tensor]
    layers: int | None = None

    def __post_init__(self) -> None:
        found = Blocks.find(self.model)
        assert found is not None
        self.prefix = found.prefix
        self._bases: dict[str, dict[str, Form]] = {}
        self.weights = {
            name: module.weight.detach().float()
            for number in range(len(found.list))[: self.layers]
            for name, module in self._linears(found, number).items()
        }

    @staticmethod
    def _linears(blocks: Blocks, number: int) -> dict[str, nn.Linear]:
        """Layers of a block by the names of their weights."""
        return {
            f"{blocks.prefix}.{number}.{name}.weight": module
            for name, module in blocks.list[number].named_modules()
            if isinstance(module, nn.Linear)
        }

    def judged(self, forms: Mapping[str, Form]) -> tuple[Stored, Tensor]:
        """The metric of the model with these forms, written to a file and read back."""
        stored = through_file(self.model, forms)
        return stored, self.judge(stored.load(copy.deepcopy(self.model)))

    def base(self, name: str) -> dict[str, Form]:
        """All layers compressed, without correction."""
        if name not in self._bases:
            self._bases[name] = self._encoded(*BASES[name])
        return self._bases[name]

    def _encoded(self, method: str, setting: Setting) -> dict[str, Form]:
        found = get_method(method)
        return {
            name: found.encode(weight, setting, Evidence(torch.ones(len(weight)), None))
            for name, weight in self.weights.items()
        }

    def coded(self, budget: int) -> tuple[Stored, Tensor]:
        """All weights by entropy-constrained quantization, at the bits per weight that fit ``budget`` bytes."""
        count = sum(weight.numel() for weight in self.weights.values())
        bits, low, high = 4.0, 0.0, 16.0
        for _ in range(12):
            stored = through_file(self.model, {key: quantized(Dense(w), bits) for key, w in self.weights.items()})
            if _AS_MANY * budget <= stored.bytes <= budget:
                return stored, self.judge(stored.load(copy.deepcopy(self.model)))
            low, high = (low, bits) if stored.bytes > budget else (bits, high)
            # Mostly so many bits more take so many bytes more; where they do not, the bracket is halved.
            guess = bits + 8 * ((1 + _AS_MANY) / 2 * budget - stored.bytes) / count
            bits = guess if low < guess < high else (low + high) / 2
        raise OctavoError(f"no number of bits a weight gives a file of {budget} bytes: {bits:.4g} give {stored.bytes}")

    def finer(self, name: str, budget: int) -> tuple[Stored, Tensor] | None:
        """The base with smaller groups or one bit more in ``budget`` bytes; None if no grid is that large."""
        method, setting = BASES[name]
        if method != "rtn":
            return None
        bits = int(setting["bits"])
        offered: list[Setting] = [{"bits": bits, "group": group} for group in _FINER]
        offered += [{"bits": bits + 1, "group": group} for group in _MORE]
        sizes = cache(lambda k: through_file(self.model, self._encoded(method, offered[k])).bytes)
        best = bisect_right(range(len(offered)), budget, key=sizes) - 1
        if best < 0 or sizes(best) < _NEARLY * budget:
            return None
        return self.judged(self._encoded(method, offered[best]))

    def corrected(
        self, base: str, correction: str, rank: int, texts: Sequence[Batch], *, in_order: bool = True
    ) -> tuple[Stored, Tensor]:
        """A base with a correction of its layers.

        Parameters
        ----------
        in_order
            Whether inputs pass through the preceding blocks as stored, or through the original blocks.
        """
        model = copy.deepcopy(self.model).eval().requires_grad_(False)
        blocks, forms = Blocks(model, self.prefix), dict[str, Form]()
        blocks.check(self.objective, texts[0])
        with torch.no_grad():
            begun = [blocks.prelude(self.objective, batch) for batch in texts]
            states = [state for state, _ in begun]
            for number in range(len(blocks.list))[: self.layers]:

                def through(states: Sequence[Tensor], number: int = number) -> list[Tensor]:
                    pairs = zip(states, begun, strict=True)
                    return [blocks.run(number, state, calls[number]) for state, (_, calls) in pairs]

                linears = self._linears(blocks, number)
                with _watched(linears, texts) as moments:
                    after = through(states)
                for name, layer in linears.items():
                    evidence = Evidence(torch.ones(len(layer.weight)), KNOWN[correction](moments[name]))
                    forms[name] = compensated(self.weights[name], self.base(base)[name], evidence, rank, _BITS)
                    if in_order:
                        layer.weight.copy_(forms[name].dense())
                states = through(states) if in_order else after
        return self.judged(forms)


@contextmanager
def _watched(layers: Mapping[str, nn.Module], texts: Sequence[Batch]) -> Iterator[dict[str, Tensor]]:
    """Running second moments of layer inputs, without padding; complete at the end."""
    moments: dict[str, Tensor] = {}
    masks = {name: iter([mask_of(batch) for batch in texts]) for name in layers}

    def add(name: str, module: nn.Module, args: tuple) -> None:
        mask = next(masks[name])
        flat = (args[0].flatten(0, -2) if mask is None else args[0][mask.bool()]).double()
        moments[name] = moments.get(name, 0) + flat.t() @ flat

    handles = [module.register_forward_pre_hook(partial(add, name)) for name, module in layers.items()]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()
    for moment in moments.values():
        moment.diagonal().add_(_RIDGE * moment.diagonal().mean())
