"""Ways in which a user loads an artifact, each with what became of it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import octavo
from octavo.errors import OctavoError
from octavo.runtimes.packed import packed_weight
from octavo.system.notes import OctavoWarning
from octavo.system.raw import raw_bytes

#: What a line of output may hold of control characters.
_PLAIN = {"\n", "\t"}
_HOUSE = os.path.dirname(octavo.__file__)


@dataclass
class Outcome:
    """What became of one way of loading.

    Parameters
    ----------
    verdict
        ``refused`` by Octavo, ``foreign``: by another library before Octavo was asked, ``same``, ``changed``, ``told``:
        of another configuration, as a warning says, or a failure: ``raw``, ``silent``, ``unfilled``, ``escape``,
        ``memory``.
    detail
        The error or the difference.
    """

    verdict: str
    detail: str = ""


class Unequal(Exception):
    """What was loaded is not what the manifest says; the first argument is the verdict."""


def attempt(view: str, folder: Path, honest: Honest) -> Outcome:
    """Load an artifact in one way."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            return VIEWS[view](folder, honest)
        except Unequal as error:
            told = any(issubclass(warning.category, OctavoWarning) for warning in said)
            return Outcome("told" if told and error.args[0] == "unfilled" else error.args[0], error.args[1])
        except BaseException as error:
            return _judged(error, view)


def _judged(error: BaseException, view: str) -> Outcome:
    chain, seen = [error], 0
    while seen < len(chain) < 20:
        chain += [
            other
            for other in (chain[seen].__cause__, chain[seen].__context__)
            if other is not None and other not in chain
        ]
        seen += 1
    words = " ".join(f"{type(item).__name__}: {item}"[:400] for item in chain)
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(_HOUSE)]
    place = ours[-1] if ours else frames[-1]
    detail = f"{type(error).__name__}: {str(error)[:300]} [{Path(place.filename).name}:{place.name}:{place.lineno}]"
    if any(isinstance(item, MemoryError) for item in chain) or "allocate memory" in words or "out of memory" in words:
        return Outcome("memory", detail)
    if isinstance(error, OctavoError):
        return Outcome("refused", detail)
    if view in ("auto", "sentences") and not ours:
        return Outcome("foreign", detail)
    return Outcome("raw", detail)


@dataclass
class Honest:
    """What the honest artifact gives: digests of its tensors, and names that its model has and it does not fill."""

    digests: dict[str, str]
    unfilled: dict[str, list[str]]
    #: Digest of the report that lies beside it, if there is one.
    report: str = ""


def digests_of(state: Mapping[str, Any]) -> dict[str, str]:
    """Dtype, shape and digest of every tensor, and other data as it is."""
    return {
        name: f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(raw_bytes(value)).hexdigest()}"
        if isinstance(value, Tensor)
        else repr(value)
        for name, value in state.items()
    }


def _state(folder: Path, honest: Honest) -> Outcome:
    artifact = octavo.Artifact(folder)
    found = digests_of({**artifact.state(), **artifact.extra})
    if not honest.digests or found == honest.digests:
        return Outcome("same", json.dumps(found) if not honest.digests else "")
    odd = [name for name in {**found, **honest.digests} if found.get(name) != honest.digests.get(name)]
    return Outcome("changed", ", ".join(odd)[:200])


def _packed(folder: Path, honest: Honest) -> Outcome:
    octavo.Artifact(folder).state(as_weight=packed_weight)
    return Outcome("same")


def _load(folder: Path, honest: Honest) -> Outcome:
    loaded = octavo.load(folder)
    if isinstance(loaded, nn.Module):
        return _compared("load", loaded, folder, honest)
    found = digests_of(loaded)
    return Outcome("same" if not honest.digests or found.items() <= honest.digests.items() else "changed")


def _auto(folder: Path, honest: Honest) -> Outcome:
    from transformers import AutoModel

    return _compared("auto", AutoModel.from_pretrained(folder), folder, honest)


def _sentences(folder: Path, honest: Honest) -> Outcome:
    from sentence_transformers import SentenceTransformer

    return _compared("sentences", SentenceTransformer(str(folder), device="cpu"), folder, honest)


def _compared(view: str, model: nn.Module, folder: Path, honest: Honest) -> Outcome:
    """Every tensor of a model must be that of the artifact, or one that the honest artifact does not hold either."""
    stored = octavo.Artifact(folder).state()
    ends = {name.rpartition("/")[2] or name: name for name in stored}
    unfilled, used = [], set()
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        end = next((".".join(parts[k:]) for k in range(len(parts)) if ".".join(parts[k:]) in ends), None)
        if end is None:
            unfilled.append(name)
            continue
        used.add(ends[end])
        expected = stored[ends[end]]
        if tensor.shape != expected.shape or not _equal(tensor, expected.to(tensor.dtype)):
            raise Unequal("silent", f"{name} is not the artifact's {ends[end]}")
    new = sorted(set(unfilled) - set(honest.unfilled.get(view, unfilled)))
    if new:
        raise Unequal("unfilled", f"{', '.join(new[:3])} have random values")
    if view not in honest.unfilled:
        return Outcome("same", json.dumps(sorted(unfilled)))
    return Outcome("same" if used == set(stored) and digests_of(stored) == honest.digests else "changed")


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers; a number that is none equals itself here."""
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _command(*words: str) -> Callable[[Path, Honest], Outcome]:
    def run(folder: Path, honest: Honest) -> Outcome:
        from typer.testing import CliRunner

        from octavo.cli import app

        result = CliRunner().invoke(app, [*words, str(folder)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        said = result.stdout + result.stderr
        odd = sorted({character for character in said if not (character.isprintable() or character in _PLAIN)})
        if odd:
            raise Unequal("escape", f"{' '.join(words)} prints {odd!r}")
        if result.exit_code == 0:
            if words[0] == "verify" and honest.digests:
                _verified(folder, honest)
            return Outcome("same")
        if "needs more memory than is available" in said:
            return Outcome("memory", said[:300])
        return (
            Outcome("refused", said[:300])
            if result.exit_code in (1, 2)
            else Outcome("raw", f"exit code {result.exit_code}")
        )

    return run


def _verified(folder: Path, honest: Honest) -> None:
    """What was verified against an honest report is what was written."""
    report = folder / "report.json"
    if not report.is_file() or hashlib.sha256(report.read_bytes()).hexdigest() != honest.report:
        return
    found = digests_of(octavo.Artifact(folder).state())
    if any(found.get(name) != digest for name, digest in honest.digests.items()):
        raise Unequal("silent", "verify finds nothing wrong, and the weights are others")


VIEWS: dict[str, Callable[[Path, Honest], Outcome]] = {
    "state": _state, "packed": _packed, "load": _load, "auto": _auto, "sentences": _sentences,
    "inspect": _command("inspect"), "verify": _command("verify"),
}  # fmt: skip


@contextlib.contextmanager
def silence() -> Any:
    """Nothing of what libraries say reaches the terminal."""
    with open(os.devnull, "r+b", buffering=0) as null:
        for number in (0, 1, 2):
            os.dup2(null.fileno(), number)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
