"""Make the reference pages from the code: commands, Python API, methods, forms, report. `make reference` runs it.

A test compares the pages with what this makes, so they cannot fall behind the code.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.main import get_command

import octavo
import octavo.forms
from octavo.cli import app
from octavo.cli.lazy import command_named
from octavo.methods import methods
from octavo.report.schema import Report

HERE = Path(__file__).parent
#: Headings of the sections of a NumPy docstring, each underlined by hyphens.
SECTION = re.compile(r"^(\w[\w ]*)\n-{3,}$", re.MULTILINE)
MADE = "This page is made from the code by `make reference`.\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


def markdown(text: str) -> str:
    """The text of a docstring: roles and double backticks become code, lines of a paragraph are joined."""
    text = re.sub(r":\w+:`~(?:[\w.]+\.)?(\w+)`", r"`\1`", text)  # by its last part, as the tilde asks
    text = re.sub(r":\w+:`([\w.]+)`", r"`\1`", text)
    text = re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text.strip())


def sections(doc: str) -> dict[str, str]:
    """The parts of a NumPy docstring by heading; what stands before the first heading has none."""
    pieces = SECTION.split(inspect.cleandoc(doc or ""))
    return {"": pieces[0]} | dict(zip(pieces[1::2], pieces[2::2], strict=True))


def entries(text: str) -> Iterator[tuple[str, str]]:
    """Names and texts of a section such as ``Parameters``."""
    for piece in re.split(r"\n(?=\S)", inspect.cleandoc(text).strip()):
        name, _, said = piece.partition("\n")
        yield name.strip(), markdown(inspect.cleandoc(said))


def described(doc: str) -> str:
    """A docstring as Markdown."""
    parts = sections(doc)
    made = [f"{markdown(parts.pop(''))}\n"]
    for heading, text in parts.items():
        if heading == "Examples":
            made.append(f"```pycon\n{inspect.cleandoc(text).strip()}\n```\n")
        elif heading in ("Parameters", "Attributes"):
            made.append(
                table(
                    [heading.lower().removesuffix("s"), "meaning"],
                    [[f"`{name}`", said] for name, said in entries(text)],
                )
            )
        else:
            made.append(
                "\n".join(f"- {heading}: `{name}`{'. ' + said if said else ''}" for name, said in entries(text)) + "\n"
            )
    return "\n".join(made)


def signature(name: str, function: Any) -> str:
    """The call, without annotations; one line for each parameter if it is long."""
    parameters = [
        str(parameter.replace(annotation=inspect.Parameter.empty))
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "self"
    ]
    names = list(inspect.signature(function).parameters.values())
    first = next(
        (
            k
            for k, parameter in enumerate(p for p in names if p.name != "self")
            if parameter.kind is parameter.KEYWORD_ONLY
        ),
        None,
    )
    if first is not None:
        parameters.insert(first, "*")
    line = f"{name}({', '.join(parameters)})"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(parameters) + ",\n)"


def api() -> str:
    """Everything that `octavo` exports."""
    parts = ["# Python API\n", MADE, "Every name here is an attribute of the package `octavo`.\n"]
    for name in octavo.__all__:
        value = getattr(octavo, name)
        parts.append(f"## {name}\n")
        if not inspect.isclass(value):
            parts += [f"```text\n{signature(f'octavo.{name}', value)}\n```\n", described(value.__doc__)]
            continue
        bases = [base.__name__ for base in value.__bases__ if base is not object]
        parts += [f"Derives from {', '.join(f'`{base}`' for base in bases)}.\n"] if bases else []
        parts.append(described(value.__doc__))
        for member, function in _members(value):
            if (
                member.startswith("_")
                or not callable(getattr(function, "fget", function))
                or not inspect.getdoc(function)
            ):
                continue
            said = markdown(sections(inspect.getdoc(function) or "")[""])
            call = (
                f".{member}"
                if isinstance(function, property)
                else signature(f".{member}", inspect.unwrap(getattr(value, member)))
            )
            parts.append(f"- `{' '.join(call.split())}`: {said}\n")
    return "\n".join(parts)


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """What a class and those of ours that it derives from define, each name once."""
    own = [base for base in kind.__mro__ if base.__module__.partition(".")[0] == "octavo"]
    yield from {name: value for base in reversed(own) for name, value in vars(base).items()}.items()


def commands() -> str:
    """Every command, with its arguments and options."""
    root: Any = get_command(app)
    parts = ["# Commands and options\n", MADE, f"{markdown(root.help)}\n"]
    parts.append(
        table(
            ["command", "what it does"],
            [
                [f"[`octavo {name}`](#octavo-{name})", _plain(command.help)]
                for name, command in sorted(root.commands.items())
            ],
        )
    )
    for name in sorted(root.commands):
        # The list alone knows no options.
        command = command_named(name)
        arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
        shown = " ".join(
            ("{}" if argument.required else "[{}]").format(argument.name.upper()) for argument in arguments
        )
        parts += [
            f"## octavo {name}\n",
            f"```text\n{' '.join(['octavo', name, shown, '[OPTIONS]']).replace('  ', ' ')}\n```\n",
            f"{_plain(command.help)}\n",
        ]
        examples = re.findall(r"^Example: (.*)$", command.help, re.MULTILINE)
        parts += [f"```bash\n{chr(10).join(examples)}\n```\n"] if examples else []
        rows = [
            [f"`{_spelled(parameter)}`", _help(parameter)]
            for parameter in command.params
            if "--help" not in parameter.opts
        ]
        parts.append(table(["argument or option", "meaning"], rows))
    return "\n".join(parts)


def _plain(text: str) -> str:
    return markdown(re.sub(r"^Example: .*$", "", text, flags=re.MULTILINE))


def _spelled(parameter: Any) -> str:
    return (
        ", ".join([*parameter.opts, *parameter.secondary_opts])
        if parameter.param_type_name == "option"
        else parameter.name.upper()
    )


def _help(parameter: Any) -> str:
    usual = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
    usual = getattr(usual, "value", usual)
    said = f"{parameter.help or ''}{' Required.' if parameter.required else ''}"
    known = usual not in (None, False, True, "") and not isinstance(usual, (list, tuple)) and not callable(usual)
    said = re.sub(r"(?<![\w`])'([\w -]+)'(?!\w)", r"`\1`", said)
    said = re.sub(r"(?<![\w`])('.+?'|GLOB=SPEC)(?!\w)", r"`\1`", said)
    return said + (f" Default: `{usual}`." if known else "")


def found() -> str:
    """All methods, by family."""
    parts = [
        "# Methods\n",
        MADE,
        "A method finds forms for a weight. *From preset* is the cheapest preset that tries it; "
        "one that is `named` runs only where a request names it.\n",
    ]
    kinds = list(methods().values())
    for family in sorted({kind.family for kind in kinds}):
        rows = [
            [f"`{kind.name}`", f"`{kind.preset}`", _summary(kind), kind.source]
            for kind in kinds
            if kind.family == family
        ]
        parts += [f"## {family}\n", table(["method", "from preset", "what it does", "source"], rows)]
    return "\n".join(parts)


def stored() -> str:
    """All forms."""
    kinds = [
        value
        for value in vars(octavo.forms).values()
        if inspect.isclass(value) and issubclass(value, octavo.forms.Form)
    ]
    named = sorted((kind for kind in kinds if kind is not octavo.forms.Form), key=lambda kind: kind.name)
    rows = [[f"`{kind.name}`", f"`octavo.forms.{kind.__name__}`", _summary(kind)] for kind in named]
    return "\n".join(
        [
            "# Forms\n",
            MADE,
            "A form is how a weight is stored and run. [The file format](format.md) has the parts of each.\n",
            table(["form", "class", "matrix"], rows),
        ]
    )


def report() -> str:
    """The keys of ``report.json``, record by record."""
    parts = [
        "# The report\n",
        MADE,
        "`report.html` is the page for people. `report.json` has the same content for machines. `save` returns it too, "
        'as a record: `report["artifact"]["bytes"]` and `report.artifact.bytes` are the same value.\n',
        "Sizes are bytes. Times are seconds unless a field says otherwise. A number that was not measured is null.\n",
    ]
    for kind in _records(Report, []):
        said = sections(kind.__doc__ or "")
        named = {name: text for names, text in entries(said.get("Parameters", "")) for name in names.split(", ")}
        hints = get_type_hints(kind)
        rows = [
            [f"`{part.name}`", f"`{part.type}`", named.get(part.name) or _linked(hints[part.name])]
            for part in fields(kind)
        ]
        title = "The whole" if kind is Report else kind.__name__
        parts += [f"## {title}\n", f"{markdown(said[''])}\n", table(["key", "type", "meaning"], rows)]
    return "\n".join(parts)


def _records(kind: type, found: list[type]) -> list[type]:
    """The record and those inside it, each once, in the order of their fields."""
    if kind not in found:
        found.append(kind)
        for hint in get_type_hints(kind).values():
            for inner in _inside(hint):
                _records(inner, found)
    return found


def _linked(hint: Any) -> str:
    """Links to the records of a field that says nothing itself."""
    return ", ".join(f"[{kind.__name__}](#{kind.__name__.lower()})" for kind in _inside(hint))


def _inside(hint: Any) -> Iterator[type]:
    if inspect.isclass(hint) and is_dataclass(hint):
        yield hint
    for part in get_args(hint):
        yield from _inside(part)


def _summary(kind: type) -> str:
    return markdown((kind.__doc__ or "").split("\n\n")[0])


PAGES = {"commands.md": commands, "api.md": api, "methods.md": found, "forms.md": stored, "report.md": report}


def main() -> None:
    """Write all pages."""
    for name, made in PAGES.items():
        (HERE / name).write_text(made(), encoding="utf-8")
        print(f"{HERE.name}/{name}", file=sys.stderr)


if __name__ == "__main__":
    main()
