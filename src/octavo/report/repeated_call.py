"""The call that made an artifact, with another ratio in it."""

from __future__ import annotations

import re
import shlex

#: Options of ``octavo compress`` that another ratio replaces, with the number of their values. Unfinished work and the
#: leave to replace a folder belong to the old output.
_REPLACED = {"--ratio": 1, "--size": 1, "--bits": 1, "--resume": 0, "--overwrite": 0}
_OUT = re.compile(r"(--out|-o)(?:=|(?<=-o))?(.*)")
_BUDGET = re.compile(r"\b(ratio|size|bits)=('[^']*'|\"[^\"]*\"|[^,)]*)")


def pieces(command: str, call: str) -> tuple[str, ...]:
    """The command in pieces, with the ratio to stand between them; the output gets the ratio behind its name.

    Parameters
    ----------
    command
        The recorded one: a line of the shell, or a call of Python.
    call
        What stands for it if it is neither, or has no budget.
    """
    mark = "RATIO"
    while mark in command + call:
        mark += "0"
    return tuple(_marked(command, call, mark).split(mark))


def _marked(command: str, call: str, mark: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError:
        words = []
    if words[:2] == ["octavo", "compress"]:
        return shlex.join(_line(words, mark))
    given = command if _BUDGET.search(command) else call
    return _BUDGET.sub(f"ratio={mark}", given, count=1)


def _line(words: list[str], mark: str) -> list[str]:
    rest, found = iter(words), list[str]()
    place = 0
    for word in rest:
        name, equal, _ = word.partition("=")
        out = _OUT.fullmatch(word)
        if name in _REPLACED:
            if _REPLACED[name]:
                place = place or len(found)
                if not equal:
                    next(rest, None)
        elif out is not None:
            found += [out[1], f"{(out[2] or next(rest, '')).rstrip('/')}-{mark}"]
        else:
            found.append(word)
    place = place or len(found)
    return [*found[:place], "--ratio", mark, *found[place:]]
