"""The request: everything that was asked, in one frozen object.

Its fields are the single source of what can be asked. The options of the commands, the requests that saved profiles
keep, the identity of kept work and the checks of single values all come from them.
"""

# ruff: noqa: RUF009 (option gives a dataclass field)
from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from octavo.errors import RequestError

_R = TypeVar("_R", bound="Request")
_F = TypeVar("_F", bound=Callable[..., Any])


class Role(Enum):
    """What a field of a request decides."""

    SOURCE = "what is compressed"
    BUDGET = "the size or speed asked for"
    MEASURED = "what a profile is made with; another value makes another profile"
    AFTER = "what follows a plan; a profile serves all values"
    RUN = "how the work is done; the result is the same"


@dataclass(frozen=True)
class Option:
    """How a field of a request is offered on the command line, checked, and saved.

    Parameters
    ----------
    help
        What ``--help`` says. Empty for a field that no command offers.
    role
        What the field decides.
    flag
        The option's name on the command line, where it is not the field's own.
    kind
        What the command line reads: ``str``, ``float``, ``int``, ``bool``, ``Path``, or ``list`` for an option that may
        be repeated.
    shown
        The default that ``--help`` shows, where the field's own default says nothing.
    read
        Makes the field's value from what the command line read.
    check
        Says what is wrong with a value and what to do instead; an empty text if nothing is.
    save
        Makes JSON of a value, None of one that is in memory alone. No function where nothing is saved.
    resolved
        Whether kept work tells what the value came to (sites, batches, methods) in place of the value.
    """

    help: str
    role: Role
    flag: str = ""
    kind: type = str
    shown: str | None = None
    read: Callable[[Any], Any] = lambda value: value
    check: Callable[[Any], str] = lambda value: ""
    save: Callable[[Any], Any] | None = lambda value: value
    resolved: bool = False


def option(default: Any, help: str, role: Role, **how: Any) -> Any:
    """A field of a request with its default; ``how`` are the other fields of :class:`Option`."""
    factory = {"default_factory": type(default)} if isinstance(default, dict | list) else {"default": default}
    return field(**factory, metadata={"option": Option(help, role, **how)})  # type: ignore[call-overload]


def listed(text: str | None) -> list[str] | None:
    """``a,b`` as a list. A knob of a method stays with it: ``entropy:rate=0.2,alds`` has two entries."""
    if text is None:
        return None
    words: list[str] = []
    for part in filter(None, map(str.strip, text.split(","))):
        if words and ":" in words[-1] and "=" in part and ":" not in part:
            words[-1] += f",{part}"
        else:
            words.append(part)
    return words


def pairs(items: Iterable[str] | None) -> dict[str, str]:
    """``GLOB=SPEC`` items as a mapping; the first ``=`` separates.

    Raises
    ------
    RequestError
        If an item is no pair, or a glob is given twice.
    """
    result: dict[str, str] = {}
    for item in items or []:
        glob, separator, spec = item.partition("=")
        if not separator or not glob or not spec:
            raise RequestError(f"--keep {item!r}: write GLOB=SPEC, such as 'embeddings.*=float16'")
        if glob in result:
            raise RequestError(f"--keep {glob!r} is given twice; leave one of them out")
        result[glob] = spec
    return result


def _is_list(value: Any) -> str:
    wrong = isinstance(value, str) or not (value is None or isinstance(value, Iterable))
    return f"give a list, such as [{str(value)!r}]" if wrong else ""


def _is_mapping(value: Any) -> str:
    if value is not None and not isinstance(value, Mapping):
        return "give a mapping of globs to choices, such as {'embeddings.*': 'float16'}"
    odd = next((pair for pair in (value or {}).items() if not all(isinstance(item, str) for item in pair)), None)
    return "" if odd is None else f"{odd[0]!r}: {odd[1]!r}: write both as strings, such as 'gptq:bits=4,group=64'"


def _is_seed(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int):
        return "give an integer, such as 0"
    return "" if -(2**63) <= value < 2**63 else "it does not fit 64 bits; choose a smaller one"


def _is_duration(value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return "" if number and 0 < value < math.inf else "give minutes, such as 30"


def _is_name(value: Any) -> str:
    return "" if isinstance(value, str) else "give a name, such as 'disk'"


def _one_of(*known: str) -> Callable[[Any], str]:
    return lambda value: "" if value in known else f"choose from {', '.join(known)}"


def _name_or_none(value: Any) -> str | None:
    """A path or a name; None for what is in memory and cannot be saved."""
    return str(value) if isinstance(value, str | Path) else None


@dataclass(frozen=True)
class Request:
    """Everything that is asked of one compression. A field that the target does not use is refused by name.

    The fields are documented at :func:`octavo.compress`, whose keyword arguments they are.

    Examples
    --------
    >>> request = Request("all-MiniLM-L6-v2", ratio=8)
    >>> request.asked(ratio=12).ratio
    12
    """

    source: Any = option(
        MISSING, "A transformers folder, a .safetensors file, or a sharded index.", Role.SOURCE, save=_name_or_none
    )
    ratio: float | None = option(None, "How many times smaller than the original, such as 8.", Role.BUDGET, kind=float)
    size: str | int | None = option(None, "The size itself, such as 11MB.", Role.BUDGET)
    bits: float | None = option(None, "Bits per weight of the whole model, such as 3.5.", Role.BUDGET, kind=float)
    target: str = option(
        "disk",
        "What the budget counts, such as disk (bytes of the files) or memory (bytes while the model runs); "
        "'octavo methods --kind targets' lists all.",
        Role.MEASURED,
        flag="for",
        check=_is_name,
    )
    base: Any = option(
        None,
        "The model that SOURCE was tuned from: the difference to it is stored, and sizes are compared with the "
        "difference in 16 bits. Loading needs the same base again.",
        Role.MEASURED,
        kind=Path,
        save=_name_or_none,
        resolved=True,
    )
    speedup: float | None = option(
        None, "For speed: times as fast as PyTorch in float32, such as 2.5.", Role.BUDGET, kind=float
    )
    latency: str | float | None = option(None, "For speed: the time that one call may take, such as 5ms.", Role.BUDGET)
    shape: str | Sequence[int] | None = option(
        None, "For speed: sequences x tokens at which speed counts.", Role.BUDGET, shown="1x32"
    )
    data: Any = option(
        None,
        "Calibration texts: one a line, .jsonl or .json with 'text', or a .csv or .tsv with a header; or a folder of "
        "images or sounds. Default: a built-in English text.",
        Role.MEASURED,
        kind=Path,
        save=_name_or_none,
        resolved=True,
    )
    forward_args: Callable[[Any], Any] | None = option(None, "", Role.MEASURED, save=None, resolved=True)
    objective: Any = option(
        None,
        "What to keep: cosine, kl or squared. Default: what fits the model.",
        Role.MEASURED,
        save=lambda value: value if isinstance(value, str) else None,
        resolved=True,
    )
    curvature: str = option(
        "kfac",
        "How errors are weighed: kfac (by inputs and outputs apart) or ekfac (both together, by a second pass over the "
        "data; more exact, for more memory).",
        Role.MEASURED,
        check=_one_of("kfac", "ekfac"),
    )
    methods: Sequence[Any] | None = option(
        None,
        "Comma-separated methods or families to choose from, with knobs if need be, such as entropy:rate=0.2,alds; see "
        "'octavo methods'. One may be a cut, such as modegpt.",
        Role.MEASURED,
        read=listed,
        check=_is_list,
        save=lambda value: None if value is None else [str(item) for item in value],
        resolved=True,
    )
    preset: str = option("default", "How much is tried: fast, default or best; or data-free.", Role.MEASURED)
    ignore: Sequence[str] = option(
        (),
        "Glob of sites to leave as they are. Repeatable.",
        Role.MEASURED,
        kind=list,
        read=lambda value: tuple(value or ()),
        check=_is_list,
        save=list,
        resolved=True,
    )
    keep: Mapping[str, str] | None = option(
        None,
        "GLOB=SPEC: a choice for some sites, such as 'embeddings.*=float16' or '*=gptq:bits=4,group=64'. Repeatable.",
        Role.MEASURED,
        kind=list,
        read=lambda value: pairs(value) or None,
        check=_is_mapping,
        save=lambda value: dict(value or {}),
        resolved=True,
    )
    recover: str = option(
        "none",
        "What follows encoding: none, or distill: the source teaches the compressed model on --data, which needs no "
        "labels, in the forms that are stored and in the same bytes. More than an hour rarely pays.",
        Role.AFTER,
        check=_one_of("none", "distill"),
    )
    minutes: float = option(30.0, "For --recover: how long to teach.", Role.AFTER, kind=float, check=_is_duration)
    plan: str | Path | None = option(
        None,
        "A plan to carry out: to its budget as 'octavo plan' wrote it, to the letter if edited.",
        Role.RUN,
        kind=Path,
    )
    workspace: str | Path | None = option(None, "", Role.RUN)
    resume: bool = option(False, "Continue the interrupted run of the same command.", Role.RUN, kind=bool)
    seed: int = option(0, "Same seed, same bytes.", Role.MEASURED, kind=int, check=_is_seed)
    memory: str | int | None = option(
        None, "The most memory to take, such as 6GB; a model that does not fit is run block by block.", Role.RUN
    )
    executor: Any = option(
        None,
        "Where sites are worked on: local threads, ray, or ray://host:port of a cluster. The bytes are the same.",
        Role.RUN,
        shown="local",
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            wrong = _option(item).check(getattr(self, item.name))
            if wrong:
                raise RequestError(f"{item.name} is {getattr(self, item.name)!r}; {wrong}")
        if not isinstance(self.ignore, tuple):
            # A generator would be empty for the second step that reads it.
            object.__setattr__(self, "ignore", tuple(self.ignore))

    def asked(self: _R, **choices: Any) -> _R:
        """A copy with other choices.

        Raises
        ------
        TypeError
            If a choice is not a field.
        """
        refuse_unknown(type(self), choices)
        return replace(self, **choices)

    def made(self, *roles: Role) -> dict[str, Any]:
        """The choices of some roles, or of all, that differ from their defaults."""
        return {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if (not roles or _option(item).role in roles) and not _is_default(item, getattr(self, item.name))
        }

    def saved(self) -> dict[str, Any]:
        """What a profile was made with, as JSON; values that are in memory alone are None."""
        offered = options(type(self), Role.MEASURED)
        return {name: how.save(getattr(self, name)) for name, (_, how) in offered.items() if how.save is not None}

    def identity(self) -> dict[str, Any]:
        """The part of what a profile is made with that kept work tells by its value."""
        offered = options(type(self), Role.MEASURED)
        return {name: getattr(self, name) for name, (_, how) in offered.items() if not how.resolved}

    def restored(self: _R, saved: Mapping[str, Any]) -> _R:
        """The request with what a profile was made with.

        Raises
        ------
        RequestError
            If the profile was made by another version, with choices that are not known here.
        """
        unknown = set(saved) - set(names(type(self), Role.MEASURED))
        if unknown:
            raise RequestError(f"the saved request has {sorted(unknown)[0]!r}, which this version does not know")
        return replace(self, **saved)


class Choices(TypedDict, total=False):
    """Keyword arguments of the Python verbs: the fields of :class:`Request`, for type checkers."""

    ratio: float | None
    size: str | int | None
    bits: float | None
    target: str
    base: Any
    speedup: float | None
    latency: str | float | None
    shape: str | Sequence[int] | None
    data: Any
    forward_args: Callable[[Any], Any] | None
    objective: Any
    curvature: str
    methods: Sequence[Any] | None
    preset: str
    ignore: Sequence[str]
    keep: Mapping[str, str] | None
    recover: str
    minutes: float
    plan: str | Path | None
    workspace: str | Path | None
    resume: bool
    seed: int
    memory: str | int | None
    executor: Any


def _option(item: Field) -> Option:
    return item.metadata["option"]


def default_of(item: Field) -> Any:
    """The default of a field."""
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _is_default(item: Field, value: Any) -> bool:
    default = default_of(item)
    # Arrays compare element by element, and are never a default.
    return value is default or (type(value) is type(default) and value == default)


def options(kind: type[Request], *roles: Role) -> dict[str, tuple[Field, Option]]:
    """By name the fields of a request and how they are offered; those of some roles, or all."""
    return {item.name: (item, _option(item)) for item in fields(kind) if not roles or _option(item).role in roles}


def names(kind: type[Request], *roles: Role) -> list[str]:
    """Names of the fields of some roles, or of all."""
    return list(options(kind, *roles))


def flagged(kind: type[Request], wanted: Collection[str]) -> str:
    """Names of fields as they are spelled on the command line: ``--ratio, --for``."""
    offered = options(kind)
    return ", ".join(f"--{offered[name][1].flag or name.replace('_', '-')}" for name in offered if name in wanted)


def refuse_unknown(kind: type[Request], choices: Mapping[str, Any]) -> None:
    """Refuse a keyword argument that is no field, naming the closest one.

    Raises
    ------
    TypeError
        As Python does for a function's own arguments.
    """
    known = names(kind)
    for name in choices:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise TypeError(f"unexpected keyword argument {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def request_of(source: Any, choices: Mapping[str, Any]) -> Request:
    """The request that a source and keyword arguments make; a request that is given is taken as it is.

    Raises
    ------
    RequestError
        If keyword arguments stand beside a request, or a value is wrong.
    TypeError
        If a keyword argument is not known.
    """
    if isinstance(source, Request):
        if choices:
            raise RequestError(
                f"a request was given with {', '.join(sorted(choices))} beside it; put these into the request: "
                "request.asked(...)"
            )
        return source
    refuse_unknown(Request, choices)
    return Request(source, **choices)


def shows_options(verb: _F) -> _F:
    """Give a verb that takes :class:`Choices` a signature that names them all, for ``help()`` and editors."""
    own = inspect.signature(verb)
    kept = [parameter for parameter in own.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    made = [
        inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=default_of(item), annotation=item.type)
        for item, how in options(Request).values()
        if how.role is not Role.SOURCE
    ]
    verb.__signature__ = own.replace(parameters=[*kept, *made])  # type: ignore[attr-defined]
    return verb
