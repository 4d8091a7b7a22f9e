"""Evidence on disk: written part by part, and read site by site on demand.

Evidence of a large model does not fit in memory: one moment of 11,008 inputs takes half a gigabyte, and its
factorisation as much again.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from octavo.calibration.curvature import Curvature
from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.sources.source import DTYPES
from octavo.system.atomic import writing
from octavo.system.raw import raw_bytes
from octavo.system.sealed import digest, place_in
from octavo.system.tensor_files import Place, offsets

#: Bytes of moments with factorisations cached in memory. So sites that share one, and the settings of a site, do not
#: read and factor it again.
_CACHE_BYTES = 1 << 29
_CURVATURE = [field.name for field in fields(Curvature)]


class EvidenceFolder(Mapping[str, Evidence]):
    """The evidence of all sites; each is read on demand.

    Parameters
    ----------
    path
        A folder with one ``.safetensors`` file per part, each with an index of its sites in its header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place = place_in(path.parent, path.name)
        #: Checksums of tensors, by file.
        self._digests: dict[Path, dict[str, str]] = {}
        #: Where the tensors of each file lie, so that its header is parsed once and not for every site.
        self._places: dict[Path, dict[str, Place]] = {}
        self._index: dict[str, tuple[Path, dict[str, Any]]] = {}
        #: Moments in memory, and their bytes.
        self._moments: OrderedDict[tuple[Path, str], tuple[Tensor, dict[str, Any]]] = OrderedDict()
        self._held = 0
        for file in sorted(path.glob("*.safetensors")):
            try:
                self._add(file)
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                raise _damaged(file, error) from error

    @property
    def samples(self) -> dict[str, int]:
        """Number of positions seen at every site, without reading the evidence."""
        return {site: entry["samples"] for site, (_, entry) in self._index.items()}

    def without(self, part: str) -> None:
        """Remove a part if it exists."""
        file = self.path / f"{part}.safetensors"
        file.unlink(missing_ok=True)
        self._index = {site: place for site, place in self._index.items() if place[0] != file}

    def write(self, part: str, evidence: Mapping[str, Evidence]) -> None:
        """Write the evidence of some sites atomically; shared tensors are written once."""
        tensors: dict[str, Tensor] = {}
        names: dict[int, str] = {}
        digests: dict[str, str] = {}

        def stored(tensor: Tensor | None) -> str | None:
            if tensor is None:
                return None
            if id(tensor) not in names:
                names[id(tensor)] = str(len(names))
                tensors[names[id(tensor)]] = tensor
                digests[names[id(tensor)]] = _digest(tensor)
            return names[id(tensor)]

        index = {
            site: {
                "samples": found.samples,
                "rows": stored(found.rows),
                "columns": stored(found.columns),
                "terms": [[stored(rows), stored(columns)] for rows, columns in found.terms],
                "curvature": [stored(getattr(found.curvature, part)) for part in _CURVATURE if found.curvature],
            }
            for site, found in evidence.items()
        }
        file = self.path / f"{part}.safetensors"
        texts = (json.dumps(index), json.dumps(digests))
        with writing(file) as aside:
            self.path.mkdir(parents=True, exist_ok=True)
            save_file(tensors, aside, {"index": texts[0], "digests": texts[1], "sha256": self._seal(file, *texts)})
        self._add(file)

    def _add(self, file: Path) -> None:
        """Keep what the header of a file says."""
        with safe_open(file, framework="pt") as handle:
            index, self._digests[file] = self._head(file, handle.metadata())
            starts, found = offsets(file), dict[str, Place]()
            for name, start in starts.items():
                tensor = handle.get_slice(name)
                found[name] = Place(file, start, DTYPES[tensor.get_dtype()], tuple(tensor.get_shape()))
        self._places[file] = found
        self._index.update((site, (file, entry)) for site, entry in index.items())

    def _seal(self, file: Path, *texts: str) -> str:
        return digest(f"{self._place}/{file.stem}", *(text.encode() for text in texts)).hex()

    def _head(self, file: Path, head: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
        if head["sha256"] != self._seal(file, head["index"], head["digests"]):
            raise ValueError("checksum mismatch")
        return json.loads(head["index"]), json.loads(head["digests"])

    def _tensor(self, file: Path, name: str) -> Tensor:
        tensor = self._places[file][name].tensor()
        if _digest(tensor) != self._digests[file][name]:
            raise ValueError(f"checksum mismatch in tensor {name}")
        return tensor

    def __getitem__(self, site: str) -> Evidence:
        file, entry = self._index[site]
        try:
            rows = self._tensor(file, entry["rows"])
            terms = tuple((self._tensor(file, a), self._tensor(file, b)) for a, b in entry["terms"])
            parts = [self._tensor(file, name) for name in entry["curvature"]]
            if entry["columns"] is None:
                return Evidence(rows, None, entry["samples"], terms=terms)
            moment, cache = self._moment(file, entry["columns"])
        except (RequestError, ValueError) as error:
            raise _damaged(file, error) from error
        return Evidence(rows, moment, entry["samples"], cache, terms, Curvature(*parts) if parts else None)

    def _moment(self, file: Path, name: str) -> tuple[Tensor, dict[str, Any]]:
        key = (file, name)
        if key not in self._moments:
            self._moments[key] = (self._tensor(file, name), {})
            self._held += self._moments[key][0].nbytes
        self._moments.move_to_end(key)
        # Three times the moment: itself, its factor, and the results cached by other methods.
        while len(self._moments) > 1 and 3 * self._held > _CACHE_BYTES:
            self._held -= self._moments.popitem(last=False)[1][0].nbytes
        return self._moments[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


def _digest(tensor: Tensor) -> str:
    return digest(f"{tensor.dtype} {tuple(tensor.shape)}", raw_bytes(tensor)).hex()


def _damaged(file: Path, error: Exception) -> RequestError:
    return RequestError(f"{file}: damaged: {error}; remove {file.parent.parent} and start again")
