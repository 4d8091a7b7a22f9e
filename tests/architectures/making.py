"""Compresses models of the zoo from their folders, for the process that loads what came of them."""

from pathlib import Path

from safetensors.torch import save_file

import octavo
from octavo.calibration.objective import OBJECTIVES

RATIO = 4
#: How architectures are read, run and loaded is what the zoo is for; what each method does is the contract's.
METHODS = ["entropy", "keep"]


def compressed(row, folder: Path) -> dict[str, object]:
    """The case for a fresh process, with what the report states."""
    source, artifact, data = folder / "source", folder / "artifact", folder / "held.safetensors"
    model = row.model()
    model.save_pretrained(source)
    done = octavo.compress(source, ratio=RATIO, data=[row.batch()], preset="fast", methods=METHODS)
    report = done.save(artifact, report=False)
    (held,) = done.opened.held_data
    save_file({key: value.contiguous() for key, value in held.items()}, data)
    name = next(name for name, kind in OBJECTIVES.items() if type(done.opened.objective) is kind)
    paths = {"source": str(source), "artifact": str(artifact), "data": str(data)}
    generates = not row.wide and model.can_generate()
    return {**paths, "class": row.name, "objective": name, "generates": generates, "stated": report["quality"]["value"]}
