"""The bytes that all tensors take while the model runs from packed codes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from octavo.allocation.opened import Opened
from octavo.artifact import Artifact
from octavo.calibration.evidence import Evidence
from octavo.encoding.result import Result
from octavo.encoding.section import Section
from octavo.forms import Form
from octavo.methods import Method, Setting, Usable, select_methods
from octavo.request import Request
from octavo.runtimes.packed import resident_bytes
from octavo.sources.sites import Site
from octavo.sources.source import Source
from octavo.targets.base import target
from octavo.targets.fixed import FixedSizes
from octavo.targets.held import packed_figures, section

_WITH_KERNEL = Usable(
    lambda cls: cls.kernel_settings is not Method.kernel_settings, "has no setting that runs from memory"
)


@target("memory")
class Memory(FixedSizes):
    """Bytes of all tensors while the model runs: sites, other tensors, and buffers that are not stored."""

    about = "bytes of the weights while the model runs from packed codes"
    unit = "bytes in memory"
    loads = True

    def methods(self, request: Request) -> list[Method]:
        """The methods that a kernel can run."""
        # Few settings have a kernel, so every preset tries all of them.
        preset = "default" if request.preset == "fast" else request.preset
        return select_methods(request.methods, preset, _WITH_KERNEL)

    def offers(self, method: Method, weight: Tensor, evidence: Evidence) -> Sequence[Setting]:
        """The settings that a kernel runs."""
        return method.kernel_settings(weight, evidence)

    def resident(self, form: Form, rows: int) -> int:
        """Bytes that the form's kernel holds."""
        return resident_bytes(form, rows)

    def adapted(self, source: Source) -> Source:
        """The source with the bytes of its buffers that no file holds."""
        if source.module is None:
            return source
        stored = set(source.parameters.values())
        held = sum(buffer.nbytes for name, buffer in source.module.named_buffers() if name not in stored)
        return replace(source, unstored=held)

    def admitted(self, source: Source, sites: list[Site], left: dict[str, str]) -> tuple[list[Site], dict[str, str]]:
        """Sites that can run packed; the loader makes other tensors of the rest, such as one of all experts."""
        fused = {source.aliases.get(name, name) for item in source.conversions for name in item.names}
        reason = "made a part of another tensor at load, which no kernel runs packed"
        return (
            [site for site in sites if site.name not in fused],
            {**left, **{site.name: reason for site in sites if site.name in fused}},
        )

    def verify(self, result: Result, artifact: Artifact, written: Any) -> Section:
        """The section on bytes held, kernels, quality and speed of the packed model."""
        return section(packed_figures(result, artifact))

    def beside(self, opened: Opened) -> int:
        """Bytes of tensors that are not sites, and of buffers that are not stored."""
        source, total = opened.source, 0
        for name in opened.left:
            dtype = source.dtypes[name]
            # Models of transformers run in bfloat16 as a whole.
            narrow = source.is_transformers and dtype.is_floating_point
            total += math.prod(source.shapes[name]) * (2 if narrow else dtype.itemsize)
        return total + source.unstored
