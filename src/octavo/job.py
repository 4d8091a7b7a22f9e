"""One source with everything that the steps share: its sites, its data, its objective and its workspace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import octavo.sites as sites_module
from octavo.artifact import Contents, Entry, Kept, Packed, unpack
from octavo.blockwise import Blockwise
from octavo.calibrate import MINIMUM_SEQUENCES, Calibration, data_free
from octavo.data.texts import builtin_texts, check_texts, read_texts
from octavo.errors import RequestError
from octavo.executors import Executor, Local
from octavo.inmemory import InMemory
from octavo.memory import fits
from octavo.methods import Method, Setting, get_method
from octavo.objective import Batch, Objective, objective, select, sequences_in
from octavo.raw import Lazily, narrowed
from octavo.sites import Site, Source
from octavo.tasks import encoded
from octavo.workspace import Workspace

#: Called with a step's name, how much of it is done and how much there is.
Progress = Callable[[str, int, int], Any]

#: Every fourth sequence is held back from calibration to measure plans on, but no more than this many.
_HELD = 96
#: Tokens of a language model that are read in place of one text.
TOKENS_PER_TEXT = 64
#: Texts beyond these do not make the calibration of a language model better by what they take of time.
MOST_TEXTS = 1024
#: Texts of a language model are joined and cut into windows of this many tokens, or of its context if shorter.
WINDOW = 256
#: Norms, biases and the like are stored in 16 bits if all of them together cost less than this, in the metric's units.
_FREE = 1e-7
_WAY = "way.json"


def silent(step: str, done: int, total: int) -> None:
    """No progress."""


@dataclass
class Job:
    """A source, and what is known about it so far."""

    source: Source
    sites: list[Site]
    left: dict[str, str]
    objective: Objective
    calibration_data: list[Batch]
    held_data: list[Batch]
    text: str
    methods: list[Method]
    pinned: dict[str, tuple[str, Setting]] = field(default_factory=dict)
    seed: int = 0
    progress: Progress = silent
    target: str = "disk"
    notes: list[str] = field(default_factory=list)
    #: Bytes of memory that the run may take; None for what the machine has.
    memory: int | None = None
    executor: Executor = field(default_factory=Local)

    def __post_init__(self) -> None:
        self._model: InMemory | Blockwise | None = None
        # Checksums of kept tensors are worked out once for all contents.
        self._kept: dict[torch.dtype | None, dict[str, Kept]] = {}
        self._by_name = {site.name: site for site in self.sites}

    def site(self, name: str) -> Site:
        """The site of that name."""
        return self._by_name[name]

    def matrix(self, site: Site) -> Tensor:
        """A site's weight as a float32 matrix."""
        return site.layout.to_matrix(self.source.read(site.name).float())

    def calibrate(self, workspace: Workspace) -> Calibration:
        """Evidence of all sites, from the workspace if it is there."""
        # The way is that of the run that is resumed, though the machine may have other memory to spare now.
        way = workspace.read_json(_WAY) or {"blockwise": not fits(self.source, self.memory)}
        workspace.write_json(_WAY, way)
        found = workspace.load_calibration()
        if self.source.module is not None:
            self._model = model_of(self.source, blockwise=way["blockwise"])
        if found is None:
            if self._model is None:
                found = data_free(self.source, self.sites)
                workspace.evidence.write("data-free", found.evidence)
            else:
                found = self._model.calibrate(
                    self.sites,
                    self.calibration_data,
                    self.objective,
                    workspace,
                    seed=self.seed,
                    text=self.text,
                    progress=lambda done, total: self.progress("evidence", done, total),
                )
            workspace.save_calibration(found)
            # Read back when it is needed, as by a run that is resumed.
            found.evidence = workspace.evidence
        return found

    def encode_all(
        self, chosen: Mapping[str, Any], calibration: Calibration, workspace: Workspace
    ) -> Iterator[tuple[str, Packed]]:
        """Names and packed forms of sites, whose contents lie in the workspace; what was there is not made again.

        Parameters
        ----------
        chosen
            By name of the site what has a ``method`` and a ``setting``, such as a point.
        """
        found = {name: workspace.load_packed(name, point.method, point.setting) for name, point in chosen.items()}
        missing = [(self.site(name), chosen[name]) for name, packed in found.items() if packed is None]
        results = self.executor.map(
            encoded,
            (
                (site, self.matrix(site), calibration.evidence[site.name], point.method, point.setting)
                for site, point in missing
            ),
        )
        for name, packed in found.items():
            if packed is None:
                point = chosen[name]
                packed = workspace.save_packed(name, point.method, point.setting, next(results))
            yield name, packed

    def kept(self, dtype: torch.dtype | None) -> dict[str, Kept]:
        """Tensors that are no sites, floating ones in 16 bits where these are exact, or ``dtype`` is narrower."""
        if dtype not in self._kept:
            self._kept[dtype] = {}
            for name, reason in self.left.items():
                own = stored = self.source.dtypes[name]
                # What the user asked to leave alone is left alone.
                if own.is_floating_point and not reason.startswith("ignored"):
                    narrow = _exactly(self.source.read(name)) or dtype
                    stored = narrow if narrow is not None and own.itemsize > narrow.itemsize else own
                self._kept[dtype][name] = Kept(partial(self.source.read, name), self.source.shapes[name], stored, own)
        return self._kept[dtype]

    def kept_dtype(self) -> torch.dtype | None:
        """float16 if storing everything that is no site in it costs nothing measurable, else None."""
        changed = {name: kept for name, kept in self.kept(torch.float16).items() if kept.stored != kept.dtype}
        if not all(bool(torch.isfinite(kept.tensor()).all()) for kept in changed.values()):
            return None
        if not self.measurable:
            close = all(
                torch.allclose(kept.tensor().float(), kept.read().float(), rtol=1e-3, atol=1e-6)
                for kept in changed.values()
            )
            return torch.float16 if close else None
        weights = {name: kept.tensor() for name, kept in changed.items()}
        return torch.float16 if float(self.measure(weights).mean()) < _FREE else None

    def contents(self, packed: Mapping[str, Packed], dtype: torch.dtype | None) -> Contents:
        """Everything that goes into an artifact."""
        source = {
            "title": self.source.title,
            "fingerprint": self.source.fingerprint(),
            "bytes": self.source.original_bytes,
            "weights": self.source.weights,
        }
        entries = {
            name: Entry(item, self.site(name).shape, self.site(name).dtype, self.site(name).layout)
            for name, item in packed.items()
        }
        resident = self.resident(packed) if self.target == "memory" else None
        return Contents(source, entries, self.kept(dtype), self.source.aliases, resident)

    def resident(self, packed: Mapping[str, Packed]) -> int:
        """Bytes of all tensors while the model runs packed: sites, what is no site, and buffers that are not stored."""
        total = sum(item.resident for item in packed.values())
        for name in self.left:
            dtype = self.source.dtypes[name]
            # Models of transformers run in bfloat16 as a whole.
            narrow = self.source.is_transformers and dtype.is_floating_point
            total += math.prod(self.source.shapes[name]) * (2 if narrow else dtype.itemsize)
        if self.source.module is not None:
            stored = self.source.module.state_dict().keys()
            total += sum(b.nbytes for name, b in self.source.module.named_buffers() if name not in stored)
        return total

    def weights(self, packed: Mapping[str, Packed]) -> Lazily:
        """Packed sites as tensors of the source, each decoded when it is asked for."""

        def decoded(site: Site, item: Packed) -> Tensor:
            form = unpack(memoryview(item.blob), item.parts, item.meta, (site.rows, site.columns))
            return narrowed(site.layout.from_matrix(form.dense(), site.shape), site.dtype)

        return Lazily({name: partial(decoded, self.site(name), item) for name, item in packed.items()})

    def measure(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Divergence of every held-back example with some tensors of the source replaced."""
        if self._model is None or not self.held_data:
            raise RequestError("nothing can be measured without a model and data")
        return self._model.measure(self.held_data, self.objective, weights)

    def judge(self, module: nn.Module) -> Tensor:
        """Divergence of every held-back example from the source with another module in its place."""
        assert self._model is not None
        with torch.inference_mode():
            pairs = zip(self.held_data, self._model.outputs(self.held_data, self.objective), strict=True)
            return torch.cat(
                [self.objective.divergence(old, self.objective.outputs(module, data)) for data, old in pairs]
            )

    @property
    def measurable(self) -> bool:
        """Whether plans can be measured."""
        return self.source.module is not None and bool(self.held_data)


def _exactly(tensor: Tensor) -> torch.dtype | None:
    """The 16-bit dtype that holds all values of a tensor, if there is one."""
    narrow = (torch.float16, torch.bfloat16)
    return next((dtype for dtype in narrow if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)), None)


def model_of(source: Source, *, blockwise: bool) -> InMemory | Blockwise:
    """The model of a source, to be run; that of a folder is loaded now, or block by block whenever it is run."""
    if source.is_skeleton:
        if blockwise:
            return Blockwise(source)
        from octavo.integrations.transformers import load_weights

        load_weights(source)
    return InMemory(source)


def open_source(source: str | Path | nn.Module | Source, *, module: bool = True, progress: Progress = silent) -> Source:
    """A source from a path or a module; NaN and Inf in it are refused.

    ``module`` says whether a folder's model will be run; if not, it is never loaded.
    """

    def examined(done: int, total: int) -> None:
        progress("open", done, total)

    if isinstance(source, nn.Module):
        opened = sites_module.from_module(source)
    elif isinstance(source, Source):
        opened = source
    else:
        opened = sites_module.from_path(source, module=module, progress=examined)
    sites_module.examine(opened, examined)
    return opened


def load_data(source: Source, data: Any, *, limit: int | None) -> tuple[list[Batch], str]:
    """Batches from what the user gave, and what to call them in the report.

    ``data`` is a file of texts, a list of texts, or an iterable of batches; None takes the built-in text for a text
    model.
    """
    folder = source.folder
    if source.module is None:
        if data is not None:
            raise RequestError(f"{source.title}: without a model, calibration data cannot be used; leave it out")
        return [], "none (data-free)"
    is_texts = isinstance(data, list) and data and all(isinstance(item, str) for item in data)
    if data is None or isinstance(data, str | Path) or is_texts:
        if folder is None or not source.is_transformers:
            if data is None:
                return [], "none (data-free)"
            raise RequestError(
                f"{source.title}: texts need a transformers folder with a tokenizer; give batches instead"
            )
        from octavo.integrations.transformers import context_of, is_causal, text_batches, window_batches

        texts, label = texts_of(data)
        if is_causal(source.module):
            length = min(WINDOW, context_of(source.module))
            windows = window_batches(folder, texts, length, limit=(limit or MOST_TEXTS) * TOKENS_PER_TEXT)
            count = sum(len(batch["input_ids"]) for batch in windows)
            return windows, f"{label}, {count} windows of {windows[0]['input_ids'].shape[1]} tokens"
        texts = texts[:limit]
        return text_batches(folder, texts), f"{label}, {len(texts)} texts"
    if not isinstance(data, Iterable):
        raise RequestError(f"data is {type(data).__name__}; give a file or list of texts, or an iterable of batches")
    batches = list(data)
    total = sum(sequences_in(batch) for batch in batches)
    if not total:
        raise RequestError(
            f"data: no examples in {len(batches)} batches; a batch is a tensor, or a tuple or mapping of tensors, "
            "examples first"
        )
    return batches, f"{total} examples given"


def prepared(source: Source, wanted: Objective, batches: Sequence[Batch]) -> list[Batch]:
    """Batches that a model can take, cut so that the outputs of each fit in memory.

    Raises
    ------
    RequestError
        If they hold tokens that the model does not know, or are longer than it takes.
    """
    assert source.module is not None
    if source.is_transformers:
        from octavo.integrations.transformers import check_tokens

        check_tokens(source.module, batches)
    return wanted.pieces(source.module, batches)


def texts_of(data: Any) -> tuple[list[str], str]:
    """Texts of a file or a list, or the built-in ones, and what to call them."""
    if data is None:
        return builtin_texts(), "built-in English text"
    if isinstance(data, list):
        check_texts(data, "data")
        return list(data), "texts given"
    return read_texts(data), Path(data).name


def split(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Calibration and held-back parts: of every four sequences, one is held back, up to 96.

    Raises
    ------
    RequestError
        If there are sequences, but too few are left to calibrate on.
    """
    calibration, held, seen, count = [], [], 0, 0
    for batch in batches:
        size = sequences_in(batch)
        keep = torch.ones(size, dtype=torch.bool)
        # Counted over all batches, so that batches of one sequence are divided as well.
        keep[3 - seen % 4 :: 4][: _HELD - count] = False
        seen, count = seen + size, count + int((~keep).sum())
        if bool(keep.any()):
            calibration.append(select(batch, keep))
        if not bool(keep.all()):
            held.append(select(batch, ~keep))
    if seen and seen - count < MINIMUM_SEQUENCES:
        raise RequestError(
            f"data: of {seen} sequences {count} are held back to measure on, and {seen - count} left to calibrate on; "
            f"at least {MINIMUM_SEQUENCES} are needed, so give 10 or more (256 serve well)"
        )
    return calibration, held


def choose_objective(source: Source, wanted: str | Objective | None) -> Objective:
    """The objective asked for, or the one that fits the source."""
    if wanted is not None:
        return objective(wanted)
    if source.is_transformers:
        from octavo.integrations.transformers import default_objective

        return default_objective(source, source.folder)
    return objective("kl")


def apply_patterns(
    sites: list[Site], left: dict[str, str], ignore: Iterable[str], keep: Mapping[str, str]
) -> tuple[list[Site], dict[str, str], dict[str, tuple[str, Setting]]]:
    """Sites that remain after ``ignore`` globs, reasons for the rest, and the choices pinned by ``keep``.

    Raises
    ------
    RequestError
        If a pattern matches nothing, or a specification cannot be read.
    """
    left, pinned = dict(left), {}
    for pattern in ignore:
        matched = [site for site in sites if fnmatchcase(site.name, pattern)]
        if not matched:
            raise RequestError(f"--ignore {pattern!r} matches no site; sites are named like {_example(sites)}")
        left.update({site.name: f"ignored by {pattern!r}" for site in matched})
        sites = [site for site in sites if site not in matched]
    for pattern, spec in keep.items():
        matched = [site for site in sites if fnmatchcase(site.name, pattern)]
        if not matched:
            raise RequestError(f"--keep {pattern!r} matches no site; sites are named like {_example(sites)}")
        pinned.update({site.name: parse_spec(spec) for site in matched})
    return sites, left, pinned


def _example(sites: list[Site]) -> str:
    return ", ".join(repr(site.name) for site in sites[:2]) or "(there are none left)"


def parse_spec(spec: str) -> tuple[str, Setting]:
    """``float16`` or ``gptq:bits=4,group=64`` as a method and a setting."""
    if spec in ("float32", "float16", "bfloat16"):
        return "keep", {"dtype": spec}
    name, _, knobs = spec.partition(":")
    get_method(name)
    setting: Setting = {}
    for knob in filter(None, knobs.split(",")):
        key, separator, value = knob.partition("=")
        if not separator:
            raise RequestError(f"{spec!r}: write a choice like gptq:bits=4,group=64 or float16")
        setting[key] = _number(value)
    return name, setting


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
