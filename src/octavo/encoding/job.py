"""One source with everything that the steps share: its sites, its data, its objective and its workspace."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn

from octavo.artifact import Contents, Entry, Kept, Packed, is_constant, unpack
from octavo.artifact.companions import configurations
from octavo.calibration.blockwise import Blockwise
from octavo.calibration.calibrating import Calibration, data_free
from octavo.calibration.inmemory import InMemory
from octavo.calibration.inputs import model_of
from octavo.calibration.objective import Objective
from octavo.calibration.witness import Witness
from octavo.calibration.workspace import Workspace
from octavo.encoding.tasks import encoded
from octavo.errors import RequestError
from octavo.methods import Method, Setting
from octavo.sources.batches import Batch
from octavo.sources.memory import fits
from octavo.sources.narrowing import Narrowing, stored_dtype
from octavo.sources.sites import Site, Source
from octavo.system.executors import Executor, Local
from octavo.system.progress import Progress, silent
from octavo.system.raw import Lazily, narrowed

#: Norms, biases and the like are stored in 16 bits if all of them together cost less than this, in the metric's units.
_FREE = 1e-7
_WAY = "way.json"


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
    #: How errors are weighed: ``kfac`` or ``ekfac`` (:mod:`octavo.calibration.curvature`).
    curvature: str = "kfac"
    #: The files that it is read from.
    witness: Witness = field(default_factory=lambda: Witness(None))
    #: Notes on kept work that was damaged and is made again.
    damaged: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._model: InMemory | Blockwise | None = None
        # Checksums of kept tensors are worked out once for all contents.
        self._kept: dict[Narrowing, dict[str, Kept]] = {}
        self._by_name = {site.name: site for site in self.sites}
        self._own_names: frozenset[str] | None = None

    def site(self, name: str) -> Site:
        """The site of that name."""
        return self._by_name[name]

    def matrix(self, site: Site) -> Tensor:
        """A site's weight as a float32 matrix."""
        return site.layout.to_matrix(self.source.read(site.name)).float()

    def calibrate(self, workspace: Workspace) -> Calibration:
        """Evidence of all sites, from the workspace if it is there."""
        # The way is that of the run that is resumed, though the machine may have other memory to spare now.
        way = workspace.read_json(_WAY) or {"blockwise": not fits(self.source, self.memory)}
        workspace.write_json(_WAY, way)
        found = workspace.load_calibration()
        if self.source.module is not None:
            self._model = model_of(self.source, blockwise=way["blockwise"], scratch=workspace.path)
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
                    curvature=self.curvature,
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

    def kept(self, how: Narrowing) -> dict[str, Kept]:
        """Tensors that are no sites, those in 16 bits that may be."""
        if how not in self._kept:
            self._kept[how] = {}
            for name, reason in self.left.items():
                own = stored = self.source.dtypes[name]
                fixed = name in self.source.fixed
                # What the user asked to leave alone is left alone.
                if not reason.startswith("ignored"):
                    stored = stored_dtype(self.source.read(name).detach(), Narrowing.EXACT if fixed else how)
                # Folding leaves constants. Others may be learned by reconstruction, and are then no constants any more.
                constant = name in self.source.folded and is_constant(self.source.read(name))
                stored = own if constant else stored
                read, shape = partial(self.source.read, name), self.source.shapes[name]
                self._kept[how][name] = Kept(read, shape, stored, own, coded=fixed or constant)
        return self._kept[how]

    def narrowing(self) -> Narrowing:
        """How tensors that are no sites are narrowed: as far as it costs nothing measurable.

        Where nothing can be measured each value keeps its relative precision.
        """
        if not self.measurable:
            return Narrowing.EACH
        for how in (Narrowing.SCALE, Narrowing.EACH):
            changed = {name: kept.tensor() for name, kept in self.kept(how).items() if kept.stored != kept.dtype}
            if float(self.measure(changed).mean()) < _FREE:
                return how
        return Narrowing.EXACT

    def contents(self, packed: Mapping[str, Packed], how: Narrowing) -> Contents:
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
        aliases, extra = self.source.aliases, self.source.extra
        return Contents(
            source,
            entries,
            self.kept(how),
            aliases,
            resident,
            self._named(),
            extra,
            self._configurations,
            self._unfilled,
        )

    @cached_property
    def _configurations(self) -> dict[str, bytes]:
        return configurations(self.source)

    @cached_property
    def _unfilled(self) -> list[str] | None:
        if not self.source.is_transformers:
            return None
        from octavo.integrations.transformers import unfilled_names

        return unfilled_names(self.source)

    def _named(self) -> frozenset[str]:
        """Aliases that the loader of the source must find in the files, since it does not tie them itself."""
        if self._own_names is None:
            self._own_names = frozenset()
            if self.source.is_transformers and self.source.aliases:
                from octavo.integrations.transformers import tied_names

                self._own_names = frozenset(self.source.aliases) - tied_names(self.source)
        return self._own_names

    def resident(self, packed: Mapping[str, Packed]) -> int:
        """Bytes of all tensors while the model runs packed: sites, what is no site, and buffers that are not stored."""
        total = sum(item.counted("memory") for item in packed.values())
        for name in self.left:
            dtype = self.source.dtypes[name]
            # Models of transformers run in bfloat16 as a whole.
            narrow = self.source.is_transformers and dtype.is_floating_point
            total += math.prod(self.source.shapes[name]) * (2 if narrow else dtype.itemsize)
        return total + self.source.unstored

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

    def judge(self, module: nn.Module, old: Mapping[str, Tensor] | None = None) -> Tensor:
        """Divergence of every held-back example from the source with another module in its place.

        ``old`` holds the values of the source's own module where they were changed since it was measured.
        """
        assert self._model is not None
        return self._model.judge(self.held_data, self.objective, module, old or {})

    @property
    def measurable(self) -> bool:
        """Whether plans can be measured."""
        return self.source.module is not None and bool(self.held_data)
