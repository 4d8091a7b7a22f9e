"""Writing an artifact: aside, read back, compared, measured, and only then renamed into place."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.artifact import Artifact
from octavo.artifact.companions import copy_companions
from octavo.errors import ArtifactError, MissingExtraError, OctavoError, RequestError
from octavo.report.gather import report_data
from octavo.report.page import write, write_json
from octavo.report.schema import Report
from octavo.report.summary import card
from octavo.sources.sentences import members, transformer_folder
from octavo.system.ahead import in_order
from octavo.system.atomic import TRIED, made_aside, move_into_place, tidy, write_file
from octavo.system.paths import checked, checked_output
from octavo.system.raw import raw_bytes
from octavo.system.replacing import check_folder
from octavo.verification.proof import prove
from octavo.verification.recorded import REPORT

if TYPE_CHECKING:
    from octavo.pipeline import Compressed


def save(done: Compressed, path: Path, *, overwrite: bool = False, report: bool = True) -> Report:
    """Write the artifact of a finished compression; nothing is left behind if anything fails.

    The folder is written aside, read back, measured, and only then renamed into place.

    Raises
    ------
    RequestError
        If the folder is not empty and ``overwrite`` is not set, or cannot be written.
    ArtifactError
        If what was read back is not what was written.
    """
    # The folder itself: a link to it stays a link, and "." has a name.
    path = path.resolve()
    check_writable(path, overwrite=overwrite, source=done.job.source.path, others=[done.job.witness.data])
    started = time.perf_counter()
    aside = made_aside(path)
    try:
        _write(done, aside)
        artifact = Artifact(aside)
        _compare(done, artifact)
        proof = prove(done.job, artifact)
        done.timings["verify"] = time.perf_counter() - started
        data = report_data(done, artifact, proof)
        done.timings["measure"] = time.perf_counter() - started - done.timings["verify"]
        data = replace(data, timings={**done.timings, "total": sum(done.timings.values())})
        write_report(data, aside, page=report)
        # What was copied and what was measured are to be of one state of the source.
        done.job.witness.check(every=True)
        move_into_place(aside, path)
    except OSError as error:
        raise OctavoError(f"{path}: cannot be written: {error.strerror or error}; nothing was left there") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return data


def check_writable(
    path: Path, *, overwrite: bool, source: str | Path | None = None, others: Iterable[Path | None] = ()
) -> None:
    """Refuse an output folder that is in use, holds the source, or cannot be written, before work starts."""
    path = checked_output(path).resolve()
    tidy(path)
    if source is not None and checked(source).resolve().is_relative_to(path):
        raise RequestError(f"{path}: holds the source, which would be replaced; choose another folder")
    for read in others:
        if read is not None and checked(read).resolve().is_relative_to(path):
            raise RequestError(f"{path}: holds {read}, which would be replaced; choose another folder, or move it")
    check_folder(path, overwrite=overwrite)
    try:
        # Asking the file system is the only test that holds for every user, root included.
        # Under a name that the next run sweeps, should this one be killed here.
        existing = next(p for p in path.parents if p.exists())
        with tempfile.TemporaryDirectory(prefix=f".{path.name}{TRIED}", dir=existing):
            pass
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from error


def _write(done: Compressed, folder: Path) -> None:
    source = done.job.source
    done.built.contents.write(folder, lambda written, total: done.job.progress("write", written >> 20, total >> 20))
    if source.folder is None:
        return
    if (transformer_folder(source.folder) / "config.json").exists() or members(source.folder):
        notes = copy_companions(source.folder, folder)
        done.job.notes += [note for note in notes if note not in done.job.notes]
    # As they were when the manifest was planned, whatever became of the source since.
    for name, content in done.built.contents.configurations.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _compare(done: Compressed, artifact: Artifact) -> None:
    """What was read from the disk must be, bit for bit, what was measured."""
    packed, kept = done.built.packed, done.built.contents.kept
    if artifact.bytes != done.built.bytes:
        raise ArtifactError(f"{artifact.path}: {artifact.bytes} bytes on disk, {done.built.bytes} were planned")
    if set(artifact.names()) != {*packed, *kept} or artifact.aliases != done.job.source.aliases:
        raise ArtifactError(f"{artifact.path}: the tensors read back are not those written")

    def same(name: str) -> bool:
        if name in kept:
            found, wanted = artifact.tensor(name), kept[name].given()
            # Bit for bit, since NaN equals nothing.
            return (found.dtype, found.shape) == (wanted.dtype, wanted.shape) and raw_bytes(found) == raw_bytes(wanted)
        return artifact.sites[name] == done.built.contents.entries[name].describe() and (
            artifact.content(name) == packed[name].blob
        )

    names = [*packed, *kept]
    for name, equal in zip(names, in_order(same, names), strict=True):
        if not equal:
            raise ArtifactError(f"{artifact.path}: tensor {name!r} reads back differently")


def write_report(data: Report, folder: Path, *, page: bool) -> None:
    """Write the card, which is part of the artifact, and the report, which is not."""
    write_file(folder / "README.md", card(data).encode())
    if not page:
        return
    try:
        write(data, folder / REPORT)
    except MissingExtraError:
        # The artifact and its figures do not depend on a plotting library.
        write_json(data, (folder / REPORT).with_suffix(".json"))
