"""The Tiny Time-series Transformer's pipeline: prune, cluster, code by entropy, 8 bits; and what file formats cost."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from octavo.artifact import Artifact, Contents, Entry, Kept, pack
from octavo.forms import Codebook, Form
from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.data import Split
from octavo.recipes.frame.nets import shuffled
from octavo.recipes.testbeds.series import VOWELS, SeriesTransformer, vowels
from octavo.runtimes.onnx.sessions import Session, require
from octavo.sources.sites import Layout
from octavo.sources.source import from_module
from octavo.training import GradualPruning, LearnedLevels, accuracy, cross_entropy
from octavo.training.formed import plain_copy
from octavo.training.regimens.base import Regimen

#: Steps of every arm, and the last of them, which train levels; examples of a step; rates of both.
STEPS, TUNED, BATCH, RATE, LAST = 400, 150, 32, 1e-3, 3e-4
WIDTH, SPARSITY, LEVELS = 128, 0.85, 16
#: Loads and answers of which the median is told.
ROUNDS = 15

DENSE, LINEAR, THINNER, ALONE = "dense", "linear classifier", "thinner dense", "quantization alone"
PRUNED, CLUSTERED, BOTH, EIGHT = "pruned", "clustered", "pruned, clustered", "pruned, clustered, 8 bits"
LOSS, RATIO, LOAD, ANSWER = "test log loss", "times smaller", "milliseconds to load", "milliseconds to answer"
TENSORS, FLAT, ARTIFACT, ONNX = "file: safetensors", "file: flat 8 bits", "file: artifact", "file: ONNX"


@Study(
    "t2",
    system="Tiny Time-series Transformer",
    source="Allam, Peloton & McEwen (2023), arXiv 2303.08951",
    metric="test accuracy (%)",
    higher=True,
    data=VOWELS,
    claims={
        "small": "The pipeline's file is at least 18 times smaller",
        "accuracy": "Its accuracy is within the seed spread of dense",
        "format": "A flat file of 8 bits loads faster than ONNX",
    },
    extras={
        "both": "Pruning before clustering makes the file smaller than clustering",
        "alone": "The pipeline beats quantization alone at equal bytes",
        "smaller": "The pipeline beats a thinner dense net at equal bytes",
    },
)
def run(lab: Lab) -> None:
    """All trained arms have the same steps; files of all formats hold the weights of the last arm."""
    for seed in lab.seeds:
        lab.step(f"seed {seed}")
        Pipeline(lab, vowels(lab), seed).all()
    arms = lab.arms
    smaller = arms[EIGHT].also[RATIO]
    lab.gate("the dense net beats a linear classifier", lab.ahead(DENSE, LINEAR))
    lab.gate("there is room: a thinner net of equal bytes is worse", lab.ahead(DENSE, THINNER))
    lab.judge("small", gap("times smaller, over 18", smaller, [18.0] * len(smaller)), needs=())
    spread = statistics.stdev(arms[DENSE].values) if len(arms[DENSE].values) > 1 else 0.0
    lab.judge("accuracy", lab.ahead(EIGHT, DENSE, -spread), needs=())
    formats = [lab.ahead(FLAT, ONNX, of=LOAD, higher=False)] if ONNX in arms else []
    lab.judge("format", *(formats or [lab.ahead(FLAT, ARTIFACT, of=LOAD, higher=False)]), needs=())
    lab.judge("both", lab.ahead(BOTH, CLUSTERED, of=RATIO, higher=True), needs=())
    lab.judge("alone", lab.ahead(EIGHT, ALONE))
    lab.judge("smaller", lab.ahead(EIGHT, THINNER))
    told = [
        f"{name.removeprefix('file: ')} {arms[name].bytes:,} bytes, {statistics.median(arms[name].also[LOAD]):.1f} ms"
        for name in (TENSORS, ONNX, FLAT, ARTIFACT)
        if name in arms
    ]
    lab.say(
        f"Bytes and milliseconds until the weights are there: {'; '.join(told)}. Only ONNX answers by another runtime; "
        "all other formats give the same module, with float weights."
    )


class Pipeline:
    """All arms of one seed."""

    def __init__(self, lab: Lab, split: Split, seed: int) -> None:
        self.lab, self.split, self.seed = lab, split, seed
        self.steps, self.tuned, self.width = (12, 4, 16) if lab.quick else (STEPS, TUNED, WIDTH)

    def net(self, width: int | None = None) -> nn.Module:
        """An untrained net."""
        torch.manual_seed(self.seed)
        _, channels, times = self.split.train[0].shape
        return SeriesTransformer(channels, times, self.split.classes, width or self.width)

    def trained(
        self, model: nn.Module, arm: str | None, steps: int, lr: float = RATE, regimen: Regimen | None = None
    ) -> nn.Module:
        """A model after its last steps."""
        return self.lab.train(
            model, shuffled(*self.split.train, size=BATCH, seed=self.seed), cross_entropy, steps=steps, seed=self.seed,
            arm=arm, before=self.steps - steps, lr=lr, regimen=regimen,
        )  # fmt: skip

    def all(self) -> None:
        """Every arm, and every format of the last."""
        lab, early = self.lab, self.steps - self.tuned
        dense = self.trained(self.net(), DENSE, self.steps)
        self.float32 = sum(4 * weight.numel() for weight in dense.parameters())
        self.add(DENSE, dense)
        pixels = nn.Sequential(nn.Flatten(), nn.Linear(self.split.train[0][0].numel(), self.split.classes))
        self.add(LINEAR, self.trained(pixels, LINEAR, self.steps))
        pruning = GradualPruning(SPARSITY)
        pruned = self.trained(self.net(), PRUNED, self.steps, RATE, pruning)
        self.add(PRUNED, pruned, pruning.forms(pruned))
        whole, sparse = self.net(), self.net()
        self.trained(whole, None, early)
        self.trained(sparse, None, early, RATE, GradualPruning(SPARSITY))
        self.clustered(CLUSTERED, whole, zeros=False)
        model, forms = self.clustered(BOTH, sparse, zeros=True)
        forms = {name: on_eight_bits(form) for name, form in forms.items()}
        size = self.add(EIGHT, model, forms)
        self.add_alone(dense, size)
        width = lab.thinner(lambda width: self.net(4 * width), size, range(1, self.width // 4 + 1))
        self.add(THINNER, self.trained(self.net(4 * width), THINNER, self.steps))
        self.formats(model, forms)

    def clustered(self, arm: str, model: nn.Module, *, zeros: bool) -> tuple[nn.Module, Mapping[str, Form]]:
        """Weights that share levels, which train for the last steps."""
        regimen = LearnedLevels(LEVELS, places="linear", zeros=zeros)
        self.trained(model, arm, self.tuned, LAST, regimen)
        forms = regimen.forms(model)
        plain = plain_copy(model, forms)
        self.add(arm, plain, forms)
        return plain, forms

    def add(self, arm: str, model: nn.Module, forms: Mapping[str, Form] | None = None) -> int:
        """Quality of what was read back; returns its bytes."""
        stored = self.lab.stored(model, forms)
        self._note(arm, stored.load(copy.deepcopy(model)), stored.bytes)
        return stored.bytes

    def add_alone(self, dense: nn.Module, size: int) -> None:
        """The dense net, quantized to equal bytes."""
        stored = self.lab.quantization_alone(dense, size)
        self._note(ALONE, stored.load(copy.deepcopy(dense)), stored.bytes)

    def _note(self, arm: str, model: nn.Module, size: int) -> None:
        with torch.no_grad():
            loss = float(cross_entropy(model, self.split.test))
        value = 100 * accuracy(model, [self.split.test])
        self.lab.add(arm, value, size, **{LOSS: loss, RATIO: self.float32 / size})

    def formats(self, model: nn.Module, forms: Mapping[str, Form]) -> None:
        """Bytes, milliseconds to load and milliseconds to answer one series, by format."""
        series, truth = self.split.test
        one = series[:1]
        with tempfile.TemporaryDirectory(prefix="octavo-") as folder:
            for name, (file, load) in written(model, forms, one, Path(folder), onnx=not self.lab.quick).items():
                answer = load()
                right = sum(int(answer(x).argmax()) == int(y) for x, y in zip(series.split(1), truth, strict=True))
                loaded = milliseconds(load, 2 if self.lab.quick else ROUNDS)
                answered = milliseconds(lambda answer=answer: answer(one), 2 if self.lab.quick else ROUNDS)  # type: ignore[misc]
                size = Artifact(file).bytes if file.is_dir() else file.stat().st_size
                self.lab.add(name, 100 * right / len(truth), size, **{LOAD: loaded, ANSWER: answered})


Answer = Callable[[Tensor], Tensor]


def written(
    model: nn.Module, forms: Mapping[str, Form], one: Tensor, folder: Path, *, onnx: bool
) -> dict[str, tuple[Path, Callable[[], Answer]]]:
    """A file in every format, and what loads it, ready to answer."""
    state, tensors, flat = model.state_dict(), folder / "whole.safetensors", folder / "flat.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tensors)
    parts = dict(state)
    for name in forms:
        scale = state[name].abs().max().clamp_min(1e-12) / 127
        parts |= {name: (state[name] / scale).round().to(torch.int8), f"{name}.scale": scale}
    save_file({name: tensor.contiguous() for name, tensor in parts.items()}, flat)
    write_artifact(model, forms, folder / "artifact")

    def into(values: Mapping[str, Tensor]) -> Answer:
        model.load_state_dict(values)
        return answering(model)

    def scaled() -> Answer:
        found = load_file(flat)
        return into({n: found[n].float() * found[f"{n}.scale"] if n in forms else found[n] for n in state})

    made = {
        TENSORS: (tensors, lambda: into(load_file(tensors))),
        FLAT: (flat, scaled),
        ARTIFACT: (folder / "artifact", lambda: into(Artifact(folder / "artifact").state())),
    }
    if onnx:
        made[ONNX] = as_onnx(model, one, folder / "net.onnx")
    return made


def write_artifact(model: nn.Module, forms: Mapping[str, Form], folder: Path) -> None:
    """Forms, and everything else in 16 bits, as in the other arms."""
    source = from_module(model)
    told = {"title": source.title, "fingerprint": "0" * 64, "bytes": source.original_bytes, "weights": source.weights}
    contents = Contents(told)
    for name, shape in source.shapes.items():
        kind = source.dtypes[name]
        if name in forms:
            contents.entries[name] = Entry(pack(forms[name]), shape, kind, Layout())
        else:
            contents.kept[name] = Kept(partial(source.read, name), shape, torch.float16, kind)
    folder.mkdir()
    contents.write(folder)


def answering(model: nn.Module) -> Answer:
    """The model without gradients."""
    return torch.no_grad()(model.eval())


def as_onnx(model: nn.Module, one: Tensor, file: Path) -> tuple[Path, Callable[[], Answer]]:
    """The module as a float ONNX file, run by onnxruntime on one thread."""
    require()
    torch.onnx.export(
        model.eval(),
        (one,),
        str(file),
        input_names=["x"],
        output_names=["y"],
        dynamo=True,
        external_data=False,
        verbose=False,
    )

    def load() -> Answer:
        session = Session(file, threads=1)
        return lambda x: torch.from_numpy(session.session.run(None, {"x": x.numpy()})[0])

    return file, load


def milliseconds(call: Callable[[], object], rounds: int) -> float:
    """The median of some calls."""
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - started))
    return statistics.median(taken)


def on_eight_bits(form: Form) -> Form:
    """Levels on a grid of 8 bits, as integer runtimes have them."""
    assert isinstance(form, Codebook)
    scale = form.values.abs().max().clamp_min(1e-12) / 127
    return replace(form, values=(form.values / scale).round() * scale)
