"""Packing a form whose nested forms were packed one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo import coding
from octavo.artifact.packing import Packed, Sized, pack
from octavo.forms import Form


@dataclass(frozen=True)
class Outline:
    """A packed form, in which nested forms can be replaced by other packed forms of the same shape.

    A nested form is named by its place: the prefix of its parts, such as ``left`` or ``core0``.
    """

    whole: Packed

    @classmethod
    def of(cls, form: Form) -> Outline:
        """The outline of a form."""
        return cls(pack(form))

    def filled(self, inner: Mapping[str, Packed]) -> Packed:
        """The packed form with other nested forms, by place; sizes are enough to know its size."""
        chunks: list[bytes] = []
        parts: dict[str, list] = {}
        codecs: dict[str, int] = {}
        length, sized, blob = 0, False, self.whole.blob
        placed: set[str] = set()
        for name, entry in self.whole.parts.items():
            place = name.rpartition("/")[0]
            if place not in inner:
                chunk = blob[entry[0] : entry[0] + entry[1]]
                codec = "raw" if len(entry) > 2 else coding.describe(chunk).codec
                parts[name] = [length, *entry[1:]]
                codecs[codec] = codecs.get(codec, 0) + len(chunk)
                chunks.append(chunk)
                length += len(chunk)
            elif place not in placed:
                placed.add(place)
                found = inner[place]
                parts |= {f"{place}/{part}": [length + own[0], *own[1:]] for part, own in found.parts.items()}
                for codec, size in found.codecs.items():
                    codecs[codec] = codecs.get(codec, 0) + size
                sized = sized or isinstance(found.content, Sized)
                if not sized:
                    chunks.append(found.blob)
                length += found.bytes
        content = Sized(length) if sized else b"".join(chunks)
        return Packed(content, parts, _with(self.whole.meta, {place: inner[place].meta for place in placed}), codecs)


def _with(meta: Mapping[str, Any], inner: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest entry with other entries of nested forms; every form keeps these under their names."""
    result = dict(meta)
    for place, entry in inner.items():
        holder = result
        *above, last = place.split("/")
        for name in above:
            holder[name] = dict(holder[name])
            holder = holder[name]
        holder[last] = entry
    return result
