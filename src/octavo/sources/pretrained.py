"""``transformers`` models given in memory: their artifact loads by ``from_pretrained`` like that of a folder."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from torch import nn

from octavo.errors import RequestError
from octavo.sources.names import names_of
from octavo.sources.shaped import fit_shapes
from octavo.sources.skeletons import skeleton
from octavo.sources.source import Source
from octavo.system.temporary import TemporaryFolder

#: File names of tokenizers and processors in the folder of the model's weights.
_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "preprocessor_config.json", "processor_config.json", "generation_config.json",
)  # fmt: skip


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module is a model of a class of ``transformers``."""
    library: Any = sys.modules.get("transformers")
    if library is None or not isinstance(module, library.PreTrainedModel):
        return False
    return getattr(library, type(module).__name__, None) is type(module)


def adopt(source: Source, module: Any) -> None:
    """Give the source of a model in memory a folder with its configuration, and its tokenizer if known.

    A model whose tensors do not match its configuration stays a plain module, with a note.
    """
    folder = TemporaryFolder("octavo-config-")
    source.temporary += (folder,)
    place = folder.path
    config = type(module.config).from_dict(module.config.to_dict())
    config.architectures = [type(module).__name__]
    config.__dict__.pop("quantization_config", None)
    config.save_pretrained(place)
    try:
        built = skeleton(place)
        source.reshaped = fit_shapes(built, source.every_shape())
        found = names_of(built, source.every_shape())
    except RequestError as error:
        source.notes.append(f"{error}; the artifact holds no configuration and loads with octavo.load(path, into=...)")
        return
    if found.unused or found.missing:
        odd = (found.unused or found.missing)[0]
        source.notes.append(
            f"{odd!r} does not match the model's configuration, so the artifact holds no configuration and loads with "
            "octavo.load(path, into=...)"
        )
        return
    generation = getattr(module, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(place)
    origin = Path(str(getattr(module.config, "_name_or_path", "") or ""))
    if origin.is_dir() and str(origin) not in ("", "."):
        for pattern in _TOKENIZER:
            for file in origin.glob(pattern):
                if file.is_file() and not (place / file.name).exists():
                    shutil.copyfile(file, place / file.name)
    source.companions, source.is_transformers = place, True
