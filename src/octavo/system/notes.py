"""Notes to the user about a run, grouped by kind.

Notes are kept as plain text, ``site: what is wrong (figures)``, or without a site. A network with two hundred layers
may have two hundred notes of a kind. So one line per kind is shown, with the number of sites and the first of them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

from octavo.system.visible import visible


class OctavoWarning(UserWarning):
    """A warning about a run, such as too little data for some sites."""


@dataclass
class Note:
    """All notes of one kind.

    Parameters
    ----------
    text
        Text of the first note, without its site.
    sites
        The sites that the note concerns; empty if it concerns the whole run.
    """

    text: str
    sites: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.sites:
            return self.text
        if len(self.sites) == 1:
            return f"{self.sites[0]}: {self.text}"
        return f"{len(self.sites):,} sites: {_without_figures(self.text)}, e.g. {self.sites[0]}"


def by_kind(texts: Iterable[str], sites: Iterable[str]) -> list[Note]:
    """Notes grouped by kind: notes that differ only in site and figures are of one kind.

    Parameters
    ----------
    texts
        The notes as kept.
    sites
        Names of all sites.
    """
    known, kinds = set(sites), dict[tuple[str, bool], Note]()
    for whole in texts:
        site, colon, text = whole.partition(": ")
        of_site = bool(colon) and site in known
        note = kinds.setdefault((_kind(text if of_site else whole), of_site), Note(text if of_site else whole))
        if of_site:
            note.sites.append(site)
    return list(kinds.values())


def warn(notes: Iterable[Note], depth: int) -> None:
    """Issue each note as a warning, ``depth`` frames up."""
    for note in notes:
        warnings.warn(visible(note), OctavoWarning, stacklevel=depth + 1)


def _without_figures(text: str) -> str:
    """A text without its figures in brackets, since these belong to one site."""
    return re.sub(r" \([^()]*\d[^()]*\)", "", text)


def _kind(text: str) -> str:
    return re.sub(r"\d[\d.,e+-]*", "#", _without_figures(text))
