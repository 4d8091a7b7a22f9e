"""The source of a model that lost some of its units: smaller tensors, under other names where layers went."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.sources.companions import copy_companions
from octavo.sources.model_classes import read_config
from octavo.sources.modules import own_tensors
from octavo.sources.sentences import split_name, transformer_folder
from octavo.sources.shaped import fit_shapes
from octavo.sources.skeletons import skeleton
from octavo.sources.source import Source, examine
from octavo.system.temporary import TemporaryFolder


@torch.no_grad()
def thinned(
    source: Source, module: nn.Module, names: Callable[[str], str | None] = str
) -> tuple[Source, dict[str, str]]:
    """The source whose module is ``module``, a copy of its own in which tensors were changed or became smaller.

    It comes with the name that every tensor of the given source has in it; what went with a layer has none.

    The changed tensors of ``module`` are rounded to the dtypes of the source, so that it computes with what is stored.
    Where the model has a config, entries that differ are written into a copy of it.

    Parameters
    ----------
    names
        The name in ``module`` of a tensor of the source's module; None if it went with a layer.

    Raises
    ------
    RequestError
        If the source's tensors do not have the shapes of its module's, or a changed one is not finite.
    """
    if source.conversions:
        raise RequestError(
            f"{source.path or source.title}: {source.conversions[0].names[0]!r} has another shape in the model, so it "
            "cannot be cut; leave the cut out"
        )
    before, after = own_tensors(source.module or module), own_tensors(module)
    changed: dict[str, Tensor] = {}
    kept: dict[str, str] = {}
    for name, target in source.direct.items():
        moved = names(target)
        if moved is None:
            continue
        kept[name] = _moved(name, target, moved)
        old, new = before[target], after[moved]
        if name in source.shapes and (old.shape != new.shape or not torch.equal(old, new)):
            new.copy_(new.to(source.dtypes[name]))
            changed[kept[name]] = new
    kept = {name: kept.get(name, name) for name in source.every_shape() if name in kept or name not in source.direct}
    back = {new: old for old, new in kept.items()}

    def read(name: str) -> Tensor:
        old = back[name]
        return changed[name].detach().to(source.dtypes[old]) if name in changed else source.read(old)

    held = {kept[name]: name for name in source.shapes if name in kept}
    made = replace(
        source,
        module=module,
        shapes={n: tuple(changed[n].shape) if n in changed else source.shapes[old] for n, old in held.items()},
        dtypes={n: source.dtypes[old] for n, old in held.items()},
        aliases={kept[alias]: kept[name] for alias, name in source.aliases.items() if alias in kept},
        parameters={new: str(names(source.direct[old])) for old, new in kept.items() if old in source.direct},
        read=read,
        fixed={kept[name]: why for name, why in source.fixed.items() if name in kept},
        digests={kept[n]: digest for n, digest in source.digests.items() if n in kept and kept[n] not in changed},
        exponents={kept[n]: value for n, value in source.exponents.items() if n in kept and kept[n] not in changed},
        notes=[],
        uncut=source,
    )
    if source.folder is not None:
        folder = TemporaryFolder("octavo-config-")
        made.temporary += (folder,)
        made.companions = folder.path
        made.notes += copy_companions(source.folder, made.companions)
        inner = transformer_folder(source.folder)
        config = read_config(inner) | _differences(source.module, module)
        place = made.companions / inner.relative_to(source.folder) / "config.json"
        place.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        made.reshaped = _reshaped(made, place.parent)
    examine(made)
    return made, kept


def _moved(name: str, target: str, moved: str) -> str:
    """The stored name of a tensor whose name in the module is ``moved`` in place of ``target``: a layer's number.

    A checkpoint may name layers otherwise than the module, but counts them alike.
    """
    if target == moved:
        return name
    old, new = next((a, b) for a, b in zip(target.split("."), moved.split("."), strict=True) if a != b)
    parts = name.split(".")
    if old not in parts:
        raise RequestError(f"{name!r}: has no layer {old} in its name, so it cannot be renumbered; keep all layers")
    parts[parts.index(old)] = new
    return ".".join(parts)


def _reshaped(source: Source, inner: Path) -> bool:
    """Whether the model of the new config has other shapes than its tensors."""
    if not source.is_transformers:
        return False
    assert source.companions is not None
    prefix = "" if inner == source.companions else f"{inner.name}/"
    shapes = {n.removeprefix(prefix): s for n, s in source.every_shape().items() if split_name(n)[0] == prefix}
    return fit_shapes(skeleton(inner), shapes)


def _differences(before: Any, after: Any) -> dict[str, Any]:
    """The entries of a model's config that another one's has otherwise."""
    old, new = _config(before).to_dict(), _config(after).to_dict()
    return {key: value for key, value in new.items() if old.get(key) != value}


def _config(module: nn.Module) -> Any:
    """The config of a model, or of the one inside an encoder."""
    return next(part.config for part in module.modules() if hasattr(getattr(part, "config", None), "to_dict"))
