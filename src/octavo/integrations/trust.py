"""Artifacts before a loader of another library reads them: what could lead it elsewhere is refused."""

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
#: Letters of another library's error that are shown.
_SHOWN = 600
#: Modules of an encoder, at most.
_MODULES = 64


#: An artifact that need not be checked again, since that was just done.
_KNOWN: ContextVar[Path | None] = ContextVar("known", default=None)


def root_of(folder: Path) -> Path | None:
    """The artifact that a model's folder is, or is a module of; None if it is neither.

    A model of its own may lie in an artifact's folder, and a name at a hub may be looked for there.
    """
    if (folder / MANIFEST).exists():
        return folder
    root = folder.parent
    if not folder.exists() or not (root / MANIFEST).exists():
        return None
    return root if folder.is_file() or any(member.path == folder.name for member in listed(root)) else None


def trusted(path: Path) -> Artifact:
    """An artifact whose configuration names no code and no other weights, with a warning if it was changed.

    Raises
    ------
    ArtifactError
        If it is damaged, or does.
    """
    artifact = Artifact(path)
    folder = transformer_folder(path)
    if (folder / CONFIG).exists():
        check_config(folder / CONFIG, artifact.loadable_shapes().values())
    changed = artifact.changed()
    adapter = (folder / _ADAPTER).relative_to(path).as_posix()
    if (folder / _ADAPTER).exists() and (adapter not in artifact.configurations or f"{adapter} was changed" in changed):
        raise ArtifactError(
            f"{folder / _ADAPTER}: was not written with this artifact, and names a model that loaders would take "
            "in its place; remove it"
        )
    modules = listed(path)
    if len(modules) > _MODULES:
        raise ArtifactError(f"{path}: modules.json lists {len(modules)} modules; encoders have few")
    for member in modules:
        _check_module(artifact, member.path)
    if changed:
        warnings.warn(
            f"{path}: {', '.join(changed)} since the artifact was written; the model may be another one",
            OctavoWarning,
            stacklevel=3,
        )
    return artifact


def _check_module(artifact: Artifact, name: str) -> None:
    """Refuse a module's folder whose loader would take other weights than the artifact's, or code."""
    own, folder = artifact.manifest["files"], artifact.path / name
    pattern = "sentence_*_config.json"
    for file in folder.rglob(pattern) if name else folder.glob(pattern):
        check_options(file, artifact.loadable_shapes().values())
    for file in folder.rglob("*") if name else ():
        place = file.relative_to(artifact.path).as_posix()
        if is_weights(file.name) and place not in own:
            raise ArtifactError(f"{file}: is no part of this artifact, and loaders might read it; remove it")


@contextmanager
def known(artifact: Artifact) -> Iterator[None]:
    """A context in which a trusted artifact is not checked again by :func:`guard_configurations`."""
    token = _KNOWN.set(artifact.path.resolve())
    try:
        yield
    finally:
        _KNOWN.reset(token)


def _asked_for(path: Any) -> Path | None:
    """The artifact that a library is about to open, if it is one that was not checked yet."""
    # What is no path may be a name at a hub, and none of ours.
    with suppress(OSError, TypeError, ValueError):
        root = root_of(Path(path))
        return root if root is not None and root.resolve() != _KNOWN.get() else None
    return None


def guard_configurations(module: Any) -> None:
    """Let ``transformers`` read the configuration of an artifact only if that may be trusted.

    Whoever calls ``from_pretrained`` himself asks Octavo for the weights alone, when the model is built already.

    Parameters
    ----------
    module
        ``transformers.configuration_utils``, just imported.
    """
    usual = module.PreTrainedConfig.get_config_dict.__func__

    @functools.wraps(usual)
    def get_config_dict(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        root = _asked_for(pretrained_model_name_or_path)
        if root is not None:
            trusted(root)
        return usual(cls, pretrained_model_name_or_path, **kwargs)

    module.PreTrainedConfig.get_config_dict = classmethod(get_config_dict)


def guard_encoders(module: Any) -> None:
    """The same for the encoders of ``sentence-transformers``, which read the list of their modules first.

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
            # Its files can be wrong in as many ways as there are modules, and each raises what it likes.
            raise ArtifactError(
                f"{root}: {type(self).__name__} cannot open it ({type(error).__name__}): {str(error)[:_SHOWN]}"
            ) from error

    module.BaseModel.__init__ = opened
