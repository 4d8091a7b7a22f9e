"""A bad day, on purpose: runs that are killed, disks that are full, sources and kept work that change.

Every trial disturbs a command on a tiny model and lets it go on. It must end with the bytes of an undisturbed run, or
with a clear refusal: exit code 1 or 2, one error of one paragraph, no traceback. Anything else is a failure.

Each command is a process of its own. It is forked from this one, which has imported everything and run one command,
so that it starts in milliseconds. Full disks are small ``tmpfs`` mounts; where none may be mounted, a limit on the
size of files takes their place, and the result says so.

    python benchmarks/chaos.py --trials 102 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import save_file

import octavo
import octavo.cli.folding
import octavo.integrations.transformers
import octavo.pipeline
import octavo.report.sections
import octavo.runtimes.onnx.exporting
from octavo.system.atomic import is_aside

sys.path.insert(0, str(Path(__file__).parent))
from common import save_results

SAME, REFUSED = "same bytes", "clear refusal"
#: Files that an undisturbed run would write with other bytes, since they hold times.
_TIMED = ("README.md", "report.html", "report.json")
_WORDS = ("the", "of", "and", "in", "is", "it", "he", "was", "one", "two", "red", "old", "big", "sun", "sea", "ship")
_PATIENCE = 120


@dataclass
class Done:
    """How a command ended."""

    code: int
    said: str

    @property
    def is_refusal(self) -> bool:
        """Whether it is one clear error."""
        errors = [line for line in self.said.splitlines() if line.startswith("error: ")]
        return self.code in (1, 2) and len(errors) == 1 and "Traceback" not in self.said


class Running:
    """A command in a process that was forked from this one."""

    def __init__(self, words: list[str], log: Path, limit: int | None = None) -> None:
        self.log, self.started = log, time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            _work(words, log, limit)

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return None if pid == 0 else os.waitstatus_to_exitcode(status)

    def wait(self, until: Callable[[], bool] = lambda: False, seconds: float = _PATIENCE) -> Done | None:
        """Wait for its end, or until something has come about, or for some time; None if it goes on."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not until():
            code = self.poll()
            if code is not None:
                return Done(code, self.log.read_text(errors="replace"))
            time.sleep(0.002)
        return None

    def kill(self, number: int) -> Done:
        """Send it a signal, and wait for its end."""
        os.kill(self.pid, number)
        done = self.wait()
        if done is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            return Done(99, "did not end when it was told to")
        return done


def _work(words: list[str], log: Path, limit: int | None) -> None:
    """Run a command, and end this process."""
    code = 98
    try:
        opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        sys.argv = ["octavo", *words]
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            octavo.cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@dataclass
class Case:
    """A command that is disturbed.

    Parameters
    ----------
    words
        The command without its output.
    written
        The files that count, below the output or itself.
    """

    name: str
    words: list[str]
    #: Whether it keeps work from which --resume goes on.
    resumes: bool
    sources: list[Path] = field(default_factory=list)
    reference: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0
    disk: int = 0

    def command(self, out: Path, *more: str) -> list[str]:
        """The whole command."""
        place = [str(out)] if self.name == "export" else ["--out", str(out)]
        return [*self.words, *place, *more]

    def on(self, old: Path, new: Path) -> Case:
        """The same with a copy of its source."""
        words = [word.replace(str(old), str(new)) for word in self.words]
        sources = [Path(str(file).replace(str(old), str(new))) for file in self.sources]
        return Case(self.name, words, self.resumes, sources, self.reference, self.seconds, self.disk)

    def work(self, out: Path) -> Path:
        """The folder of its unfinished work."""
        return out if self.name.startswith("profile") else out.parent / f".{out.name}.octavo-work"


def bytes_of(out: Path, case: Case) -> dict[str, bytes]:
    """What counts of an output."""
    if case.name.startswith("profile"):
        return {"profile.json": (out / "profile.json").read_bytes()} if (out / "request.json").exists() else {}
    if not out.is_dir():
        return {"": out.read_bytes()} if out.exists() else {}
    files = (file for file in out.rglob("*") if file.is_file() and file.name not in _TIMED)
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def taken(folder: Path) -> int:
    """Bytes of whole blocks of everything in a folder, while others write there."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total


def write_sources(folder: Path) -> None:
    """A file of tensors, a BERT with its tokenizer, and texts."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    shapes = {"first.weight": (64, 48), "second.weight": (96, 64), "third.weight": (96, 96), "bias": (96,)}
    save_file(
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, folder / "bare.safetensors"
    )
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_WORDS]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).eval().save_pretrained(folder / "bert")
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special).save_pretrained(folder / "bert")
    lines = [" ".join(_WORDS[k] for k in torch.randint(0, len(_WORDS), (8,), generator=generator)) for _ in range(24)]
    (folder / "texts.txt").write_text("\n".join(lines) + "\n")


class Chaos:
    """Trials in a folder.

    Parameters
    ----------
    only
        Names of the cases to take; all if not given.
    """

    def __init__(self, folder: Path, seed: int, only: tuple[str, ...] = ()) -> None:
        self.folder, self.random, self.trials = folder, random.Random(seed), 0
        self.home = folder / "sources"
        write_sources(self.home)
        bare, bert, texts = (self.home / name for name in ("bare.safetensors", "bert", "texts.txt"))
        files = [
            bert / name for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
        ]
        model = [str(bert), "--data", str(texts), "--methods", "entropy,rtn", "--preset", "fast"]
        cases = [
            Case("compress", ["compress", str(bare), "--ratio", "4", "--preset", "fast"], True, [bare]),
            Case("compress a model", ["compress", *model, "--ratio", "3"], True, [*files, texts]),
            Case("compress blockwise", ["compress", *model, "--ratio", "3", "--memory", "1GB"], True, [*files, texts]),
            Case("profile", ["profile", *model], True, [*files, texts]),
            Case("plan", ["plan", str(folder / "whole profile"), "--ratio", "3"], False),
            Case("export", ["export", str(folder / "whole compress a model")], False),
        ]  # fmt: skip
        self.cases = {case.name: case for case in cases if not only or case.name in only}
        self.mounts = self._can_mount()
        # What is compiled and imported on the way is then there for all.
        octavo.compress(bare, ratio=4, preset="fast").save(folder / "warm")
        for case in self.cases.values():
            out = folder / f"whole {case.name}"
            before, peak = taken(folder), 0
            running = Running(case.command(out), folder / "log")
            while (done := running.wait(seconds=0.02)) is None:
                peak = max(peak, taken(folder) - before)
            if done is None or done.code:
                raise RuntimeError(f"the undisturbed run of {case.name} failed: {done}")
            case.seconds, case.reference = time.monotonic() - running.started, bytes_of(out, case)
            case.disk = peak

    def _can_mount(self) -> bool:
        try:
            with self._disk(64 << 10):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False

    @contextlib.contextmanager
    def _disk(self, size: int) -> Iterator[Path]:
        place = Path(tempfile.mkdtemp(prefix="disk-", dir=self.folder))
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True, capture_output=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", place], check=True)

    def trial(self, kind: str) -> str:
        """One trial: how it ended, or what went wrong, which begins with ``FAILED``."""
        self.trials += 1
        place = self.folder / f"trial-{self.trials}"
        place.mkdir()
        try:
            return str(getattr(self, f"_{kind}")(place))
        except Exception as error:
            return f"FAILED: {type(error).__name__}: {error}"
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _pick(self, *, resumes: bool | None = None, files: bool = False) -> Case:
        cases = [c for c in self.cases.values() if resumes in (None, c.resumes) and (not files or c.sources)]
        # What takes long is taken less often.
        return self.random.choices(cases, [1 / case.seconds for case in cases])[0]

    def _judge(self, case: Case, done: Done | None, out: Path, said: str = "") -> str:
        if done is None:
            return f"FAILED: {case.name}: did not end"
        if done.code == 0:
            found = bytes_of(out, case)
            if found != case.reference:
                odd = [name for name in {*found, *case.reference} if found.get(name) != case.reference.get(name)]
                return f"FAILED: {case.name}: other bytes with exit 0 in {odd}"
            left = [entry.name for entry in out.parent.iterdir() if entry.name.startswith(".")]
            return f"FAILED: {case.name}: left {left}" if left else SAME
        if not done.is_refusal:
            return f"FAILED: {case.name}: exit {done.code}: {done.said[-2000:]}"
        # What cannot even be read is refused with the name of its folder.
        if said not in done.said and str(out.parent / "sources") not in done.said:
            return f"FAILED: {case.name}: the refusal does not name {said}: {done.said[-2000:]}"
        return REFUSED

    def _resume(self, case: Case, out: Path, log: Path) -> Done | None:
        more = ["--resume"] if case.resumes else ["--overwrite"]
        return Running(case.command(out, *more), log).wait()

    def _killed(self, place: Path) -> str:
        """Signals at random moments, then --resume."""
        case, out = self._pick(), place / "out"
        for _ in range(self.random.choice((1, 1, 2))):
            more = ["--resume"] if case.resumes else ["--overwrite"]
            running = Running(case.command(out, *more), place / "log")
            number = self.random.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            done = running.wait(seconds=self.random.random() * case.seconds) or running.kill(number)
            if done.code == 0:
                return self._judge(case, done, out)
            if "Traceback" in done.said and done.code != -number:
                return f"FAILED: {case.name}: {number.name}: {done.said[-2000:]}"
        # Killed after its output was in place, it is refused; what is there must be whole.
        ready = bytes_of(out, case)
        verdict = self._judge(case, self._resume(case, out, place / "log"), out)
        return (
            f"FAILED: {case.name}: refused with half of an output"
            if verdict == REFUSED and ready != case.reference
            else verdict
        )

    def _full(self, place: Path) -> str:
        """A disk that fills at a random moment, then a larger one and --resume."""
        case = self._pick(resumes=True)
        # With much less room the run is refused before it starts.
        size = int(case.disk * self.random.uniform(0.6, 1.05)) // 4096 * 4096
        if not self.mounts:
            out = place / "out"
            done = Running(case.command(out), place / "log", limit=size // 4).wait()
            if done is None or (done.code and not done.is_refusal):
                return self._judge(case, done, out)
            return self._judge(case, self._resume(case, out, place / "log") if done.code else done, out)
        with self._disk(size) as disk:
            out = disk / "out"
            done = Running(case.command(out), place / "log").wait()
            if done is None or (done.code and not done.is_refusal):
                return self._judge(case, done, out)
            if done.code == 0:
                return self._judge(case, done, out)
            full = "No space left on device" in done.said
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            verdict = self._judge(case, self._resume(case, out, place / "log"), out)
            return f"{SAME}, after {'it filled' if full else 'a refusal'}" if verdict == SAME else verdict

    def _at_once(self, place: Path) -> str:
        """Two runs of one command in one output."""
        case, out = self._pick(), place / "out"
        more = ["--overwrite"] if self.random.random() < 0.5 else []
        first = Running(case.command(out, *more), place / "log")
        time.sleep(self.random.random() * case.seconds)
        second = Running(case.command(out, *more), place / "log2")
        verdicts = [self._ended(case, done) for done in (first.wait(), second.wait())]
        failed = next((verdict for verdict in verdicts if verdict.startswith("FAILED")), None)
        if failed or SAME not in verdicts:
            return failed or f"FAILED: {case.name}: both were refused"
        return self._judge(case, Done(0, ""), out)

    def _ended(self, case: Case, done: Done | None) -> str:
        if done is not None and done.code == 0:
            return SAME
        return REFUSED if done is not None and done.is_refusal else f"FAILED: {case.name}: {done}"

    def _own(self, place: Path) -> Case:
        """A case whose source may be changed."""
        shutil.copytree(self.home, place / "sources")
        return self._pick(resumes=True, files=True).on(self.home, place / "sources")

    def _begun(self, case: Case, out: Path, log: Path) -> tuple[Running, Done | None]:
        """A run that has kept its first work, some way on; and how it ended, if it did."""
        running = Running(case.command(out), log)
        done = running.wait(until=(case.work(out) / "job.json").exists)
        return running, done or running.wait(seconds=self.random.random() * 0.7 * case.seconds)

    def _between(self, place: Path) -> str:
        """A source that is changed between kill and --resume, and put back."""
        case, out = self._own(place), place / "out"
        running, done = self._begun(case, out, place / "log")
        if done is not None or running.kill(signal.SIGKILL).code == 0 or not (case.work(out) / "job.json").exists():
            return self._judge(case, Done(0, ""), out)
        file = self.random.choice(case.sources)
        before = file.read_bytes()
        self._harm(file)
        verdict = self._judge(case, self._resume(case, out, place / "log"), out, said=file.name)
        if verdict != REFUSED:
            return verdict
        file.write_bytes(before)
        verdict = self._judge(case, self._resume(case, out, place / "log"), out)
        return REFUSED if verdict == SAME else verdict

    def _during(self, place: Path) -> str:
        """A source that is changed during a run."""
        case, out = self._own(place), place / "out"
        running, done = self._begun(case, out, place / "log")
        if done is None:
            file = self.random.choice(case.sources)
            self._harm(file)
            done = running.wait()
            return self._judge(case, done, out, said=file.name)
        return self._judge(case, done, out)

    def _harm(self, file: Path) -> None:
        """Change, cut short, replace or delete a file."""
        content, how = file.read_bytes(), self.random.choice(("edit", "cut", "replace", "delete"))
        if how == "delete":
            file.unlink()
            return
        if file.suffix == ".json" and how != "cut":
            content = content.rstrip().removesuffix(b"}") + b', "changed": 1}\n'
        elif how == "cut":
            content = content[: self.random.randrange(len(content))]
        else:
            at = self.random.randrange(len(content) // 2, len(content))
            content = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        if how == "replace":
            (file.parent / "new").write_bytes(content)
            os.replace(file.parent / "new", file)
        else:
            file.write_bytes(content)

    def _flipped(self, place: Path) -> str:
        """Kept work of which bits are flipped, that is cut short, or exchanged with other kept work."""
        case, out = self._pick(resumes=True), place / "out"
        running, done = self._begun(case, out, place / "log")
        if done is not None or running.kill(signal.SIGKILL).code == 0 or not case.work(out).exists():
            return self._judge(case, Done(0, ""), out)
        files = sorted(file for file in case.work(out).rglob("*") if file.is_file() and not is_aside(file.name))
        how = self.random.choice(("flip", "flip", "flip", "cut", "swap"))
        # Folders of many files are no likelier to be hit than the single ones.
        folders = sorted({file.parent if file.suffix != ".json" else file for file in files})
        chosen = self.random.choice(folders)
        file = self.random.choice([f for f in files if f.parent == chosen]) if chosen.is_dir() else chosen
        content = bytearray(file.read_bytes())
        if how == "swap":
            other = self.random.choice([f for f in files if f.parent == file.parent])
            file.write_bytes(other.read_bytes())
            other.write_bytes(content)
        elif how == "cut" or not content:
            file.write_bytes(content[: self.random.randrange(len(content) + 1)])
        else:
            for _ in range(self.random.choice((1, 1, 3))):
                content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
            file.write_bytes(content)
        return self._judge(case, self._resume(case, out, place / "log"), out)


KINDS = {
    "killed": "killed at a random moment, resumed",
    "full": "disk full, then larger, resumed",
    "at_once": "two runs in one output",
    "between": "source changed between kill and resume",
    "during": "source changed during the run",
    "flipped": "kept work damaged, resumed",
}


def run(folder: Path, trials: int, seed: int, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """Trials of all kinds in turn; counts by kind and what failed."""
    torch.set_num_threads(1)
    chaos = Chaos(folder, seed, only)
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    failures = []
    for number in range(trials):
        kind = list(KINDS)[number % len(KINDS)]
        verdict = chaos.trial(kind)
        failed = verdict.startswith("FAILED")
        counts[kind]["failed" if failed else verdict] += 1
        failures += [f"trial {number} ({kind}): {verdict}"] if failed else []
        if failed:
            print(failures[-1], file=sys.stderr, flush=True)
    return {
        "trials": trials,
        "seed": seed,
        "commands": list(chaos.cases),
        "disks": "tmpfs mounts" if chaos.mounts else "a limit on the size of files, since nothing may be mounted here",
        "counts": {KINDS[kind]: dict(count) for kind, count in counts.items()},
        "failures": failures,
    }


def main() -> None:
    """Run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=102)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="octavo-chaos-") as folder:
        result = run(Path(folder), asked.trials, asked.seed)
    result["seconds"] = round(time.monotonic() - started, 1)
    for kind, count in result["counts"].items():
        print(f"{kind}: {', '.join(f'{number} {verdict}' for verdict, number in sorted(count.items()))}")
    save_results("chaos", result)
    print(f"{asked.trials} trials, {len(result['failures'])} failed, in {result['seconds']:.0f} s")
    sys.exit(bool(result["failures"]))


if __name__ == "__main__":
    main()
