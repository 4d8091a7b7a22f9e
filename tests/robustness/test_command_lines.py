"""Every option of every command, for every target, with values that can and cannot be served: code and message."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from octavo.cli import app

#: What would be a traceback, or an error that nobody foresaw.
RAW = ("Traceback", "unforeseen", "Errno", "object has no attribute")


@dataclass(frozen=True)
class Line:
    """A command line, with names of fixtures in braces, its exit code and a piece of what it prints."""

    words: str
    code: int
    says: str

    def __str__(self) -> str:
        return self.words


@pytest.fixture(scope="module")
def places(
    bare: Path, bert: Path, texts: Path, artifact: Path, tmp_path_factory: pytest.TempPathFactory, lab: Any
) -> Iterator[dict[str, str]]:
    """Sources, artifacts and files, made once."""
    root = tmp_path_factory.mktemp("lines")
    profile, plan, folded = root / "profile", root / "plan.yaml", root / "folded"
    for words in (
        ("profile", bare, "--methods", "rtn", "--out", profile),
        ("plan", profile, "--ratio", "4", "--out", plan),
        ("compress", bare, "--ratio", "3", "--methods", "rtn,keep", "--out", folded),
    ):
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
    (root / "deep.json").write_text("[" * 100_000)
    (root / "deep.yaml").write_text("[" * 3_000)
    (root / "circle").symlink_to(root / "circle")
    (root / "huge.yaml").write_text("budget: .inf\nasked: ratio 4\nsites: {}\n")
    (root / "words.txt").write_text("one line\n")
    lab.write_bert(root / "wide", layers=1, hidden=48)
    yield {
        "bare": str(bare), "bert": str(bert), "texts": str(texts), "artifact": str(artifact), "profile": str(profile),
        "plan": str(plan), "folded": str(folded), "wide": str(root / "wide"), "root": str(root),
        "deep": str(root / "deep.json"), "deepyaml": str(root / "deep.yaml"), "circle": str(root / "circle"),
        "huge": str(root / "huge.yaml"), "few": str(root / "words.txt"), "long": "n" * 300, "nul": "a\0b", "empty": "",
        "odd": "\x1b]0;title\x07",
    }  # fmt: skip


def lines(command: str, code: int, rows: dict[str, str]) -> list[Line]:
    """Lines that differ in their options."""
    return [Line(command.replace("*", words), code, says) for words, says in rows.items()]


#: Options whose values are wrong wherever they have a meaning.
WRONG = {
    "--ratio nan": "ratio nan is not a positive finite number",
    "--ratio 0.5": "below 1",
    "--ratio many": "Invalid value for '--ratio'",
    "--size 1e400": "write it like 11MB",
    "--size {empty}": "write it like 11MB",
    "--bits inf": "bits inf is not a positive finite number",
    "--ratio 4 --bits 3": "exactly one of ratio, size and bits",
    "--ratio 4 --preset slow": "preset 'slow' is not known",
    "--ratio 4 --preset {empty}": "preset '' is not known",
    "--ratio 4 --methods zip": "'zip' is neither a method nor a family",
    "--ratio 4 --methods ,": "name a method",
    "--ratio 4 --curvature flat": "curvature is 'flat'",
    "--ratio 4 --objective beauty": "objective 'beauty' is not known",
    "--ratio 4 --objective {empty}": "objective '' is not known",
    "--ratio 4 --ignore none*": "matches no site",
    "--ratio 4 --ignore {empty}": "matches no site",
    "--ratio 4 --keep *": "write GLOB=SPEC",
    "--ratio 4 --keep *=zip": "method 'zip' is not known",
    "--ratio 4 --keep none*=float16": "matches no site",
    "--ratio 4 --keep *=rtn:bits=4,group=16,foo=1": "'foo' is not a setting of this method; choose from bits, group",
    "--ratio 4 --keep *=rtn:bits=4,bits=3,group=16": "bits is given twice",
    "--ratio 4 --keep *=rtn:bits=4,group=16,symmetric=maybe": "symmetric is 'maybe'",
    "--ratio 4 --keep *=entropy:step=1e39": "step is 1e+39",
    "--ratio 4 --keep *=entropy:step=nan": "step is nan",
    "--ratio 4 --keep *=eora:base.step=3,rank=2,bits=4,step=1": "'base.step' is not a setting of this method",
    "--ratio 4 --keep *=eora:base=rtn,base.foo=3,rank=2,bits=4": "'foo' is not a setting of this method",
    "--ratio 4 --keep *=float16 --keep *=float16": "is given twice",
    "--ratio 4 --keep first*=float16 --keep *=float32": "has no effect",
    "--ratio 4 --seed 99999999999999999999": "does not fit 64 bits",
    "--ratio 4 --seed one": "Invalid value for '--seed'",
    "--ratio 4 --executor nonsense": "executor 'nonsense' is not known",
    "--ratio 4 --executor local:2": "executor 'local:2' is not known",
    "--ratio 4 --executor ray://nowhere": "write it as host:port",
    "--ratio 4 --memory much": "write it like 11MB",
    "--speedup 2": "cannot be combined with it: --speedup",
    "--latency 5ms": "cannot be combined with it: --latency",
    "--ratio 4 --shape 1x32": "cannot be combined with it: --shape",
    "--ratio 4 --shape nonsense": "cannot be combined with it: --shape",
    "--ratio 4 --data {texts}": "so calibration data cannot be used",
    "--ratio 4 --objective kl": "nothing is run here",
    "--ratio 4 --curvature ekfac": "needs a model that runs",
    "--ratio 4 --memory 6GB": "leave memory out",
    "--ratio 4 --memory 1B": "leave memory out",
}
#: Options that a budget of speed does not read.
NOT_OF_SPEED = (
    "--ratio 4", "--size 11kB", "--bits 4", "--methods rtn", "--preset fast", "--preset default", "--curvature kfac",
    "--curvature ekfac", "--plan {plan}", "--profile {profile}", "--memory 6GB", "--memory 1B", "--executor local",
    "--executor nonsense",
)  # fmt: skip
LINES = [
    *lines("compress {bare} --out {out} --for disk *", 2, WRONG),
    *lines("profile {bare} --out {out} *", 2, {
        words.removeprefix("--ratio 4 "): says for words, says in WRONG.items()
        if words.startswith("--ratio 4 ") and "--bits" not in words and "--shape" not in words
    }),
    *lines("compress {bert} --out {out} --for speed --speedup 2 *", 2, {
        words: f"cannot be combined with it: {'--for' if '--profile' in words else words.split()[0]}" for words in NOT_OF_SPEED
    }),
    *lines("compress {bert} --out {out} --for speed *", 2, {
        "": "exactly one of speedup and latency",
        "--speedup 2 --latency 5ms": "exactly one of speedup and latency",
        "--speedup nan": "speedup nan is not a positive finite number",
        "--speedup -1": "speedup -1.0 is not a positive finite number",
        "--latency soon": "latency 'soon' is not a time",
        "--latency {empty}": "latency '' is not a time",
        "--speedup 2 --shape nonsense": "write sequences and tokens",
        "--speedup 2 --shape 1x99999999999999999999": "tokens in all",
        "--speedup 2 --shape 1x999": "has 32 positions",
        "--speedup 2 --objective beauty": "objective 'beauty' is not known",
        "--speedup 2 --ignore none*": "matches no site",
        "--speedup 2 --keep *=rtn:bits=4,group=16,foo=1": "'foo' is not a setting of this method",
        "--speedup 2 --seed 99999999999999999999": "does not fit 64 bits",
        "--speedup 2 --data {nul}": "is not a path",
        "--speedup 2 --data {few}": "at least 10 are needed",
    }),
    *lines("compress {bare} --out {out} --for *", 2, {
        "speed --speedup 2": "only transformers models can be exported",
        "nothing --ratio 4": "target 'nothing' is not known; choose from compressed-tensors, disk, gguf, memory, speed",
        "{empty} --ratio 4": "target '' is not known",
    }),
    *lines("compress {bert} --out {out} --ratio 1e5 *", 2, {
        "--preset data-free --objective kl": "nothing is run here",
        "--memory 1B": "block by block, and memory is 1;",
        "--memory 0": "and memory is 0;",
        "--for memory --memory 1kB": "and memory is 1,000;",
        "--preset data-free --objective cosine": "nothing is run here",
        "--preset data-free --data {texts}": "calibration data cannot be used",
        "--preset data-free --curvature ekfac": "needs a model that runs",
        "--data {few}": "at least 10 are needed",
        "--data {deep}": "nests too deeply",
        "--data {root}": "is a folder, but BertModel takes neither images nor sounds; give a file of texts",
        "--data {long}": "cannot be looked up",
        "--data {circle}": "leads back to itself",
    }),
    *lines("compress {bare} --out {out} *", 2, {
        "--plan {plan} --ratio 4": "a plan has its own budget",
        "--plan {plan} --methods rtn": "a plan says which method every site gets",
        "--plan {plan} --keep *=float16": "change one of them",
        "--plan {plan} --for memory": "counts bytes for disk, not for memory",
        "--plan {deepyaml}": "not a plan",
        "--plan {huge}": "not a plan",
        "--plan {long}": "cannot be looked up",
        "--plan {empty}": "the path is empty",
        "--profile {profile} --ratio 4 --preset default": "--profile: these options cannot be combined with it",
        "--profile {profile} --ratio 4 --seed 0": "--profile: these options cannot be combined with it",
        "--profile {profile} --ratio 4 --data {texts}": "--profile: these options cannot be combined with it",
        "--profile {profile} --ratio 4 --for disk": "--profile: these options cannot be combined with it",
        "--profile {bert} --ratio 4": "not a finished profile",
        "--profile {circle} --ratio 4": "leads back to itself",
    }),
    *(Line(f"{command} {{{place}}} {rest}", 2, says)
      for place, says in (("empty", "a path is empty"), ("long", "cannot be looked up"), ("nul", "is not a path"),
                          ("circle", "leads back to itself"))
      for command, rest in (("compress", "--ratio 4 --out {out}"), ("profile", "--out {out}"),
                            ("frontier", "--ratios 4 --out {out}"))),
    *(Line(f"{command} --out {{{place}}}", 2, says)
      for place, says in (("empty", "the path is empty"), ("long", "cannot be looked up"), ("nul", "is not a path"),
                          ("circle", "leads back to itself"))
      for command in ("compress {bare} --ratio 4", "profile {bare}", "plan {profile} --ratio 4")),
    *(Line(f"{command} {{{place}}}", 2, says)
      for place, says in (("empty", "the path is empty"), ("long", "cannot be looked up"), ("nul", "is not a path"),
                          ("circle", "leads back to itself"))
      for command in ("inspect", "verify", "evaluate {bert} --against", "evaluate {bert} --metric spearman --data",
                      "evaluate --against {bert}", "plan --ratio 4", "export {bert}")),
    *lines("frontier {bare} --out {out} *", 2, {
        "--ratios nan": "ratio nan is not a positive finite number",
        "--ratios {empty}": "write numbers with commas",
        "--ratios 4,8,": "write numbers with commas",
        "--ratios 4,0.5": "below 1",
        "--for speed": "write numbers with commas",
        "--objective kl": "nothing is run here",
        "--methods zip": "'zip' is neither a method nor a family",
        "--preset slow": "preset 'slow' is not known",
    }),
    *lines("plan {profile} *", 2, {
        "": "exactly one of ratio, size and bits",
        "--ratio inf": "ratio inf is not a positive finite number",
        "--size many": "write it like 11MB",
        "--bits -3": "bits -3.0 is not a positive finite number",
    }),
    Line("plan {profile} --ratio 1e6", 3, "ask for a ratio of at most"),
    Line("plan {bert} --ratio 4", 2, "not a profile"),
    *lines("evaluate {bert} *", 2, {
        "": "give the source with --against",
        "--metric beauty": "metric 'beauty' is not known",
        "--metric spearman --against /nope": "for the metric divergence, not spearman",
        "--metric perplexity --against {bert}": "for the metric divergence, not perplexity",
        "--metric perplexity --objective kl": "perplexity does not compare",
        "--metric perplexity": "needs a causal language model",
        "--metric spearman": "--data with lines of sentence,sentence,score",
        "--metric spearman --objective kl --data {texts}": "give --objective cosine",
        "--metric spearman --data {texts}": "at least 2 are needed",
        "--against {bare}": "needs a model that runs",
        "--against {wide} --data {texts}": "cannot be compared with",
        "--against {bert} --packed": "so it cannot run packed",
        "--against {bert} --objective beauty": "objective 'beauty' is not known",
        "--against {bert} --objective kl --data {texts}": "KL needs logits",
        "--against {bert} --data {deep}": "nests too deeply",
        "--against {bert} --data {few}": "at least 10 are needed",
    }),
    *lines("export {bert} {out}.onnx *", 2, {
        "--loss nan": "--loss nan is not a finite number",
        "--loss -1 --prefer speed": "--loss -1.0 is not a finite number",
        "--loss 0.1": "add --prefer speed",
        "--to paper": "--to 'paper' is not known",
        "--prefer beauty": "--prefer 'beauty' is not known",
        "--shape nonsense": "write sequences and tokens",
        "--shape 1x999": "has 32 positions",
        "--objective beauty": "objective 'beauty' is not known",
        "--data {deep}": "nests too deeply",
    }),
    Line("compress {bert} --ratio 4 --data {texts} --objective kl --out {out}", 2, "KL needs logits"),
    Line("export {bare} {out}.onnx", 2, "only transformers models can be exported"),
    Line("export {bert} {texts}", 2, "already exists"),
    *lines("reproduce *", 2, {
        "": "study: none is given",
        "nothing": "study 'nothing' is not known",
        "{odd}": "study '\\x1b]0;title\\x07' is not known",
        "--list --quick": "leave them out",
        "--list --seed 3": "leave them out",
        "--list --results /nope": "no such folder",
        "alds --quick --results {root}": "quick ones are never saved",
        "alds --quick --seed 99999999999": "does not fit 32 bits",
    }),
    Line("inspect {bert}", 1, "not an artifact"),
    Line("verify {root}", 1, "not an artifact"),
    Line("methods extra", 2, "unexpected extra argument"),
    Line("{odd}", 2, "\\x1b]0;title\\x07"),
    Line("compress --{odd}", 2, "\\x1b]0;title\\x07"),
    # What can be served.
    Line("methods", 0, "entropy"),
    Line("inspect {folded}", 0, "first.weight"),
    Line("verify {folded}", 0, "bit for bit"),
    Line("plan {profile} --ratio 4 --out {out}", 0, "Expected loss"),
    Line("compress {bare} --ratio 3 --keep *=rtn:bits=4,group=16,symmetric=true --out {out}", 0, "Artifact:"),
    Line("compress {bare} --ratio 2 --keep *=float32 --keep first*=float16 --methods keep --out {out}", 3, "at most"),
    Line("compress {bare} --plan {plan} --out {out}", 0, "Artifact:"),
    Line("compress {bare} --profile {profile} --ratio 4 --resume --executor local --out {out}", 0, "Artifact:"),
    Line("compress {bare} --for memory --ratio 3 --methods rtn --seed 3 --ignore first* --out {out}", 3, "at most"),
    Line("evaluate {artifact} --against {bert} --data {texts} --objective squared", 0, "mean"),
]  # fmt: skip


def test_there_are_enough_lines() -> None:
    assert len(LINES) == len(set(LINES)) >= 150


@pytest.mark.parametrize("line", LINES, ids=str)
def test_command_line(line: Line, places: dict[str, str], tmp_path: Path) -> None:
    words = [word.format(**places, out=tmp_path / "out") for word in line.words.split()]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "400"})
    said = " ".join((result.stdout + result.stderr).split())
    assert result.exit_code == line.code, said
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert line.says in said, said
    assert not any(word in said for word in RAW), said
    assert all(character.isprintable() for character in said)
    assert line.code == 0 or not (tmp_path / "out").exists()


Command = Callable[..., Any]


@pytest.mark.parametrize("option", ["--ratio", "--keep", "--out"])
def test_an_option_without_its_value(command: Command, bare: Path, option: str) -> None:
    assert command("compress", bare, option).code == 2
