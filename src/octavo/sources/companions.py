"""Files copied into the artifact with the weights: tokenizers, configurations, code, licences.

Code is copied but never run here. Weights, training data, hidden files and files outside of the folder are not copied.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from octavo.sources.sentences import members
from octavo.sources.weight_files import is_weights
from octavo.system.paths import is_part
from octavo.system.replacing import OWN
from octavo.system.sealed import JOB

#: Lower-case names of files that are copied regardless of size.
_COPIED = re.compile(
    r"""
    .*config.*\.json | modules\.json | model_index\.json | (special_tokens_map|added_tokens|normalizer|tekken)\.json
    | .*\.(jinja|py|tiktoken|model|spm|vocab|codes|bpe)
    | .*(tokenizer|vocab|merges|spiece|sentencepiece).*\.(json|txt|tsv)
    | (tokenizer|vocab|merges|dict)(\..*)?\.?(json|txt|bpe)?
    | (licen[sc]e|notice|copying|copyright|use_policy|acceptable_use)([-_.].*)?
    """,
    re.VERBOSE,
)
#: Other JSON files count as configuration if they are small and their name does not suggest data.
_SMALL = 1_000_000
_DATA = re.compile(r".*(train|test|valid|eval|corpus|data|sample|result|predict).*")
#: Not copied and not reported: the artifact has its own.
_OWN = re.compile(r"readme.*|report\.(html|json)|.*\.(md|png|jpe?g|gif|svg|webp)|trainer_state\.json")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
#: Depth of sub-folders of the source that are searched.
_DEEP = 3
#: Largest number of names in a note.
_NAMED = 12


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copy the companion files of ``source``; returns notes on anything that a user may not expect."""
    # Loaders apply an adapter if its configuration exists, so configuration and weights are copied together or not at
    # all.
    adapted = all((source / name).is_file() for name in _ADAPTER)
    left = []
    for relative, reason in _choices(source, adapted=adapted):
        if reason is None:
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / relative, target)
        elif reason:
            left.append(f"{relative.as_posix()} ({reason})")
    more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
    notes = [f"not copied: {', '.join(left[:_NAMED])}{more}"] if left else []
    if adapted:
        notes.append(
            "the adapter in the model's folder is copied unchanged, and neither compressed nor counted: loaders that "
            "support adapters apply it as they do for the source, but quality was measured without it"
        )
    elif (source / _ADAPTER[0]).exists():
        notes.append(
            "adapter_config.json was not copied: adapter_model.safetensors is missing, and loaders would fail without "
            "it"
        )
    return notes


def companion_files(source: Path) -> list[Path]:
    """The files that :func:`copy_companions` copies, relative to ``source``."""
    adapted = all((source / name).is_file() for name in _ADAPTER)
    return [relative for relative, reason in _choices(source, adapted=adapted) if reason is None]


def _choices(source: Path, *, adapted: bool) -> Iterator[tuple[Path, str | None]]:
    """Files of the source, each with None if it is copied, or the reason if not; an empty reason is not reported."""
    for place, folders, names in os.walk(source):
        inner = Path(place).relative_to(source)
        for name in sorted(folders):
            if not name.startswith(".") and os.path.islink(Path(place, name)):
                yield inner / name, "a link to a folder"
        hidden = {name for name in folders if name.startswith((".", "__"))}
        folders[:] = sorted(set(folders) - hidden) if len(inner.parts) + 1 < _DEEP else []
        if inner.parts and _is_apart(Path(place), source):
            folders.clear()
            continue
        for name in sorted(names):
            if not name.startswith("."):
                yield inner / name, _reason(source, inner / name, adapted=adapted)


def _is_apart(place: Path, source: Path) -> bool:
    """Whether a sub-folder does not belong to the source: another model, another format, or kept work of a run."""
    own = {member.path for member in members(source)}
    parts = place.relative_to(source).parts
    return parts[0] not in own and any(is_weights(file.name) or file.name == JOB for file in place.iterdir())


def _reason(source: Path, relative: Path, *, adapted: bool) -> str | None:
    file, name = source / relative, relative.name.lower()
    top = len(relative.parts) == 1
    if top and relative.name in _ADAPTER:
        return None if adapted else ""
    # What says how the artifact was written is its own, and so is its config.
    if is_weights(name) or (top and relative.name in (*OWN, "config.json")):
        return ""
    if _OWN.fullmatch(name) and not _COPIED.fullmatch(name):
        return ""
    if not file.is_file():
        return "not a regular file" if file.exists() or not file.is_symlink() else "a broken link"
    if file.is_symlink() and not is_part(file, source):
        return "a link out of the folder"
    if name.endswith(".model") and _is_pickled(file):
        return "a pickle"
    if _COPIED.fullmatch(name):
        return None
    small = name.endswith(".json") and not _DATA.fullmatch(name) and file.stat().st_size <= _SMALL
    return None if small else "not known to belong to the model"


def _is_pickled(file: Path) -> bool:
    """Whether a file with a tokenizer's suffix is a pickle, plain or in a ZIP file as PyTorch writes it."""
    with open(file, "rb") as opened:
        return opened.read(2).startswith((b"\x80", b"PK"))
