"""CompactifAI: attention and MLP matrices of a language model as matrix product operators, healed, then quantized."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from octavo.forms import Dense, Form, LowRank
from octavo.methods.factorize.factors import whitened
from octavo.methods.factorize.mpo import bond, decompose, elements, modes
from octavo.recipes.frame import Lab, Study, gap, quantized
from octavo.recipes.frame.bases import language_model
from octavo.recipes.frame.data import TEXT
from octavo.recipes.frame.nets import shuffled
from octavo.training import formed, next_token, settle

#: Elements of the factors as a share of those of the matrices; 0.3 is the paper's.
HALF, LESS = 0.5, 0.3
RATES, STEPS, BATCH = (1e-4, 3e-4, 1e-3), 200, 4
DENSE, LONGER, CODED = "dense", "dense, with the steps of healing", "dense, quantized alone"
SVD, MPO, LONG = "SVD", "MPO, 2 sites", "MPO, 3 sites"
ACCURACY = "token accuracy (%)"

#: A model, and the forms that it was trained in.
Healed = tuple[nn.Module, dict[str, Form]]


@Study(
    "compactifai",
    system="CompactifAI",
    source="Tomut et al. (2024), arXiv 2401.14109",
    metric="test perplexity",
    higher=False,
    data=TEXT,
    claims={
        "healed": "Brief retraining recovers most of what truncation lost (over half)",
        "small": "With 70% fewer elements, accuracy drops by at most 3 points",
        "late": "Late layers tolerate more compression than early ones",
    },
    extras={
        "inner": "They do so even without the very first layer",
        "svd": "Healed MPO beats healed SVD at equal bytes",
        "quantized": "Healed MPO in 4 bits beats quantization alone at equal bytes",
    },
)
def run(lab: Lab) -> None:
    """MPO of two and three sites against SVD at equal elements, before and after healing; by depth; then quantized."""
    model, parts = language_model(lab)
    few, test = parts.development[:64], parts.test[: 8 if lab.quick else 128]
    steps = 4 if lab.quick else STEPS
    matrices = {name: w.detach() for name, w in model.named_parameters() if ".layers." in name and w.ndim == 2}

    def add(arm: str, module: nn.Module, forms: Mapping[str, Form]) -> list[float]:
        """Store, read back and record; returns the nats of every window."""
        stored = lab.stored(module, forms)
        nats, right = measured(stored.load(copy.deepcopy(model)), test)
        lab.add(arm, float(nats.mean().exp()), stored, **{ACCURACY: 100 * float(right.mean())})
        return nats.tolist()

    def healed(forms: Mapping[str, Form], lr: float, seed: int, steps: int, arm: str | None = None) -> Healed:
        module = copy.deepcopy(model)
        formed(module, forms)

        def batches(epoch: int) -> Iterator[dict[str, Tensor]]:
            return ({"input_ids": ids} for (ids,) in shuffled(parts.train, size=BATCH, seed=100 + seed)(epoch))

        lab.train(module, batches, next_token, steps=steps, seed=seed, arm=arm, lr=lr)
        return module, settle(module)

    def heal(arm: str, forms: Mapping[str, Form], *, four_bits: bool = False) -> None:
        def score(lr: float) -> float:
            return float(measured(healed(forms, lr, lab.first_seed, max(2, steps // 8))[0], few)[0].mean())

        lr = lab.choose(f"rate of {arm}", score, RATES)
        for seed in lab.seeds:
            module, found = healed(forms, lr, seed, steps, arm)
            add(arm, module, found)
            if four_bits:
                add(f"{arm}, 4 bits", module, {name: quantized(form, 4.0) for name, form in found.items()})

    dense = add(DENSE, model, {})
    heal(LONGER, {})
    chains = [name_of(MPO, HALF), name_of(LONG, HALF), name_of(MPO, LESS)]
    for method, share in ((SVD, HALF), (MPO, HALF), (LONG, HALF), (SVD, LESS), (MPO, LESS)):
        arm = name_of(method, share)
        lab.step(arm)
        forms = factored(matrices, method, share)
        cut = add(arm, model, forms)
        if arm == chains[0]:
            lab.gate("truncation does damage, over 0.05 nats", gap(arm, cut, dense, 0.05))
        heal(f"{arm}, healed", forms, four_bits=arm == chains[0])
    four = f"{chains[0]}, healed, 4 bits"
    coded = lab.quantization_alone(model, lab.arms[four].bytes, matrices)
    lab.add(CODED, float(measured(coded.load(copy.deepcopy(model)), test)[0].mean().exp()), coded)
    forms, depth = factored(matrices, MPO, LESS), []
    for layer in range(model.config.num_hidden_layers):
        alone = {name: form for name, form in forms.items() if f".layers.{layer}." in name}
        depth.append(measured(lab.stored(model, alone).load(copy.deepcopy(model)), test)[0])
    half = len(depth) // 2
    early, inner, late = (
        torch.stack(depth[part]).mean(0).tolist()
        for part in (slice(half), slice(min(1, half - 1), half), slice(half, None))
    )
    arms, counts = lab.arms, torch.bincount(parts.train.flatten()).double()
    unigram = math.exp(-float((counts / counts.sum()).log()[test.flatten()].mean()))
    lab.gate("perplexity is below a third of counting tokens", gap("a third", [unigram / 3], [arms[DENSE].mean]))
    # Against the better of the dense model and the dense model after the same steps, seed by seed.
    best = [math.log(min(arms[DENSE].mean, value)) for value in arms[LONGER].values]
    gaps = []
    for arm in chains:
        lost = [(math.log(arms[arm].mean) - to) / 2 for to in best]
        left = [math.log(value) - to for value, to in zip(arms[f"{arm}, healed"].values, best, strict=True)]
        gaps.append(gap(f"{arm}: half of the nats lost over those left", lost, left))
    lab.judge("healed", *gaps)
    lab.judge("small", lab.ahead(f"{chains[2]}, healed", LONGER, -3.0, of=ACCURACY, higher=True))
    lab.judge("late", gap("nats of early over late layers, by window", early, late))
    lab.judge("inner", gap("nats of inner early over late layers, by window", inner, late))
    pairs = [(f"{name_of(MPO, share)}, healed", f"{name_of(SVD, share)}, healed") for share in (HALF, LESS)]
    lab.judge("svd", *(lab.ahead(*pair) for pair in pairs))
    lab.judge("quantized", lab.ahead(four, CODED))
    told = "; ".join(f"{arms[plain].shown} by SVD and {arms[ours].shown} by MPO" for ours, plain in pairs)
    lab.say(f"In equal bytes healed perplexity is {told} (half and 30% of the elements); dense {arms[DENSE].shown}.")


def name_of(method: str, share: float) -> str:
    """The arm."""
    return f"{method}, {share:.0%}"


def factored(matrices: Mapping[str, Tensor], method: str, share: float) -> dict[str, Form]:
    """Factors of all matrices in that share of their elements; what one leaves passes to the next."""
    forms: dict[str, Form] = {}
    left = 0.0
    for name, weight in matrices.items():
        left += share * weight.numel()
        if method == SVD:
            rank = max(1, int(left / sum(weight.shape)))
            parts, used = whitened(weight, most=rank), rank * sum(weight.shape)
            forms[name] = LowRank(Dense(parts.left), Dense(parts.right))
        else:
            sites = 2 if method == MPO else 3
            rows, columns = modes(weight.shape[0], sites), modes(weight.shape[1], sites)[::-1]
            chi = bond(rows, columns, left)
            forms[name], used = decompose(weight, rows, columns, chi).dense(), elements(rows, columns, chi)
        left -= used
    return forms


@torch.inference_mode()
def measured(model: nn.Module, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Nats per token, and the share of tokens that are the likeliest, of every window."""
    found = []
    for ids in windows.split(32):
        logs = model.eval()(input_ids=ids).logits[:, :-1].log_softmax(-1)
        nats = -logs.gather(-1, ids[:, 1:, None])[..., 0]
        found.append((nats.mean(1), (logs.argmax(-1) == ids[:, 1:]).float().mean(1)))
    nats, right = zip(*found, strict=True)
    return torch.cat(nats), torch.cat(right)
