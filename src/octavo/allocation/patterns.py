"""User choices for single sites: globs of names, and choices written on one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from octavo.errors import RequestError
from octavo.methods import Setting, get_method, methods
from octavo.sources.sites import Site


def apply_patterns(
    sites: list[Site], left: dict[str, str], ignore: Iterable[str], keep: Mapping[str, str]
) -> tuple[list[Site], dict[str, str], dict[str, tuple[str, Setting]]]:
    """Sites left after ``ignore`` globs, the reasons for the others, and the choices pinned by ``keep``.

    Raises
    ------
    RequestError
        If a pattern matches nothing, or a specification cannot be read.
    """
    left, pinned = dict(left), {}
    for pattern in ignore:
        matched = [site for site in sites if fnmatchcase(site.name, pattern)]
        if not matched:
            raise RequestError(f"--ignore {pattern!r} matches no site; sites are named like {_example(sites)}")
        left.update({site.name: f"ignored by {pattern!r}" for site in matched})
        sites = [site for site in sites if site not in matched]
    decided: dict[str, str] = {}
    for pattern, spec in keep.items():
        matched = [site for site in sites if fnmatchcase(site.name, pattern)]
        if not matched:
            raise RequestError(f"--keep {pattern!r} matches no site; sites are named like {_example(sites)}")
        pinned.update({site.name: parse_spec(spec) for site in matched})
        decided.update({site.name: pattern for site in matched})
    for pattern in keep:
        if pattern not in decided.values():
            later = next(iter({decided[site.name] for site in sites if fnmatchcase(site.name, pattern)}))
            raise RequestError(
                f"--keep {pattern!r} has no effect: the later {later!r} matches all of its sites; leave one of them "
                "out, or give the wider one first"
            )
    return sites, left, pinned


def _example(sites: list[Site]) -> str:
    return ", ".join(repr(site.name) for site in sites[:2]) or "(there are none left)"


def parse_spec(spec: str) -> tuple[str, Setting]:
    """``float16`` or ``gptq:bits=4,group=64`` as a method and a setting."""
    for name, known in methods().items():
        if spec in known.words:
            return name, dict(known.words[spec])
    name, _, knobs = spec.partition(":")
    method, setting = get_method(name), Setting()
    for knob in filter(None, knobs.split(",")):
        key, separator, value = knob.partition("=")
        if not separator:
            raise RequestError(
                f"{spec!r} names no method and setting; write a choice like gptq:bits=4,group=64 or float16"
            )
        if key in setting:
            raise RequestError(f"{spec!r}: {key} is given twice; leave one of them out")
        setting[key] = _number(value)
    method.refuse_unknown(setting)
    return name, setting


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
