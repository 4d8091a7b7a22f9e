"""Compresses the models of the rows that are named, from their folders, into the folder given first.

Written on standard output: one JSON object a row, with its paths and the quality that the report states.
"""

import json
import sys
import time
import traceback
from pathlib import Path

import torch
import transformers
import zoo
from safetensors.torch import save_file

import octavo
from octavo.calibration.objective import OBJECTIVES

RATIO = 4


def compressed(row, folder):
    """The case for a fresh process, with what the report states."""
    source, artifact, data = folder / "source", folder / "artifact", folder / "held.safetensors"
    row.model().save_pretrained(source)
    done = octavo.compress(source, ratio=RATIO, data=[row.batch()], preset="fast")
    report = done.save(artifact)
    (held,) = done.opened.held_data
    save_file({key: value.contiguous() for key, value in held.items()}, data)
    name = next(name for name, kind in OBJECTIVES.items() if type(done.opened.objective) is kind)
    paths = {"source": str(source), "artifact": str(artifact), "data": str(data)}
    return {**paths, "class": row.name, "objective": name, "stated": report["quality"]["value"]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = {row.name: row for row in zoo.ZOO}
    for name in sys.argv[2:]:
        started = time.process_time()
        try:
            made = compressed(rows[name], Path(sys.argv[1]) / name)
        except Exception:
            made = {"error": traceback.format_exc()}
        print(json.dumps({**made, "name": name, "seconds": time.process_time() - started}), flush=True)
