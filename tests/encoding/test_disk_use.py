"""What is foretold of a run's use of the disk is what it takes, within a factor of 1.5."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import octavo
from octavo.encoding.disk_use import WITHIN, disk_use
from octavo.opening import open_request
from octavo.request import Request
from octavo.system.progress import silent
from octavo.targets import get_target


def bare(folder: Path) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"one": (64, 48), "two": (96, 64), "three": (96, 96)}
    file = folder / "bare.safetensors"
    save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, file)
    return file, None


def wide(folder: Path) -> tuple[Any, Any]:
    """Matrices that are sampled, so that a profile keeps no forms of them."""
    file = folder / "wide.safetensors"
    save_file({name: torch.randn(640, 512) for name in ("one", "two")}, file)
    return file, None


def net(folder: Path) -> tuple[Any, Any]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 32)).eval()
    return module, [torch.randn(8, 64) for _ in range(24)]


def taken(folder: Path) -> int:
    """Bytes of whole blocks of everything in a folder."""
    return sum(
        os.lstat(os.path.join(place, name)).st_blocks * 512 for place, _, names in os.walk(folder) for name in names
    )


@pytest.mark.parametrize(
    ("made", "preset", "ratio"),
    [(bare, "fast", 4), (bare, "fast", 8), (bare, "default", 4), (wide, "fast", 8), (wide, "data-free", 4), (net, "fast", 4)],
)  # fmt: skip
def test_the_estimate_is_right(
    made: Callable[[Path], tuple[Any, Any]], preset: str, ratio: float, tmp_path: Path
) -> None:
    source, data = made(tmp_path)
    (tmp_path / "disk").mkdir()
    peak = 0

    def look(*_: object) -> None:
        nonlocal peak
        peak = max(peak, taken(tmp_path / "disk"))

    done = octavo.compress(
        source, ratio=ratio, data=data, preset=preset, workspace=tmp_path / "disk" / "work", progress=look
    )
    done.save(tmp_path / "disk" / "out", progress=look)
    look()
    opened = open_request(Request(source, data=data, preset=preset), get_target("disk"), silent)
    foretold = disk_use(opened, done.budget.bytes)
    assert peak / WITHIN <= foretold <= peak * WITHIN, (foretold, peak)
