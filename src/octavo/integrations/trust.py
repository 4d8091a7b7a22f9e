"""Checks of artifacts before another library loads them: dangerous entries are refused."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from octavo.artifact import MANIFEST, Artifact
from octavo.artifact.configuration import CONFIG, check_config, check_options
from octavo.errors import ArtifactError, OctavoError
from octavo.sources.bounded import bounded_by
from octavo.sources.sentences import check_members, listed, transformer_folder
from octavo.sources.weight_files import is_weights
from octavo.system.notes import OctavoWarning

_ADAPTER = "adapter_config.json"
#: Largest number of characters shown of another library's error.
_SHOWN = 600
#: Largest number of modules of an encoder.
_MODULES = 64


#: An artifact that was just checked.
_KNOWN: ContextVar[Path | None] = ContextVar("known", default=None)


def root_of(folder: Path) -> Path | None:
    """The artifact in a model's folder, or the artifact of which the folder is a module; None if neither.

    An artifact's folder may contain a separate model, and a hub name may be looked up there.
    """
    if (folder / MANIFEST).exists():
        return folder
    root = folder.parent
    if not folder.exists() or not (root / MANIFEST).exists():
        return None
    return root if folder.is_file() or any(member.path == folder.name for member in listed(root)) else None


def trusted(path: Path) -> Artifact:
    """Open an artifact whose configuration names no code and no other weights; warns if it was changed.

    Raises
    ------
    ArtifactError
        If it is damaged, or names code or other weights.
    """
    artifact = Artifact(path)
    folder = transformer_folder(path)
    if (folder / CONFIG).exists():
        check_config(folder / CONFIG, artifact.loadable_shapes().values(), plain=artifact.is_plain)
    changed = artifact.changed()
    adapter = (folder / _ADAPTER).relative_to(path).as_posix()
    if (folder / _ADAPTER).exists() and (adapter not in artifact.configurations or f"{adapter} was changed" in changed):
        raise ArtifactError(
            f"{folder / _ADAPTER}: was not written with this artifact, and names a model that loaders would load "
            "instead; remove it"
        )
    modules = listed(path)
    if len(modules) > _MODULES:
        raise ArtifactError(
            f"{path}: modules.json lists {len(modules)} modules, too many for an encoder; copy the artifact again"
        )
    for member in modules:
        _check_module(artifact, member.path)
    if changed:
        warnings.warn(
            f"{path}: {', '.join(changed)} since the artifact was written; the model may be a different one",
            OctavoWarning,
            stacklevel=3,
        )
    return artifact


def _check_module(artifact: Artifact, name: str) -> None:
    """Refuse a module's folder whose loader would read code or weights outside of the artifact."""
    own, folder = artifact.manifest["files"], artifact.path / name
    pattern = "sentence_*_config.json"
    for file in folder.rglob(pattern) if name else folder.glob(pattern):
        check_options(file, artifact.loadable_shapes().values())
    for file in folder.rglob("*") if name else ():
        place = file.relative_to(artifact.path).as_posix()
        if is_weights(file.name) and place not in own:
            raise ArtifactError(f"{file}: does not belong to this artifact, and loaders might read it; remove it")


@contextmanager
def known(artifact: Artifact) -> Iterator[None]:
    """A context in which :func:`guard_configurations` does not check a trusted artifact again."""
    token = _KNOWN.set(artifact.path.resolve())
    try:
        yield
    finally:
        _KNOWN.reset(token)


def _asked_for(path: Any, subfolder: Any = None) -> Path | None:
    """The artifact that a library is about to open, if it was not checked yet."""
    # A string that is not a path may be a hub name.
    with suppress(OSError, TypeError, ValueError):
        root = root_of(Path(path, subfolder or ""))
        return root if root is not None and root.resolve() != _KNOWN.get() else None
    return None


def guard_configurations(module: Any) -> None:
    """Make ``transformers`` read the configuration of an artifact only if it can be trusted.

    Direct calls of ``from_pretrained`` use Octavo only for the weights, after the model is built.

    Parameters
    ----------
    module
        ``transformers.configuration_utils``, just imported.
    """
    usual = module.PreTrainedConfig.get_config_dict.__func__

    @functools.wraps(usual)
    def get_config_dict(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        root = _asked_for(pretrained_model_name_or_path, kwargs.get("subfolder"))
        if root is not None:
            trusted(root)
        return usual(cls, pretrained_model_name_or_path, **kwargs)

    module.PreTrainedConfig.get_config_dict = classmethod(get_config_dict)


def guard_encoders(module: Any) -> None:
    """Guard the encoders of ``sentence-transformers``, which read the list of their modules first.

    Parameters
    ----------
    module
        ``sentence_transformers.base.model``, just imported.
    """
    usual = module.BaseModel.__init__

    @functools.wraps(usual)
    def opened(self: Any, model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> None:
        root = _asked_for(model_name_or_path)
        if root is None:
            usual(self, model_name_or_path, *args, **kwargs)
            return
        artifact = trusted(root)
        check_members(root)
        try:
            with known(artifact), bounded_by(artifact.loadable_shapes().values()):
                usual(self, model_name_or_path, *args, **kwargs)
        except OctavoError:
            raise
        except Exception as error:
            # A module may raise any exception for invalid files.
            raise ArtifactError(
                f"{root}: {type(self).__name__} cannot open it ({type(error).__name__}): {str(error)[:_SHOWN]}"
            ) from error

    module.BaseModel.__init__ = opened
