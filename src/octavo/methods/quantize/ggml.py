"""The block types of ggml, rounded with error feedback: what llama.cpp and programs built on it run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.coding.ggml import TYPES, BlockType, Fields
from octavo.errors import RequestError
from octavo.forms import Form
from octavo.forms.ggml import GgmlBlocks
from octavo.methods.base import Method, Setting, method
from octavo.methods.feedback import factored, round_blocks, round_columns, swept
from octavo.methods.knobs import choice
from octavo.methods.quantize.descent import descended
from octavo.methods.quantize.ggml_refit import refitted
from octavo.methods.quantize.ggml_steps import fitted, nearest
from octavo.system.compiled import compiled

#: Rounded at once, in weights.
_CHUNK = 1 << 24
#: Bits a weight from which improving codes and steps gains nothing that shows.
_FINE = 8.0


@method(
    "ggml",
    family="quantize",
    source="Block types of ggml; GPTQ (arXiv 2210.17323), QuantEase (arXiv 2309.01885)",
    preset="fast",
)
@dataclass(frozen=True)
class Ggml(Method):
    """One of ggml's block types, whose steps are fitted to the inputs and whose codes compensate each other's errors.

    Steps and offsets of all groups are searched first (:mod:`octavo.methods.quantize.ggml_steps`). Then columns are
    rounded one after another, each after adding the error feedback of those before it
    (:mod:`octavo.methods.feedback`). Codes are improved one at a time (:mod:`octavo.methods.quantize.descent`), before
    and after steps and offsets are fitted to them (:mod:`octavo.methods.quantize.ggml_refit`). Without a moment every
    weight gets its nearest level.

    Parameters
    ----------
    feedback
        Whether columns are rounded with error feedback.
    """

    by_rows = True
    takes = ("type",)
    runtimes = ("gguf",)

    feedback: bool = True

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """All types whose blocks divide the columns."""
        columns = weight.shape[1]
        return [{"type": kind.name} for kind in TYPES.values() if columns % kind.block == 0]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        kind = TYPES[choice(self.name, setting, "type", tuple(TYPES))]
        if weight.shape[1] % kind.block:
            raise RequestError(
                f"{self.name}: blocks of {kind.name} have {kind.block} columns, which do not divide "
                f"{weight.shape[1]}; choose another type"
            )
        weight = original = weight.float()
        columns = evidence.columns
        fields = fitted(weight, kind, None if columns is None else columns.diagonal())
        levels = torch.tensor(kind.levels, dtype=torch.float32)
        step, offset = kind.affine(fields)
        if self.feedback and columns is not None:
            weight = _swept(original, evidence, kind, step, offset, levels)
        wide = None if offset is None else offset[:, :, None]
        codes = nearest(weight.unflatten(1, (-1, kind.group)), step[:, :, None], wide, levels)
        fields = replace(fields, codes=codes.flatten(1).to(torch.uint8))
        if self.feedback and columns is not None and kind.bits < _FINE:
            fields = _improved(original, columns, kind, fields, levels)
            fields = refitted(original, columns, kind, fields)
            fields = _improved(original, columns, kind, fields, levels)
        return GgmlBlocks(kind.packed(fields), kind.name, weight.shape[1])


def _improved(weight: Tensor, moment: Tensor, kind: BlockType, fields: Fields, levels: Tensor) -> Fields:
    """Fields whose codes descended (:mod:`octavo.methods.quantize.descent`)."""
    step, offset = kind.affine(fields)
    codes = torch.empty_like(fields.codes)
    height = max(1, _CHUNK // weight.shape[1])
    for start in range(0, len(weight), height):
        part = slice(start, start + height)
        low = None if offset is None else offset[part]
        codes[part] = descended(weight[part], fields.codes[part].int(), step[part], low, levels, moment)
    return replace(fields, codes=codes)


def _swept(
    weight: Tensor, evidence: Evidence, kind: BlockType, step: Tensor, offset: Tensor | None, levels: Tensor
) -> Tensor:
    """Values (rows, columns) on the levels of their groups, rounded column after column."""
    order, _, feedback = factored(evidence)
    groups = order // kind.group

    def rounded(rows: slice, targets: Tensor) -> Tensor:
        steps = step[rows].t().contiguous()
        offsets = torch.zeros_like(steps) if offset is None else offset[rows].t().contiguous()
        return _rounded(targets, feedback, groups, steps, offsets, levels)

    return swept(weight, order, rounded, chunk=_CHUNK)


def _rounded(
    targets: Tensor, feedback: Tensor, groups: Tensor, steps: Tensor, offsets: Tensor, levels: Tensor
) -> Tensor:
    quick = compiled(_round_block) if targets.device.type == "cpu" else None
    if quick is not None:
        tables = tuple(table.numpy() for table in (steps, offsets, levels, (levels[1:] + levels[:-1]) / 2))

        def sweep(start: int, *block: Tensor) -> None:
            quick(*(tensor.numpy() for tensor in block), groups[start : start + len(block[0])].numpy(), *tables)

        return round_blocks(targets, feedback, sweep)
    places = groups.tolist()

    def quantize(j: int, target: Tensor) -> Tensor:
        step, offset = steps[places[j]], offsets[places[j]]
        return levels[nearest(target, step, offset, levels).long()] * step + offset

    return round_columns(targets, feedback, quantize)


def _round_block(
    targets: np.ndarray,
    feedback: np.ndarray,
    rounded: np.ndarray,
    groups: np.ndarray,
    steps: np.ndarray,
    offsets: np.ndarray,
    levels: np.ndarray,
    middles: np.ndarray,
) -> None:
    """Round a block of columns (:func:`octavo.methods.feedback.round_blocks`), for numba."""
    width, height = targets.shape
    last = len(levels) - 1
    even = levels[last] - levels[0] == last
    for j in range(width):
        target, g = targets[j], groups[j]
        for k in range(j):
            share, errors = feedback[k, j], targets[k]
            for i in range(height):
                target[i] += share * errors[i]
        for i in range(height):
            step, offset = steps[g, i], offsets[g, i]
            scaled = (target[i] - offset) / step if step != 0 else np.float32(0)
            if even:
                level = min(max(np.rint(scaled), levels[0]), levels[last])
            else:
                place = 0
                while place < last and scaled > middles[place]:
                    place += 1
                level = levels[place]
            rounded[j, i] = level * step + offset
            target[i] -= rounded[j, i]
