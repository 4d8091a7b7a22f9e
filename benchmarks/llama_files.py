"""GGUF files of Octavo beside those of llama.cpp's own mixes with an importance matrix, at the same bytes.

`python benchmarks/llama_files.py smollm2 --tools BUILD/bin` writes docs/results/gguf-smollm2.json. BUILD is a build of
llama.cpp with llama-quantize, llama-imatrix, llama-perplexity and llama-bench. Models are `smollm2` and `gemma` (GGUF
files in packages) and `decoder`, which benchmarks/decoder.py trains and whose float16 GGUF file is the source of both.

llama.cpp's importance matrix and Octavo's moments are of the same text, the development part of the studies' texts.
Divergence and perplexity are measured by llama.cpp on their test part. OCTAVO_DATA must name these texts. Mixes that the
file of results has already, with the same preset, context and text, are not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from common import CACHE, load_results, save_results
from models import TITLES, gguf_file, model_folder

import octavo
from octavo.recipes.frame import Lab, studies
from octavo.recipes.frame.data import texts

#: llama.cpp's mixes, from the smallest.
MIXES = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")
#: Tokens that the importance matrix and the figures are of.
SEEN, JUDGED = 96 * 512, 48 * 512
#: Characters of a piece of text, and at most of a token on average.
_PIECE, _TOKEN = 2_000, 7
#: Its log may lose its last lines, the means, as it ends.
_TRIES = 8


@dataclass(frozen=True)
class Judged:
    """Figures of a file by llama.cpp: divergence in nats a token with its error, perplexity, and tokens a second."""

    bytes: int
    divergence: float
    error: float
    perplexity: float
    per_second: float = 0.0


@dataclass(frozen=True)
class Tools:
    """The programs of a build of llama.cpp."""

    folder: Path
    threads: int
    context: int

    def call(self, program: str, *words: object) -> str:
        """What a program prints; an error stops the benchmark."""
        command = [str(self.folder / f"llama-{program}"), *map(str, words)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)}: {done.stdout[-2000:]}")
        return done.stdout

    def matrix(self, model: Path, text: Path, out: Path) -> Path:
        """The importance matrix of a text."""
        if not out.exists():
            count = ("-c", self.context, "--chunks", SEEN // self.context)
            self.call("imatrix", "-m", model, "-f", text, "-o", out, *count, "-t", self.threads)
        return out

    def mixed(self, model: Path, matrix: Path, mix: str, out: Path) -> Path:
        """llama.cpp's own file of a mix."""
        if not out.exists():
            self.call("quantize", "--allow-requantize", "--imatrix", matrix, model, out, mix, self.threads)
        return out

    def judged(self, file: Path, base: Path, text: Path) -> Judged:
        """Divergence and perplexity beside the logits of the source in ``base``, which is made if it is missing."""
        count = ("-c", self.context, "--chunks", JUDGED // self.context)
        common = ("-f", text, *count, "-t", self.threads, "--kl-divergence-base", base)
        if not base.exists():
            self.call("perplexity", "-m", file, *common)
        for _ in range(_TRIES):
            told = self.call("perplexity", "-m", file, *common, "--kl-divergence")
            mean = re.search(r"Mean\s+KLD:\s+(-?[\d.]+) ±\s+([\d.]+)", told)
            perplexity = re.search(r"Mean PPL\(Q\)\s+:\s+([\d.]+)", told)
            if mean is not None and perplexity is not None:
                break
        else:
            sys.exit(f"llama-perplexity printed no mean: {told[-2000:]}")
        return Judged(file.stat().st_size, float(mean[1]), float(mean[2]), float(perplexity[1]))

    def speeds(self, files: list[Path], rounds: int = 3) -> list[float]:
        """Tokens a second of each file, the median of rounds in turn, so that the machine's load cancels."""
        taken: list[list[float]] = [[] for _ in files]
        for _ in range(rounds):
            for file, found in zip(files, taken, strict=True):
                told = self.call("bench", "-m", file, "-p", 0, "-n", 48, "-r", 1, "-t", self.threads, "-o", "json")
                found.append(float(json.loads(told[told.index("[") : told.rindex("]") + 1])[0]["avg_ts"]))
        return [sorted(found)[len(found) // 2] for found in taken]


def spread(text: str, tokens: int) -> str:
    """Pieces from all over a text that hold at least as many tokens."""
    every = max(len(text) // (tokens * _TOKEN), 1)
    return "".join(text[start : start + _PIECE] for start in range(0, len(text), every * _PIECE))


def samples(folder: Path) -> tuple[Path, Path]:
    """Files of the text to learn from and of the text to judge by."""
    parts = texts(Lab(next(iter(studies().values()))))
    found = {"seen.txt": (parts.development, SEEN), "judged.txt": (parts.test, JUDGED)}
    for name, (text, tokens) in found.items():
        (folder / name).write_text(spread(text, tokens), encoding="utf-8")
    return folder / "seen.txt", folder / "judged.txt"


def digest(*files: Path) -> str:
    """Of the content of files."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def main() -> None:
    """Make and judge all files, and save what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("smollm2", "gemma", "decoder"))
    parser.add_argument("--tools", type=Path, required=True, help="folder of llama.cpp's programs")
    parser.add_argument("--mixes", nargs="*", default=MIXES)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window, as many as the model knows")
    parser.add_argument("--force", action="store_true", help="measure mixes again that the results have")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    work = CACHE / "gguf-bench" / given.model
    work.mkdir(parents=True, exist_ok=True)
    tools = Tools(given.tools, given.threads, given.context)
    plain = gguf_file(given.model)
    original = model_folder(given.model) if given.model == "decoder" else plain
    seen, judged = samples(work)
    matrix = tools.matrix(plain, seen, work / "matrix.gguf")
    asked = {"target": "gguf", "data": seen, "preset": given.preset}
    profile = work / f"profile-{given.preset}"
    if not (profile / "profile.json").exists():
        octavo.profile(original, profile, **asked)
    with tempfile.TemporaryDirectory(prefix="octavo-") as aside:
        base = Path(aside) / "logits"
        before = load_results(f"gguf-{given.model}")
        # Rows of another text cannot stand beside these.
        made_for = {"preset": given.preset, "context": given.context, "text": digest(seen, judged)}
        same = all(before.get(name) == value for name, value in made_for.items())
        rows = [row for row in before.get("rows", []) if same and not (given.force and row["mix"] in given.mixes)]
        done = {row["mix"] for row in rows}
        source = tools.judged(plain, base, judged)
        for mix in [mix for mix in given.mixes if mix not in done]:
            theirs = tools.mixed(plain, matrix, mix, work / f"{mix}.gguf")
            ours = work / f"octavo-{mix}-{given.preset}"
            if not (ours / "model.gguf").exists():
                done = octavo.compress(original, size=theirs.stat().st_size, workspace=profile, resume=True, **asked)
                done.save(ours)
            found = [tools.judged(file, base, judged) for file in (theirs, ours / "model.gguf")]
            uniform = json.loads((ours / "report.json").read_text())["quality"]["uniform"]
            speeds = tools.speeds([theirs, ours / "model.gguf"])
            both = [{**asdict(figures), "per_second": speed} for figures, speed in zip(found, speeds, strict=True)]
            share = found[1].divergence / found[0].divergence if found[0].divergence > 0 else None
            rows.append(
                {"mix": mix, "llama.cpp": both[0], "octavo": both[1], "share": share, "uniform": uniform,
                 "speed": speeds[1] / speeds[0]}
            )  # fmt: skip
            print(mix, f"{found[0].bytes:,} {found[1].bytes:,} bytes", f"KL {found[0].divergence:.5f} {found[1].divergence:.5f}",
                  f"share {share:.3f}" if share is not None else "", f"speed {speeds[1] / speeds[0]:.2f}", flush=True)  # fmt: skip
            save_results(
                f"gguf-{given.model}",
                {"model": TITLES[given.model], **made_for, "source": asdict(source),
                 "rows": sorted(rows, key=lambda row: MIXES.index(row["mix"]))},
                f"{given.model} --preset {given.preset} --context {given.context} --tools BUILD/bin",
            )  # fmt: skip


if __name__ == "__main__":
    main()
