"""A GGUF file for llama.cpp and everything built on it, mixed from its block types to the bytes asked for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.allocation.budget import Budget
from octavo.allocation.encoded import form_of
from octavo.allocation.opened import Opened
from octavo.allocation.plans import Plan
from octavo.allocation.profiles import Profile
from octavo.artifact import Artifact
from octavo.coding.ggml import TYPES, StoredBlocks
from octavo.encoding.result import Result
from octavo.encoding.section import Section
from octavo.errors import ArtifactError, MissingExtraError, RequestError
from octavo.forms import Form
from octavo.request import Request
from octavo.runtimes.gguf.architectures import Laid, Placed, laid_out, require_gguf
from octavo.runtimes.gguf.files import (
    Outlined,
    aligned,
    form_bytes,
    gains,
    header_bytes,
    kind_of,
    raw,
    read_file,
    scaled,
    stored_blocks,
    write_file,
)
from octavo.runtimes.gguf.llama import Ran, has_llama_cpp, ran
from octavo.sources.sites import Site
from octavo.sources.source import Source
from octavo.system.records import plain_json
from octavo.targets.base import target
from octavo.targets.fixed import ForeignFile
from octavo.targets.gguf_pace import limit, lossless, pace, quick
from octavo.verification.loading import load

FILE = "model.gguf"
#: Held-out sequences that llama.cpp runs, and the lengths that they are cut to and need.
_COMPARED, _LONGEST, _SHORTEST = 8, 256, 8
#: Logits that are held of each model: 512 MB of them.
_LOGITS = 1 << 27
#: A group of columns of the smallest blocks.
_GROUP = 32


@target("gguf")
class Gguf(ForeignFile):
    """Bytes of a GGUF file, whose tensors are of the types that llama.cpp runs."""

    about = "bytes of a GGUF file for llama.cpp, mixed from its block types"
    unit = "bytes of the GGUF file"

    def __init__(self) -> None:
        self._laid: Laid | None = None
        self._head: int | None = None

    def stated(self, request: Request) -> None:
        """Refuse a budget that is stated wrongly, or a missing package, before anything is read."""
        require_gguf()
        super().stated(request)

    def considered(self, profile: Profile, asked: Budget) -> Profile:
        """The points of which plans are made that llama.cpp runs as fast as its own mix of the size."""
        return quick(profile, asked)

    def admits(self, profile: Profile, plan: Plan, asked: Budget) -> bool:
        """Whether llama.cpp runs a plan as fast as its own mix of the size; one without loss always may win."""
        return lossless(profile, asked) or pace(profile, plan.points) <= limit(profile, asked)

    def gains(self, form: Form) -> int:
        """One for each block of a row."""
        return gains(form)

    def scaled(self, form: Form, factors: Tensor) -> Form:
        """The form with the factors in the scales of its blocks."""
        return scaled(form, factors)

    def adapted(self, source: Source) -> Source:
        """The source, laid out for llama.cpp or refused."""
        where = source.path or source.title
        if not source.is_transformers or source.folder is None or not (source.folder / "config.json").exists():
            raise RequestError(
                f"{where}: --for gguf needs a model folder of transformers or a GGUF file, whose configuration and "
                "tokenizer go into the file; save the model with save_pretrained, or use --for disk"
            )
        self._laid = laid_out(source, json.loads((source.folder / "config.json").read_text(encoding="utf-8")))
        return source

    def admitted(self, source: Source, sites: list[Site], left: dict[str, str]) -> tuple[list[Site], dict[str, str]]:
        """Sites whose matrices llama.cpp reads in any type, with their blocks in the source's file if it has some."""
        served = [site for site in sites if not self._placed(site.name).wide and self._as_laid(site)]
        if source.path is not None and source.path.suffix == ".gguf" and source.uncut is None:
            known = stored_blocks(source.path)
            served = [self._with_blocks(site, known) for site in served]
        names = {site.name for site in served}
        reason = "llama.cpp reads it in float32"
        return served, {**left, **{site.name: reason for site in sites if site.name not in names}}

    def check(self, opened: Opened) -> None:
        """Say which matrices no block type divides."""
        odd = [site.name for site in opened.sites if site.columns % _GROUP]
        if odd:
            opened.notes.append(
                f"{len(odd)} matrices keep 16 bits, such as {odd[0]!r}: their columns are no multiple of {_GROUP}, the "
                "smallest block of llama.cpp"
            )

    def resident(self, form: Form, rows: int) -> int:
        """Bytes in the file."""
        return form_bytes(form, rows)

    def beside(self, opened: Opened) -> int:
        """Bytes of the header and of all tensors that are not sites."""
        if self._head is None:
            tensors = [self._outlined(opened.source, name, 0) for name in self._laid_out.tensors]
            tensors += [Outlined(name, tuple(tensor.shape), 0) for name, tensor in self._laid_out.more()]
            self._head = header_bytes(opened.source, self._laid_out, tensors)
        sites = {site.name for site in opened.sites}
        rest = (opened.source.shapes[name] for name in self._laid_out.tensors if name not in sites)
        more = (tuple(tensor.shape) for _, tensor in self._laid_out.more())
        return self._head + sum(aligned(4 * int(np.prod(shape))) for shape in (*rest, *more))

    def files(self, folder: Path, artifact: Artifact) -> Sequence[Path]:
        """The GGUF file."""
        return [folder / FILE]

    def write(self, result: Result, folder: Path) -> None:
        """Write the file, tensor by tensor."""
        opened, source = result.opened, result.opened.source
        tensors: dict[Outlined, Callable[[], Any]] = {}
        for name in self._laid_out.tensors:
            placed = self._placed(name)
            if name in result.built.packed:
                site = opened.site(name)
                form = form_of(site, result.built.packed[name])
                tensors[self._outlined(source, name, kind_of(form))] = partial(raw, form, placed.rows(site.rows))
            else:
                kept = result.built.contents.kept[name]
                tensors[self._outlined(source, name, 0)] = partial(_wide, placed, kept.given)
        for name, tensor in self._laid_out.more():
            tensors[Outlined(name, tuple(tensor.shape), 0)] = tensor.numpy
        write_file(folder / FILE, source, self._laid_out, tensors)

    def verify(self, result: Result, artifact: Artifact, written: Any) -> Section:
        """Read the file back: its tensors must be those that the artifact holds."""
        found = read_file(artifact.path.parent / FILE)
        types: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        names = {number: name for name, number in _NUMBERS.items()}
        for name, placed in self._laid_out.tensors.items():
            kind, content = found[placed.name]
            types[names[kind]] += 1
            sizes[names[kind]] += content.nbytes
            if name in result.built.packed:
                site = result.opened.site(name)
                form = form_of(site, replace(result.built.packed[name], content=bytes(artifact.content(name))))
                wanted, same = raw(form, placed.rows(site.rows)), kind == kind_of(form)
            else:
                wanted, same = placed.array(artifact.tensor(name)).numpy().view(np.uint8), kind == 0
            if not same or content.tobytes() != wanted.tobytes():
                raise ArtifactError(f"{FILE}: tensor {placed.name!r} reads back differently")
        rows = tuple((name, types[name], sizes[name]) for name in sorted(types, key=lambda name: -sizes[name]))
        text = f"{FILE} holds {len(found)} tensors, read back and equal to what was measured."
        if result.built.counted < result.budget.least:
            text += " It has fewer bytes than it may: finer types are slower than llama.cpp's own mix, or too large."
        given = Section("gguf", "For llama.cpp", text, ("type", "tensors", "bytes"), rows)
        if not has_llama_cpp():
            note = "llama.cpp did not run it: pip install 'octavo[llama]' measures the file by llama.cpp itself"
            return replace(given, notes=(note,))
        try:
            figures = self._ran(result, artifact)
        except MissingExtraError as error:
            return replace(given, notes=(f"llama.cpp did not run it: {error}",))
        if figures is None:
            return replace(given, notes=("llama.cpp did not run it: there was no text to compare",))
        told = (
            f" llama.cpp runs it {figures.divergence:.4f} nats a token from the source, at perplexity "
            f"{figures.perplexity:.2f} where the source has {figures.source_perplexity:.2f}, on {figures.tokens} "
            f"held-out tokens; it generates {figures.per_second:.1f} tokens a second on {figures.threads} threads."
        )
        return replace(given, text=text + told, figures=plain_json(figures))

    def _ran(self, result: Result, artifact: Artifact) -> Ran | None:
        """What llama.cpp makes of held-out sequences, beside the source and the artifact; None if there are none."""
        opened, source, config = result.opened, result.opened.source, self._laid_out.config
        if source.module is None or source.is_skeleton:
            return None
        context = int(config.get("max_position_embeddings") or config["n_positions"])
        count = max(1, min(_COMPARED, _LOGITS // (_LONGEST * int(config["vocab_size"]))))
        rows = [row[:context] for batch in opened.held_data for row in _sequences(batch)][:count]
        if not rows:
            return None
        logits = [[_outputs(module, row) for row in rows] for module in (source.module, load(artifact.path).float())]
        return ran(artifact.path.parent / FILE, rows, logits[0], logits[1], context)

    @property
    def _laid_out(self) -> Laid:
        assert self._laid is not None
        return self._laid

    def _placed(self, name: str) -> Placed:
        return self._laid_out.tensors[name]

    def _with_blocks(self, site: Site, known: Mapping[str, StoredBlocks]) -> Site:
        placed = self._placed(site.name)
        blocks = known.get(placed.name)
        return site if blocks is None else replace(site, blocks=replace(blocks, heads=placed.heads))

    def _as_laid(self, site: Site) -> bool:
        """Whether the rows of a site's matrix are those of the file, in one order or another."""
        if len(site.shape) != 2 or site.layout.exponent:
            return False
        # Any matrix tells which way it is turned.
        here = torch.arange(6).view(2, 3)
        there = here.t() if self._placed(site.name).transposed else here
        return torch.equal(site.layout.to_matrix(here), there)

    def _outlined(self, source: Source, name: str, kind: int) -> Outlined:
        shape, placed = source.shapes[name], self._placed(name)
        return Outlined(placed.name, tuple(reversed(shape)) if placed.transposed else tuple(shape), kind)


def _wide(placed: Placed, given: Callable[[], Tensor]) -> Any:
    return placed.array(given()).numpy()


def _sequences(batch: Any) -> list[Tensor]:
    """Token numbers of every sequence of a batch, without padding."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        return []
    numbers, mask = batch["input_ids"], batch.get("attention_mask")
    kept = torch.ones_like(numbers, dtype=torch.bool) if mask is None else mask.bool()
    found = (row[keep][:_LONGEST] for row, keep in zip(numbers, kept, strict=True))
    return [row for row in found if len(row) >= _SHORTEST]


@torch.inference_mode()
def _outputs(module: Any, row: Tensor) -> Tensor:
    return module(input_ids=row[None]).logits[0]


_NUMBERS = {**{name: kind.number for name, kind in TYPES.items()}, "f32": 0, "f16": 1, "bf16": 30}
