"""Writing an artifact: aside, read back, compared, measured, and only then renamed into place."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from octavo.allocation.workspace import forget
from octavo.artifact import Artifact
from octavo.artifact.deltas import on_base
from octavo.encoding.result import Result
from octavo.errors import ArtifactError, MissingExtraError, OctavoError, RequestError
from octavo.report import Report, card, write_json
from octavo.report import write as write_report
from octavo.report.gather import report_data
from octavo.sources.companions import copy_companions
from octavo.sources.differences import Difference
from octavo.sources.sentences import members, transformer_folder
from octavo.system.ahead import in_order
from octavo.system.atomic import TRIED, made_aside, move_into_place, tidy, write_file
from octavo.system.clock import Clock
from octavo.system.locks import Lock
from octavo.system.paths import checked, checked_output
from octavo.system.progress import Shown, showing
from octavo.system.raw import raw_bytes
from octavo.system.replacing import check_folder
from octavo.targets import Target
from octavo.verification.foreign import record
from octavo.verification.proof import prove
from octavo.verification.recorded import REPORT

#: The folder of an artifact that only verifies another runtime's file.
_PROOF = ".proof"


@dataclass(frozen=True)
class Compressed(Result):
    """A finished compression, to be saved.

    Parameters
    ----------
    lock
        Held for as long as the encoded forms are needed, in a workspace that others may use.
    """

    lock: Lock | None = None

    def save(self, path: str | Path, *, overwrite: bool = False, report: bool = True, progress: Shown = None) -> Report:
        """Write the artifact, read it back, measure it, write the report; returns the report.

        Parameters
        ----------
        path
            The folder to write.
        overwrite
            Whether a folder that is not empty is replaced.
        report
            Whether ``report.html`` and ``report.json`` are written beside the artifact, which loads without them.
            Without them :func:`octavo.verify` checks checksums and says of the rest that it was not recorded.
        progress
            As for :func:`octavo.compress`; what was chosen there by default.

        Raises
        ------
        RequestError
            If the folder is not empty and ``overwrite`` is not set, is being written by another run, or cannot be
            written.
        ArtifactError
            If what was read back is not what was written.
        """
        return save_result(self, path, overwrite=overwrite, report=report, progress=progress)

    def forget_workspace(self) -> None:
        """Remove the folder of unfinished work, once the compression is saved: the encoded forms lie there."""
        forget(self.run.workspace.root)
        if self.lock is not None:
            self.lock.release()


def save_result(
    done: Result,
    path: str | Path,
    *,
    overwrite: bool = False,
    report: bool = True,
    progress: Shown = None,
    command: str = "",
) -> Report:
    """Write the artifact of a finished compression, for every target; nothing is left behind if anything fails.

    The folder is written aside, read back, measured, and only then renamed into place. Parameters and errors are those
    of :meth:`Compressed.save`; ``command`` is the line that the report says it was made by.
    """
    opened, shown = done.opened, done.run.progress if progress is None else progress
    with Lock(path), opened.witness.blamed(), showing(shown) as bars:
        done = replace(done, run=replace(done.run, progress=bars))
        # The folder itself: a link to it stays a link, and "." has a name.
        path = Path(path).resolve()
        check_writable(path, overwrite=overwrite, source=opened.source.path, others=[opened.witness.data])
        aside = made_aside(path)
        try:
            data = _written(done, aside, command, report=report)
            # What was copied and what was measured are to be of one state of the source.
            opened.witness.check(every=True)
            move_into_place(aside, path)
        except OSError as error:
            raise OctavoError(
                f"{path}: cannot be written: {error.strerror or error}; nothing was left there"
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return data


def _written(done: Result, folder: Path, command: str, *, report: bool) -> Report:
    """Write everything into a folder and measure it there."""
    clock, target = Clock(), done.opened.target
    assert isinstance(target, Target)
    home = folder
    if target.foreign:
        home = folder / _PROOF
        home.mkdir()
    _write(done, home)
    written = target.write(done, folder)
    artifact = Artifact(home)
    _compare(done, artifact)
    source = done.opened.source
    with on_base(source.base.source if isinstance(source, Difference) else None):
        proof = prove(done.run, artifact)
        clock.lap("verify")
        section = target.verify(done, artifact, written)
        files = {file.relative_to(folder).as_posix(): file.stat().st_size for file in target.files(folder, artifact)}
        if sum(files.values()) != done.size(done.built):
            raise ArtifactError(f"{folder}: {sum(files.values())} bytes on disk, {done.size(done.built)} were planned")
        data = report_data(done, artifact, files, proof, target.plans, section, command)
    if target.foreign:
        shutil.rmtree(home)
        contents = done.built.contents
        record(folder, target.name, files, done.profile.original_bytes, len(contents.entries) + len(contents.kept))
    clock.lap("measure")
    timings = {**done.timings, **clock.laps}
    data = replace(data, timings={**timings, "total": sum(timings.values())})
    _write_report(data, folder, page=report)
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


def _write(done: Result, folder: Path) -> None:
    source = done.opened.source
    done.built.contents.write(folder, lambda written, total: done.run.progress("write", written >> 20, total >> 20))
    if source.folder is None:
        return
    if (transformer_folder(source.folder) / "config.json").exists() or members(source.folder):
        notes = copy_companions(source.folder, folder)
        done.opened.notes.extend(note for note in notes if note not in done.opened.notes)
    # As they were when the manifest was planned, whatever became of the source since.
    for name, content in done.built.contents.configurations.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _compare(done: Result, artifact: Artifact) -> None:
    """What was read from the disk must be, bit for bit, what was measured."""
    entries, kept = done.built.contents.entries, done.built.contents.kept
    if artifact.bytes != done.built.bytes:
        raise ArtifactError(f"{artifact.path}: {artifact.bytes} bytes on disk, {done.built.bytes} were planned")
    if set(artifact.names()) != {*entries, *kept} or artifact.aliases != done.opened.source.aliases:
        raise ArtifactError(f"{artifact.path}: the tensors read back are not those written")

    def same(name: str) -> bool:
        if name in kept:
            found, wanted = artifact.stored(name), kept[name].given()
            # Bit for bit, since NaN equals nothing.
            return (found.dtype, found.shape) == (wanted.dtype, wanted.shape) and raw_bytes(found) == raw_bytes(wanted)
        return artifact.sites[name] == entries[name].describe() and (
            artifact.content(name) == entries[name].packed.blob
        )

    names = [*entries, *kept]
    for name, equal in zip(names, in_order(same, names), strict=True):
        if not equal:
            raise ArtifactError(f"{artifact.path}: tensor {name!r} reads back differently")


def _write_report(data: Report, folder: Path, *, page: bool) -> None:
    """The card, which is part of the artifact, and the report, which is not."""
    write_file(folder / "README.md", card(data).encode())
    if not page:
        return
    try:
        write_report(data, folder / REPORT)
    except MissingExtraError:
        # The artifact and its figures do not depend on a plotting library.
        write_json(data, (folder / REPORT).with_suffix(".json"))
