"""Every architecture of the zoo: compressed from its folder, saved, and loaded by its own class in a fresh process."""

import sys
from pathlib import Path

from safetensors.torch import save_file

import octavo

sys.path.insert(0, str(Path(__file__).parent))

RATIO = 4


def compressed(row, folder):
    """The case that the fresh process is given, and what the report says of it."""
    source, artifact = folder / row.name / "source", folder / row.name / "artifact"
    row.model().save_pretrained(source)
    batch = row.batch()
    done = octavo.compress(source, ratio=RATIO, data=[batch], preset="fast")
    report = done.save(artifact)
    wanted = done.job.objective
    (held,) = done.job.held_data
    save_file({key: value.contiguous() for key, value in held.items()}, folder / row.name / "held.safetensors")
    name = next(name for name, kind in octavo.objective.OBJECTIVES.items() if type(wanted) is kind)
    case = {
        "source": str(source),
        "artifact": str(artifact),
        "batch": str(folder / row.name / "held.safetensors"),
        "objective": name,
        "pooling": getattr(wanted, "pooling", ""),
        "class": row.name,
    }
    return case, report
