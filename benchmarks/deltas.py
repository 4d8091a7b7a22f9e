"""Fine-tunes of MiniLM as differences: Octavo beside ComPEFT, one bit, low rank, and compressing the tuned model itself.

    python benchmarks/deltas.py [--tasks sts,sst2] [--ratios 20,50,100,200]

writes docs/results/deltas.json. MiniLM is tuned on the pairs of STS-B with their scores, and with a new head on SST-2; OCTAVO_DATA
must name the studies' data. Ratios are to the difference in 16 bits, and every payload has at most the bytes of its
ratio. Each is read back and added to the base, and the task's score is taken on test data. ComPEFT's share is what fits
the bytes; its scale and that of one bit are chosen on development data. About 25 minutes a task on one core.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import CACHE, load_results, save_results, stat_bytes
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

import octavo
from octavo.flows.updates.powersgd import PowerSGD
from octavo.recipes.communication.compeft import BITS, SCALES, coded_alone, one_bit, ternary
from octavo.recipes.frame import Lab, studies
from octavo.recipes.frame.data import likeness
from octavo.recipes.testbeds.federated import Tensors
from octavo.recipes.testbeds.students import Classifier, dealt, pretrained, read, reviews, right
from octavo.system.matmul import coarse_matmul
from octavo.training import cross_entropy, fit

#: Epochs and rate of tuning on pairs, and pairs of a batch.
EPOCHS, RATE, SIZE = 1, 1e-4, 32
#: Ranks of which low rank takes the best, and batches of training text that Octavo calibrates on.
RANKS, SEEN = (1, 4, 16, 64), 24


class Embedder(nn.Module):
    """An encoder, and the mean over its tokens at length one."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Tokens and their mask, (N, tokens), to embeddings (N, width)."""
        states, mask = self.encoder(input_ids, attention_mask).last_hidden_state, attention_mask[..., None]
        return functional.normalize((states * mask).sum(1), dim=1)


class Likeness:
    """Pairs of sentences and what humans say of them: Spearman correlation in percent."""

    objective, metric = "squared", "Spearman on STS-B (%)"

    def __init__(self, lab: Lab) -> None:
        self.parts = likeness(lab)
        self.texts = read(sorted({text for pair in self.parts.train for text in pair[:2]})[::4])
        self.base: nn.Module = Embedder(pretrained(lab)).eval()
        self.development, self.test = _prepared(self.parts.development), _prepared(self.parts.test)

    def batches(self) -> list[Any]:
        """Both sentences of some pairs, and their scores."""
        pairs = list(self.parts.train)
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
        batches = []
        for start in range(0, len(order) - SIZE + 1, SIZE):
            some = [pairs[place] for place in order[start : start + SIZE]]
            scores = torch.tensor([score / 5 for *_, score in some])
            batches.append((_one([a for a, *_ in some]), _one([b for _, b, _ in some]), scores))
        return batches

    @staticmethod
    def loss(module: nn.Module, batch: Any) -> Tensor:
        """The squared error of cosines."""
        one, other, scores = batch
        return functional.mse_loss((module(**one) * module(**other)).sum(1), scores)

    @torch.inference_mode()
    def score(self, model: nn.Module, part: Any) -> float:
        """Of the pairs of a part."""
        batches, one, other, scores = part
        vectors = torch.cat([model(**batch) for batch in batches])
        return 100 * float(spearmanr((vectors[one] * vectors[other]).sum(1).numpy(), scores.numpy()).statistic)


def _prepared(pairs: Any) -> Any:
    """Batches of all sentences of some pairs, the numbers of both, and scores."""
    known = sorted({text for pair in pairs for text in pair[:2]}, key=lambda text: (len(text), text))
    place = {text: number for number, text in enumerate(known)}
    one, other = torch.tensor([(place[a], place[b]) for a, b, _ in pairs]).t()
    return read(known), one, other, torch.tensor([score for *_, score in pairs])


def _one(texts: list[str]) -> dict[str, Tensor]:
    """Sentences as one batch, in their order; the tokenizer's batches are in the order of lengths."""
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    (batch,) = read([texts[place] for place in order])
    back = torch.tensor(order).argsort()
    return {name: tensor[back] for name, tensor in batch.items()}


class Sentiment:
    """SST-2, with a new head: accuracy in percent."""

    objective, metric, loss = "kl", "accuracy on SST-2 (%)", staticmethod(cross_entropy)

    def __init__(self, lab: Lab) -> None:
        self.parts = reviews(lab)
        self.texts = [batch for batch, _ in self.parts.train[::4]]
        torch.manual_seed(0)
        self.base: nn.Module = Classifier(pretrained(lab)).eval()
        self.development, self.test = self.parts.development, self.parts.test

    def batches(self) -> list[Any]:
        """Sentences and labels."""
        return self.parts.train

    def score(self, model: nn.Module, part: Any) -> float:
        """Of the sentences of a part."""
        return right(model, part)


TASKS: dict[str, Callable[[Lab], Any]] = {"sts": Likeness, "sst2": Sentiment}


class Comparison:
    """All arms of one task."""

    def __init__(self, name: str, lab: Lab, rows: list[dict[str, Any]]) -> None:
        self.name, self.lab, self.rows, self.task = name, lab, rows, TASKS[name](lab)
        self.tuned = self.tune().eval()
        before = dict(self.task.base.named_parameters())
        self.difference: Tensors = {
            name: (parameter - before[name]).detach() for name, parameter in self.tuned.named_parameters()
        }
        self.whole = 2 * sum(tensor.numel() for tensor in self.difference.values() if bool(tensor.any()))

    def tune(self) -> nn.Module:
        """The base after it was tuned, which is done once."""
        model = copy.deepcopy(self.task.base)
        kept = CACHE / "deltas" / f"{self.name}-{self.task.parts.digest}-{EPOCHS}-{RATE:g}.safetensors"
        if kept.exists():
            model.load_state_dict(load_file(kept))
            return model
        with coarse_matmul():
            fit(model, dealt(self.task.batches(), 0), self.task.loss, epochs=EPOCHS, lr=RATE, warmup=0.1)
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), kept)
        return model

    def note(self, arm: str, ratio: float | None, size: int, model: nn.Module | None, **also: Any) -> None:
        """A row, saved at once."""
        score = None if model is None else self.task.score(model.eval(), self.task.test)
        row = {"task": self.name, "metric": self.task.metric, "arm": arm, "ratio": ratio, "bytes": size}
        self.rows[:] = [old for old in self.rows if (old["task"], old["arm"], old["ratio"]) != (self.name, arm, ratio)]
        self.rows.append({**row, "score": score, **also})
        print(self.rows[-1], flush=True)
        save_results("deltas", {"rows": self.rows})

    def moved(self, difference: Tensors) -> nn.Module:
        """The base with a difference added."""
        model = copy.deepcopy(self.task.base)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(difference[name])
        return model.eval()

    def chosen(self, arm: str, make: Callable[[float], Tensors], scales: Sequence[float]) -> float:
        """The scale of best score on development data."""
        score = lambda scale: float(self.task.score(self.moved(make(scale)), self.task.development))  # noqa: E731
        return self.lab.choose(f"scale of {arm}, {self.name}", score, scales, higher=True)

    def fixed(self) -> None:
        """What has one size: both ends, and one bit an entry."""
        self.note("base", None, 0, self.task.base)
        halves = {name: tensor.half().float() for name, tensor in self.difference.items()}
        self.note("difference in 16 bits", 1, self.whole, self.moved(halves))
        factor = self.chosen("one bit", lambda factor: one_bit(factor)(self.difference)[0], BITS)
        found, size = one_bit(factor)(self.difference)
        self.note("one bit", None, size, self.moved(found), scale=factor)

    def at(self, ratio: float, work: Path) -> None:
        """All arms at a ratio."""
        budget = int(self.whole / ratio)
        how = {"data": self.task.texts[:SEEN], "objective": self.task.objective, "progress": False, "resume": True}
        out = work / f"{self.name}-{ratio:g}"
        self.compressed(
            "octavo", ratio, budget, out, base=self.task.base, workspace=work / f"{self.name}-profile", **how
        )
        share = self.share(budget)
        scale = self.chosen(f"ComPEFT, {ratio:g}", lambda scale: ternary(self.difference, share, scale)[0], SCALES)
        found, size = ternary(self.difference, share, scale)
        self.note("ComPEFT", ratio, size, self.moved(found), share=share, scale=scale)
        found, size = coded_alone(PowerSGD(feedback=False, ranks=RANKS), budget)(self.difference)
        self.note("low rank", ratio, size, self.moved(found))
        self.compressed("the tuned model itself", ratio, budget, out, workspace=work / f"{self.name}-itself", **how)

    def compressed(self, arm: str, ratio: float, budget: int, out: Path, **how: Any) -> None:
        """A row of Octavo's own; without a score where the bytes cannot be reached."""
        try:
            octavo.compress(self.tuned, size=budget, **how).save(out, overwrite=True)
        except octavo.BudgetError as error:
            self.note(arm, ratio, 0, None, error=str(error))
            return
        given = {"base": how["base"]} if "base" in how else {}
        self.note(arm, ratio, stat_bytes(out), octavo.load(out, copy.deepcopy(self.tuned), **given))

    def share(self, budget: int) -> float:
        """The largest share whose ternary payload fits."""
        low, high = 0.0, 0.5
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if ternary(self.difference, middle, None)[1] <= budget else (low, middle)
        return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(TASKS))
    parser.add_argument(
        "--ratios", type=lambda text: [float(ratio) for ratio in text.split(",")], default=[20, 50, 100, 200]
    )
    asked = parser.parse_args()
    lab, rows = Lab(next(iter(studies().values())), show=print), load_results("deltas").get("rows", [])
    warnings.simplefilter("ignore", octavo.OctavoWarning)
    with tempfile.TemporaryDirectory(prefix="octavo-") as work:
        for name in asked.tasks:
            comparison = Comparison(name, lab, rows)
            comparison.fixed()
            for ratio in asked.ratios:
                comparison.at(ratio, Path(work))


if __name__ == "__main__":
    main()
