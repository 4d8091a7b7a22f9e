"""The configuration files of an artifact: what they will say is known before it is written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from octavo.artifact.configuration import is_configuration
from octavo.companions import companion_files
from octavo.integrations.sentences import members, transformer_folder

if TYPE_CHECKING:
    from octavo.sites import Source


def configurations(source: Source) -> dict[str, bytes]:
    """The configuration files of a source's artifact by their place in its folder, sub-folders with a slash.

    They are the source's own, but for ``config.json`` of a model, which says that its weights are an artifact.
    """
    if source.folder is None:
        return {}
    inner = transformer_folder(source.folder)
    found: dict[str, bytes] = {}
    is_model = (inner / "config.json").exists()
    if is_model or members(source.folder):
        names = (file.as_posix() for file in companion_files(source.folder) if is_configuration(file.as_posix()))
        found = {name: (source.folder / name).read_bytes() for name in names}
    if is_model:
        from octavo.integrations.transformers import artifact_config

        # Also of an architecture that only the code beside it knows: whoever trusts that code can load the artifact.
        dtype = next((dtype for dtype in source.dtypes.values() if dtype.is_floating_point), None)
        text = json.dumps(artifact_config(inner, dtype), indent=2) + "\n"
        found[(inner / "config.json").relative_to(source.folder).as_posix()] = text.encode()
    return found
