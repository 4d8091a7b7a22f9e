"""Compress, Then Prompt: soft prompts trained on compressed weights, on other weights and texts, against rivals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from octavo.forms import Dense, Form, LowRank, Sum
from octavo.methods import Setting
from octavo.recipes.frame import Gap, Lab, Study, gap
from octavo.recipes.frame.bases import language_model
from octavo.recipes.frame.data import SST2, TEXT, Parts, sentiment
from octavo.recipes.frame.nets import shuffled
from octavo.recipes.frame.windows import perplexity
from octavo.recipes.testbeds.one_shot import one_shot
from octavo.recipes.testbeds.remembering import packed, text_tokenizer
from octavo.training import Prompted, SoftPrompt, formed, forms_of, next_token

#: How blocks are compressed. The first is the paper's: an eighth of 16 bits.
LEVELS: dict[str, tuple[str, Setting]] = {
    "50% and 4 bits": ("sparsegpt", {"sparsity": 0.5, "bits": 4}),
    "62.5% sparse": ("sparsegpt", {"sparsity": 0.625, "bits": 8}),
    "2 bits": ("gptq", {"bits": 2, "group": 64}),
}
FIRST = next(iter(LEVELS))
#: Vectors of a prompt: as many numbers as all gains of norms and the biases of both outputs of every block.
LENGTH = 25
STEPS, SIZE = 80, 8
RATES = (3e-3, 1e-2, 3e-2)
NONE, DENSE, OURS, NORMS, LORA = "no prompt", "prompt of dense weights", "prompt", "norms and biases", "LoRA"
#: Dense weights with the prompt that was trained on them.
PROMPTED = f"dense, {OURS}"
Tuned = TypeVar("Tuned", bound=nn.Module)
#: Makes a tuned module with a rate; for the arm of that name, if it is none of the trials.
Make = Callable[[float, str | None], nn.Module]


@Study(
    "compress-then-prompt",
    system="Compress, Then Prompt",
    source="Xu et al. (2023), arXiv 2305.11186",
    metric="test perplexity",
    higher=False,
    data=f"{TEXT}; {SST2}",
    claims={
        "recovers": "A prompt trained on compressed weights lowers their perplexity",
        "exposed": "It does more than a prompt trained on dense weights",
        "levels": "It helps at other compressions too",
        "corpus": "It helps on another corpus too",
    },
    extras={
        "more": "Compressed weights gain more from their prompt than dense ones from theirs",
        "half": "It recovers half of the lost nats beyond what dense weights gain",
        "norms": "It does more than norms and biases of no more bytes",
        "lora": "It does more than LoRA of no more bytes",
    },
)
def run(lab: Lab) -> None:
    """One decoder, compressed at three levels; seeds draw calibration text, first prompts and batches."""
    model, windows = language_model(lab)
    tokenizer, length = text_tokenizer(lab), windows.test.shape[1]
    reviews = packed([tokenizer.encode(f"{text}\n").ids for text, _ in sentiment(lab).test], length)
    count = 16 if lab.quick else 64
    for seed in lab.each_seed():
        bed = Bed(lab, model, windows, reviews, seed)
        texts = [{"input_ids": part} for part in windows.train[seed * count :][:count].split(8)]
        levels = {name: one_shot(model, *how, texts) for name, how in LEVELS.items()}
        prompts = {DENSE: bed.prompt(PROMPTED, {})}
        prompts |= {f"prompt of {name}": bed.prompt(f"{name}, {OURS}", forms) for name, forms in levels.items()}
        bed.add("dense", model, {})
        bed.add(PROMPTED, Prompted(model, prompts[DENSE]), {})
        for name, forms in levels.items():
            bed.add(f"{name}, {NONE}", model, forms)
            inside = {f"model.{key}": form for key, form in forms.items()}
            for title, prompt in prompts.items():
                arm = OURS if title == f"prompt of {name}" else title
                bed.add(f"{name}, {arm}", Prompted(model, prompt), inside)
        bed.add(f"{FIRST}, {NORMS}", bed.norms(levels[FIRST]), levels[FIRST])
        bed.add(f"{FIRST}, {LORA}", model, bed.lora(levels[FIRST]))
    judge(lab)


class Bed:
    """What is tuned and measured with one seed."""

    def __init__(self, lab: Lab, model: nn.Module, windows: Parts[Tensor], reviews: Tensor, seed: int) -> None:
        self.lab, self.model, self.windows, self.seed = lab, model, windows, seed
        self.few = 8 if lab.quick else 64
        self.reviews = reviews

    def add(self, arm: str, module: nn.Module, forms: Mapping[str, Form]) -> None:
        """Measure what is read back, on both corpora."""
        self.lab.step(arm)
        stored = self.lab.stored(module, forms)
        read = stored.load(copy.deepcopy(module))
        here, there = (perplexity(read, part[: self.few]) for part in (self.windows.test, self.reviews))
        self.lab.add(arm, here, stored, nats=math.log(here), nats_on_reviews=math.log(there))

    def prompt(self, arm: str, forms: Mapping[str, Form]) -> SoftPrompt:
        """A prompt trained with the weights of these forms."""

        def make(rate: float, arm: str | None) -> Prompted:
            start = SoftPrompt.start(self.model, LENGTH, seed=self.seed)
            return self.tuned(Prompted(self.frozen(forms), start), rate, arm)

        made = self.best(arm, make)
        assert isinstance(made, Prompted)
        return made.prompt

    def norms(self, forms: Mapping[str, Form]) -> nn.Module:
        """The model with trained gains, and biases at the outputs of attention and of the feed-forward layers."""

        def make(rate: float, arm: str | None) -> nn.Module:
            found = self.frozen(forms)
            for name, layer in found.named_modules():
                if name.endswith("norm"):
                    layer.weight.requires_grad_()
                elif name.endswith(("o_proj", "down_proj")):
                    layer.bias = nn.Parameter(torch.zeros(len(layer.weight)))  # type: ignore[arg-type]
            return self.tuned(found, rate, arm)

        return self.best(f"{FIRST}, {NORMS}", make)

    def lora(self, forms: Mapping[str, Form]) -> dict[str, Form]:
        """The forms, with trained products of rank 1 beside those of queries and of the outputs of attention."""

        def make(rate: float, arm: str | None) -> nn.Module:
            found, draw, beside = self.frozen(forms), torch.Generator().manual_seed(self.seed), dict[str, Form]()
            for name, form in forms.items():
                if "q_proj" in name or "o_proj" in name:
                    rows, columns = form.shape
                    right = torch.randn(1, columns, generator=draw) / columns**0.5
                    beside[name] = Sum(form, LowRank(Dense(torch.zeros(rows, 1)), Dense(right)))
                    found.get_parameter(name).requires_grad_()
            formed(found, beside)
            return self.tuned(found, rate, arm)

        return {**forms, **forms_of(self.best(f"{FIRST}, {LORA}", make))}

    def frozen(self, forms: Mapping[str, Form]) -> nn.Module:
        """A copy of the model with the weights of these forms, none of which is trained."""
        found = copy.deepcopy(self.model).requires_grad_(False)
        for name, form in forms.items():
            found.get_parameter(name).data.copy_(form.dense())
        return found

    def best(self, arm: str, make: Make) -> nn.Module:
        """What is made with the rate of best development perplexity; the first seed decides for all."""
        known = self.windows.development[: self.few]
        rate = self.lab.choose(f"rate of {arm}", lambda rate: perplexity(make(rate, None), known), RATES)
        return make(rate, arm)

    def tuned(self, module: Tuned, rate: float, arm: str | None) -> Tuned:
        """Train what is not frozen, in place."""

        def batches(epoch: int) -> Iterator[dict[str, Tensor]]:
            for (part,) in shuffled(self.windows.train, size=SIZE, seed=self.seed)(epoch):
                yield {"input_ids": part}

        steps = 4 if self.lab.quick else STEPS
        self.lab.train(module, batches, next_token, steps=steps, seed=self.seed, arm=arm, lr=rate)
        return module


def judge(lab: Lab) -> None:
    """Compare nats per token, seed by seed."""
    arms = lab.arms

    def less(ours: str, theirs: str, of: str = "nats") -> Gap:
        return lab.ahead(ours, theirs, of=of, higher=False)

    def beyond(name: str, share: float = 0.0) -> Gap:
        rows = (arms[arm].also["nats"] for arm in (f"{name}, {NONE}", f"{name}, {OURS}", "dense", PROMPTED))
        found = [
            none - ours - (dense - own) - share * (none - dense) for none, ours, dense, own in zip(*rows, strict=True)
        ]
        what = f"nats gained at {name} over those that dense gains"
        return gap(f"{what} and {share:.0%} of those lost" if share else what, found, [0.0])

    lab.gate("dense has a perplexity below 80", gap("80 less perplexity", [80], arms["dense"].values))
    for name in LEVELS:
        lost = lab.ahead("dense", f"{name}, {NONE}", 0.05, of="nats", higher=False)
        lab.gate(f"{name} loses over 0.05 nats", lost)
    lab.judge("recovers", *(less(f"{name}, {OURS}", f"{name}, {NONE}") for name in LEVELS))
    lab.judge("exposed", *(less(f"{name}, {OURS}", f"{name}, {DENSE}") for name in LEVELS))
    lab.judge("corpus", *(less(f"{name}, {OURS}", f"{name}, {NONE}", "nats on reviews") for name in LEVELS))
    pairs = [(name, other) for name in LEVELS for other in LEVELS if other != name]
    lab.judge("levels", *(less(f"{name}, prompt of {other}", f"{name}, {NONE}") for name, other in pairs))
    lab.judge("more", *(beyond(name) for name in LEVELS))
    lab.judge("half", beyond(FIRST, 0.5))
    for key, rival in (("norms", NORMS), ("lora", LORA)):
        lab.judge(key, less(f"{FIRST}, {OURS}", f"{FIRST}, {rival}"))
    shown = ", ".join(f"{arm} {arms[f'{FIRST}, {arm}'].shown}" for arm in (NONE, DENSE, OURS, NORMS, LORA))
    lab.say(
        f"Dense perplexity is {arms['dense'].shown}, with its own prompt {arms[PROMPTED].shown}. At {FIRST}: {shown}."
    )
