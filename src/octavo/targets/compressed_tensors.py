"""A model folder of compressed-tensors, which transformers, vLLM and SGLang load without Octavo."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.allocation.encoded import form_of
from octavo.allocation.opened import Opened
from octavo.artifact import Artifact, Contents, Packed
from octavo.calibration.evidence import Evidence
from octavo.encoding.result import Result
from octavo.encoding.section import Section
from octavo.errors import ArtifactError, RequestError
from octavo.forms import Form
from octavo.methods import Method, Setting, get_method
from octavo.request import Request
from octavo.runtimes.pack_quantized import (
    CONFIG,
    WEIGHTS,
    PackQuantized,
    TensorOutline,
    config_text,
    file_bytes,
    gains,
    require_compressed_tensors,
    scaled,
    write_file,
)
from octavo.sources.companions import copy_companions
from octavo.sources.loading import load_folder, refused_as
from octavo.sources.sentences import transformer_folder
from octavo.sources.sites import Site
from octavo.sources.source import Source
from octavo.targets.base import target
from octavo.targets.fixed import ForeignFile

#: Columns that all kernels pack into whole words, and the smallest group.
_LEAST = 32
#: Layers that runtimes join into one, so that all parts need one kind of scales and codes.
_JOINED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
#: Half a step of the smallest float16 times the largest code: what small scales lose in a model in float16.
_HALF_STEP = 127 * 2.0**-25


@target("compressed-tensors")
class CompressedTensors(ForeignFile):
    """Bytes of ``model.safetensors`` and ``config.json`` in the pack-quantized format.

    Linear layers get 4 or 8 bits with scales of groups or rows. An embedding keeps 16 bits, and so does a head that is
    tied to it: the loader of ``transformers`` reads no other.
    """

    about = "bytes of a model folder of compressed-tensors, for transformers, vLLM and SGLang"
    loads = True
    unit = "bytes of model.safetensors and config.json"

    def __init__(self) -> None:
        #: Names of the linear layers of the model, tied ones included.
        self._linear: frozenset[str] = frozenset()

    def stated(self, request: Request) -> None:
        """Refuse a budget that is stated wrongly, or a missing package, before anything is read."""
        require_compressed_tensors()
        super().stated(request)

    def offers(self, method: Method, weight: Tensor, evidence: Evidence) -> Sequence[Setting]:
        """Floats of 16 bits; codes where they fill whole words."""
        settings = super().offers(method, weight, evidence)
        return settings if method.dense or weight.shape[1] % _LEAST == 0 else []

    def joined(self, sites: Sequence[Site]) -> dict[str, str]:
        """Parts of layers that runtimes join."""
        found: dict[str, str] = {}
        for site in sites:
            place, _, leaf = site.name.removesuffix(".weight").rpartition(".")
            parts = next((parts for parts in _JOINED if leaf in parts), None)
            if parts is not None:
                found[site.name] = f"{place}.{'+'.join(parts)}"
        return found

    def gains(self, form: Form) -> int:
        """One for each scale of a row."""
        return gains(form)

    def scaled(self, form: Form, factors: Tensor) -> Form:
        """The form with the factors in its scales."""
        return scaled(form, factors)

    def adapted(self, source: Source) -> Source:
        """The source, if it is a model folder of ``transformers``."""
        where = source.path or source.title
        if not source.is_transformers or source.folder is None or source.module is None:
            raise RequestError(
                f"{where}: --for compressed-tensors needs a model folder of transformers, whose configuration says how "
                "it is loaded; save the model with save_pretrained, or use --for disk"
            )
        if transformer_folder(source.folder) != source.folder or any("/" in name for name in source.shapes):
            raise RequestError(
                f"{where}: has modules beside its transformer, which the loader of transformers does not read; give "
                "the folder of the transformer alone, or use --for disk"
            )
        layers = source.module.named_modules(remove_duplicate=False)
        self._linear = frozenset(name for name, module in layers if isinstance(module, nn.Linear))
        return source

    def admitted(self, source: Source, sites: list[Site], left: dict[str, str]) -> tuple[list[Site], dict[str, str]]:
        """Weights of linear layers, embeddings, and what is stored in 16 bits like them."""
        reason = "not the weight of a linear layer, which this format has codes for"
        odd = [site for site in sites if site.layout.exponent or not self._served(source, site)]
        return [site for site in sites if site not in odd], {**left, **{site.name: reason for site in odd}}

    def check(self, opened: Opened) -> None:
        """Say what keeps 16 bits, and refuse codes where the loader reads none."""
        for name, (method, _) in opened.pinned.items():
            chosen = get_method(method)
            if not chosen.dense and self.name not in chosen.runtimes:
                raise RequestError(
                    f"--keep {name!r}: {method} has no form in the formats of {self.name}; choose "
                    "wna16:bits=4,group=64, or a dtype of floats"
                )
            if not chosen.dense and (not chosen.accepts(opened.site(name)) or opened.site(name).columns % _LEAST):
                raise RequestError(
                    f"--keep {name!r}: the loader of transformers reads this weight in 16 bits alone; choose bfloat16 "
                    "or float16"
                )
        tables = [site.name for site in opened.sites if site.kind == "embedding"]
        if tables:
            opened.notes.append(
                f"{', '.join(tables)}: kept in 16 bits, since the loader of transformers reads no embedding, nor a "
                "head that is tied to one, from packed codes"
            )
        narrow = [site.name for site in opened.sites if site.kind != "embedding" and site.columns % _LEAST]
        if narrow:
            opened.notes.append(
                f"{len(narrow)} matrices keep 16 bits, such as {narrow[0]!r}: their columns are no multiple of {_LEAST}"
            )

    def resident(self, form: Form, rows: int) -> int:
        """Bytes of the tensors of a weight."""
        return PackQuantized.of_form(form).bytes((rows, form.shape[1]))

    def beside(self, opened: Opened) -> int:
        """Bytes of the configuration and of all tensors that are not sites."""
        return self._bytes(opened, opened.assembly.contents({}, opened.assembly.narrowing(None)), {})

    def described(self, contents: Contents, opened: Opened, packed: Mapping[str, Packed]) -> Contents:
        """The contents with the bytes of both files."""
        stored = {}
        for name, item in packed.items():
            site = opened.site(name)
            stored[name] = PackQuantized.of_packed(item, (site.rows, site.columns))
        return replace(contents, resident=self._bytes(opened, contents, stored))

    def files(self, folder: Path, artifact: Artifact) -> Sequence[Path]:
        """Both files that a loader needs; those of tokenizers are not counted."""
        return [folder / WEIGHTS, folder / CONFIG]

    def write(self, result: Result, folder: Path) -> None:
        """Write both files, and copy the tokenizer."""
        opened, contents, packed = result.opened, result.built.contents, result.built.packed
        assert opened.source.folder is not None
        copy_companions(opened.source.folder, folder)
        tensors = {name: kept.tensor().contiguous() for name, kept in contents.kept.items()}
        stored: dict[str, PackQuantized] = {}
        for name, item in packed.items():
            form = form_of(opened.site(name), item)
            stored[name] = PackQuantized.of_form(form)
            tensors |= stored[name].tensors(name, form)
        write_file(folder, tensors, self._config(opened, contents, stored))

    def verify(self, result: Result, artifact: Artifact, written: Any) -> Section:
        """Load the folder with ``transformers``: its weights must be those of the artifact, and are measured."""
        opened, folder = result.opened, artifact.path.parent
        model = _loaded(folder, opened.source)
        names = dict(self._differing(result, artifact, model))
        if names:
            name, distance = next(iter(names.items()))
            raise ArtifactError(f"{folder}: transformers reads {name!r} {distance:g} away from what was measured")
        kinds: Counter[str] = Counter()
        weights: Counter[str] = Counter()
        for name, item in result.built.packed.items():
            site = opened.site(name)
            words = PackQuantized.of_packed(item, (site.rows, site.columns)).words(site.columns)
            kinds[words] += 1
            weights[words] += site.parameters
        count = len(result.built.packed)
        text = f"transformers loads the folder without Octavo, and its {count} matrices are those measured."
        figures: dict[str, Any] = {"weights": dict(weights)}
        if opened.measurable and not opened.source.is_skeleton:
            # Its class refuses to widen what was packed; nothing is now.
            quality = float(result.run.judge(nn.Module.float(model)).mean())
            figures["quality"] = quality
            text += f" {opened.objective.metric} of that model on held-out data: {quality:.3g}."
        rows = tuple((kind, kinds[kind], weights[kind]) for kind in sorted(kinds, key=lambda kind: -weights[kind]))
        return Section("loaded", "In transformers", text, ("stored as", "matrices", "weights"), rows, (), figures)

    def _differing(self, result: Result, artifact: Artifact, model: nn.Module) -> Iterator[tuple[str, float]]:
        """Matrices that a loaded model has otherwise than the artifact, and how far they are apart."""
        state = model.state_dict()
        for name in result.built.packed:
            found, wanted = state[result.opened.source.parameters[name]], artifact.tensor(name)
            # A model may hold some layers in a wider dtype than its files.
            dtype = min(found.dtype, wanted.dtype, key=lambda dtype: dtype.itemsize)
            far = float((found.to(dtype).float() - wanted.to(dtype).float()).abs().max())
            if not far <= (_HALF_STEP if dtype == torch.float16 else 0.0):
                yield name, far

    def _served(self, source: Source, site: Site) -> bool:
        """Whether a loader finds the weight in a module of the usual kind."""
        if site.kind == "embedding" or site.layout.kind != "rows_first" or len(site.shape) != 2:
            return True
        return isinstance(source.owner(site.name), nn.Linear) and site.name.endswith(".weight")

    def _bytes(self, opened: Opened, contents: Contents, stored: Mapping[str, PackQuantized]) -> int:
        """Bytes of both files."""
        outlines: dict[str, TensorOutline] = {name: (kept.stored, kept.shape) for name, kept in contents.kept.items()}
        for name, item in stored.items():
            site = opened.site(name)
            outlines |= item.outlines(name, (site.rows, site.columns))
        return file_bytes(outlines) + len(self._config(opened, contents, stored))

    def _config(self, opened: Opened, contents: Contents, stored: Mapping[str, PackQuantized]) -> bytes:
        source = opened.source
        modules = {_module(source, name): (item, opened.site(name).columns) for name, item in stored.items()}
        matrices = {_module(source, name) for name, kept in contents.kept.items() if len(kept.shape) > 1}
        ignore = (self._linear | matrices) - set(modules)
        return config_text(json.loads(contents.configurations[CONFIG]), modules, ignore)


def _module(source: Source, name: str) -> str:
    """The module that holds a tensor, by the name that a configuration has for it."""
    return source.parameters.get(name, name).rpartition(".")[0]


def _loaded(folder: Path, source: Source) -> Any:
    """The model of a written folder with its weights unpacked, as ``transformers`` loads it.

    Raises
    ------
    ArtifactError
        If the loader fails, or finds other tensors than those of the source.
    """
    # The package draws bars of its own.
    with refused_as(ArtifactError, folder), redirect_stderr(StringIO()):
        loaded = load_folder(folder, {})
        quantizer = getattr(loaded.model, "hf_quantizer", None)
        if quantizer is not None:
            quantizer.compressor.decompress_model(loaded.model)
    odd = sorted({*loaded.missing} - {*source.unfilled})
    if odd or len(loaded.unexpected) > len(source.unused):
        raise ArtifactError(
            f"{folder}: transformers finds other tensors than those of the source: "
            f"{', '.join([*odd, *loaded.unexpected][:3])}"
        )
    return loaded.model
