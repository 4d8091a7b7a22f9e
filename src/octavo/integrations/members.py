"""Loading the modules of ``sentence-transformers`` from artifacts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from octavo.artifact import MANIFEST, Artifact
from octavo.errors import ArtifactError


def decode_members(module: Any) -> None:
    """Make the modules of ``sentence-transformers`` load their weights from artifacts.

    Parameters
    ----------
    module
        ``sentence_transformers.base.modules.module``, just imported.
    """
    usual = module.Module.load_torch_weights.__func__

    @functools.wraps(usual)
    def load_torch_weights(cls: Any, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        folder = Path(model_name_or_path)
        if not (folder / MANIFEST).is_file():
            return usual(cls, model_name_or_path, *args, **kwargs)
        subfolder = str(args[0] if args else kwargs.get("subfolder", ""))
        prefix = f"{subfolder}/" if subfolder else ""
        artifact = Artifact(folder)
        # A tensor stored once may belong to several folders.
        stored = {**{name: name for name in (*artifact.names(), *artifact.same)}, **artifact.aliases}
        own = {name: of for name, of in stored.items() if name.startswith(prefix) and (prefix or "/" not in name)}
        found = artifact.state(set(own.values()))
        state = {name.removeprefix(prefix): found[of] for name, of in own.items()}
        target = kwargs.get("model")
        if target is None:
            return state
        # A tensor with two names in the module is stored under one.
        held = target.state_dict()
        filled = {held[name].data_ptr() for name in state if name in held}
        shared = {n: held[n] for n in held if n not in state and held[n].numel() and held[n].data_ptr() in filled}
        try:
            target.load_state_dict({**shared, **state})
        except RuntimeError as error:
            raise ArtifactError(f"{folder / subfolder}: does not fit its module: {error}") from error
        return target

    module.Module.load_torch_weights = classmethod(load_torch_weights)
