"""Data as they are given: a folder of images or sounds, or what :mod:`octavo.calibration.inputs` reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from octavo.calibration.inputs import load_data
from octavo.errors import RequestError
from octavo.sources.batches import Batch
from octavo.sources.processors import media_batches
from octavo.sources.sites import Source
from octavo.system.paths import checked

#: More files do not improve a calibration enough to justify their time.
_MOST = 512


def given_data(
    source: Source, data: Any, *, limit: int | None, forward_args: Callable[[Batch], Any] | None = None
) -> tuple[list[Batch], str]:
    """Batches from the user's data, and their description for the report.

    Parameters
    ----------
    data
        A folder of images or sounds, or anything that :func:`octavo.calibration.inputs.load_data` takes.
    limit
        Largest number of texts or files.
    """
    if source.module is None or not isinstance(data, str | Path) or not checked(data).is_dir():
        return load_data(source, data, limit=limit, forward_args=forward_args)
    if forward_args is not None:
        raise RequestError(
            "forward_args selects the inputs of a batch, but a folder goes through the model's processor; leave it out"
        )
    return media_batches(source, checked(data), _MOST if limit is None else min(limit, _MOST))
