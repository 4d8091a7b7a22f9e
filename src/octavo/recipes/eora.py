"""EoRA (Liu et al., 2024): low-rank compensation of a compressed model in the eigenspace of its inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from octavo.artifact import pack
from octavo.blocks import Blocks
from octavo.evidence import Evidence
from octavo.forms import Form
from octavo.inputs import model_of, silent
from octavo.methods import Setting, get_method
from octavo.methods.factorize.eora import compensated
from octavo.objective import KL, Batch, Objective, mask_of
from octavo.recipes import data, models
from octavo.recipes.base import Arm, Check, Finding, Trial, recipe
from octavo.recipes.stored import Stored, through_file
from octavo.request import open_job

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
#: What the bytes of a correction buy instead: finer groups and one bit more, or more weights that stay.
_FINER, _MORE = (48, 32, 24, 16, 12, 8), (256, 128, 64, 32, 16)
_ZEROS = tuple(k / 20 for k in range(11))


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
    bases, ranks, size = (list(BASES)[1::2], (2, 4), 16) if trial.quick else (list(BASES), RANKS, 64)
    draws = [_drawn(windows["train"], seed, size // 2) for seed in trial.seeds]
    compressing = Compressing(model, KL(), lambda loaded: models.perplexity(loaded, windows["test"][:size]))
    arms: dict[str, Arm] = {}

    def add(name: str, *found: tuple[Stored, float]) -> None:
        arms[name] = Arm(name, found[0][0].bytes, tuple(value for _, value in found))

    add("as trained", compressing.judged({}))
    for base in bases:
        trial.step(f"language model, {base}")
        add(base, compressing.judged(compressing.base(base)))
        for rank in ranks:
            for correction in KNOWN:
                # What looks at inputs depends on their draw; the scaled SVD is tried on the first alone.
                seen = draws if correction == "EoRA" else draws[:1]
                name = f"{base}, {correction} {rank}"
                add(name, *(compressing.corrected(base, correction, rank, texts) for texts in seen))
            add(f"{base}, {rank} as bits", compressing.richer(base, arms[f"{base}, EoRA {rank}"].bytes))
        found = compressing.corrected(base, "EoRA", ranks[1], draws[0], in_order=False)
        add(f"{base}, EoRA {ranks[1]}, all layers at once", found)
    _minilm(trial, arms, ranks)
    return Finding(list(arms.values()), *_judged(arms, bases, ranks))


def _drawn(windows: Tensor, seed: int, count: int) -> list[Batch]:
    """Calibration windows in batches of 16, none of which is test text."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": part} for part in windows[order[:count]].split(16)]


def _minilm(trial: Trial, arms: dict[str, Arm], ranks: Sequence[int]) -> None:
    """Columns of what happens to MiniLM's embeddings of held-back sentences; in quick runs in its first layer."""
    job = open_job(data.minilm(), None, None, ["keep"], "fast", (), {}, trial.first_seed, silent)
    model_of(job.source, blockwise=False)
    assert job.source.module is not None
    texts, held = job.calibration_data, job.held_data
    if trial.quick:
        texts, held = texts[:1], held[:1]
    reference = job.objective.reference(job.source.module, held)

    def drift(loaded: nn.Module) -> float:
        return float(job.objective.measure(loaded, held, reference).mean())

    compressing = Compressing(job.source.module, job.objective, drift, layers=1 if trial.quick else None)
    for base in ("2-bit",) if trial.quick else ("2-bit", "2:4 and 4-bit"):
        trial.step(f"MiniLM, {base}")
        found = {base: compressing.judged(compressing.base(base))}
        for rank in ranks[:1] if trial.quick else ranks:
            for correction in ("SVD", "EoRA"):
                found[f"{base}, {correction} {rank}"] = compressing.corrected(base, correction, rank, texts)
        for name, (stored, value) in found.items():
            arms[name].also.update({"MiniLM 1 - cosine": value, "MiniLM bytes": stored.bytes})


def _judged(arms: Mapping[str, Arm], bases: Sequence[str], ranks: Sequence[int]) -> tuple[list[Check], str]:
    checks = []
    cases = [(base, rank) for base in bases for rank in ranks]
    for base in bases:
        pairs = [(rank, arms[f"{base}, EoRA {rank}"], arms[f"{base}, SVD {rank}"].mean) for rank in ranks]
        checks.append(
            Check(
                f"{base}: EoRA below SVD at every rank, with every draw of calibration text.",
                all(max(better.values) < plain for _, better, plain in pairs),
                "; ".join(f"rank {rank}: {better.mean:.4g} against {plain:.4g}" for rank, better, plain in pairs) + ".",
            )
        )
        falling = [arms[base].mean, *(better.mean for _, better, _ in pairs)]
        checks.append(
            Check(
                f"{base}: the perplexity of EoRA falls with the rank, from that without correction on.",
                all(after < before for before, after in pairwise(falling)),
                f"{', '.join(f'{value:.4g}' for value in falling)}.",
            )
        )

    def lower(other: str) -> int:
        return sum(arms[other.format(base, rank)].mean < arms[f"{base}, EoRA {rank}"].mean for base, rank in cases)

    once = [
        arms[f"{base}, EoRA {ranks[1]}, all layers at once"].mean - arms[f"{base}, EoRA {ranks[1]}"].values[0]
        for base in bases
    ]
    reason = (
        f"A diagonal scaling in place of the whole moment is better in {lower('{}, scaled SVD {}')} of {len(cases)} "
        f"cases, the same bytes spent on more bits or more weights in {lower('{}, {} as bits')}. Without statistics "
        f"through the layers corrected before, perplexity at rank {ranks[1]} changes by "
        f"{', '.join(f'{change:+.3g}' for change in once)}."
    )
    return checks, reason


@dataclass
class Compressing:
    """A model whose blocks are compressed and corrected.

    Parameters
    ----------
    judge
        Gives the metric of a model that was read back.
    layers
        Blocks that are compressed, from the first on; None for all.
    """

    model: nn.Module
    objective: Objective
    judge: Callable[[nn.Module], float]
    layers: int | None = None

    def __post_init__(self) -> None:
        found = Blocks.find(self.model)
        assert found is not None
        self.prefix = found.prefix
        self._bases: dict[str, dict[str, Form]] = {}
        self._sizes: dict[str, list[int]] = {}
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

    def judged(self, forms: Mapping[str, Form]) -> tuple[Stored, float]:
        """What the model becomes with these forms, through a file."""
        stored = through_file(self.model, forms)
        return stored, self.judge(stored.load(copy.deepcopy(self.model)))

    def base(self, name: str) -> dict[str, Form]:
        """All layers compressed, nothing put back."""
        if name not in self._bases:
            self._bases[name] = self._encoded(*BASES[name])
        return self._bases[name]

    def _encoded(self, method: str, setting: Setting) -> dict[str, Form]:
        found = get_method(method)
        return {
            name: found.encode(weight, setting, Evidence(torch.ones(len(weight)), None))
            for name, weight in self.weights.items()
        }

    def richer(self, name: str, budget: int) -> tuple[Stored, float]:
        """The largest form of the same kind without correction whose file takes no more than ``budget`` bytes."""
        method, setting = BASES[name]
        offered: list[Setting] = [{"sparsity": zeros, "bits": setting["bits"]} for zeros in _ZEROS]
        if method == "rtn":
            offered = [{**setting, "group": group} for group in (setting["group"], *_FINER)]
            offered += [{"bits": setting["bits"] + 1, "group": group} for group in _MORE]
        base = self.base(name)
        if name not in self._sizes:
            self._sizes[name] = [_bytes(self._encoded(method, other)) for other in offered]
        room = budget - through_file(self.model, base).bytes + _bytes(base)
        _, best = max((size, k) for k, size in enumerate(self._sizes[name]) if size <= room)
        return self.judged(self._encoded(method, offered[best]))

    def corrected(
        self, base: str, correction: str, rank: int, texts: Sequence[Batch], *, in_order: bool = True
    ) -> tuple[Stored, float]:
        """A base with a correction of its layers.

        Parameters
        ----------
        in_order
            Whether inputs come through the blocks before as they are stored, or as they were.
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


def _bytes(forms: Mapping[str, Form]) -> int:
    return sum(pack(form).bytes for form in forms.values())


@contextmanager
def _watched(layers: Mapping[str, nn.Module], texts: Sequence[Batch]) -> Iterator[dict[str, Tensor]]:
    """Second moments of the inputs of layers that are given texts in turn, padding left out; whole at the end."""
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
