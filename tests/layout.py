"""The layout of ``src/octavo``: rooms, floors, arrows, circles. ``python tests/layout.py`` prints them.

A room is a folder or a file beside ``__init__.py``. Imports go down: a file imports from its own room and from rooms on
lower floors. It fails on a circle of files, on an arrow to the same or a higher floor, on a function that imports
Octavo's own code, and on two public classes with one name.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

#: From the ground up; rooms on one floor do not import each other.
FLOORS = (
    ("errors",),
    ("system",),
    ("coding", "request"),
    ("forms", "sources"),
    ("artifact", "calibration"),
    ("integrations", "methods"),
    ("allocation", "architectures", "cuts", "runtimes"),
    ("training",),
    ("encoding", "verification"),
    ("report", "targets"),
    ("opening", "saving"),
    ("cutting",),
    ("pipeline",),
    ("flows",),
    ("recipes",),
    ("cli", "storing"),
)
PACKAGE = "octavo"


@dataclass(frozen=True)
class Layout:
    """What imports what: by module those of its head, and those that its functions import."""

    head: Mapping[str, set[str]]
    inner: Mapping[str, set[str]]
    rooms: frozenset[str] = field(default=frozenset())
    classes: Mapping[str, list[str]] = field(default_factory=dict)

    @property
    def arrows(self) -> set[tuple[str, str]]:
        """Pairs of rooms of which the first imports the second, in functions too."""
        pairs = ((room(a), room(b)) for edges in (self.head, self.inner) for a in edges for b in edges[a])
        return {(a, b) for a, b in pairs if a != b}


def room(module: str) -> str:
    """The room of a module; the package's own file is the roof over all."""
    return [*module.split("."), "roof"][1]


def read(source: Path) -> Layout:
    """The layout of a package's source."""
    files = {}
    for file in sorted((source / PACKAGE).rglob("*.py")):
        files[".".join(file.relative_to(source).with_suffix("").parts).removesuffix(".__init__")] = file
    head, inner = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    classes = defaultdict[str, list[str]](list)
    for module, file in files.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(module)
        for name, nested in imports(tree):
            while name and name not in files:
                name = name.rpartition(".")[0]
            if name and name != module:
                (inner if nested else head)[module].add(name)
    return Layout(head, inner, frozenset(map(room, files)) - {"roof"}, classes)


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Names that a module imports, and whether a function does; not those that only type checkers see."""
    pending: list[tuple[ast.AST, bool]] = [(tree, False)]
    while pending:
        node, nested = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, nested) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", nested) for alias in node.names)
        nested |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        pending += [(child, nested) for child in ast.iter_child_nodes(node)]


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other in circles."""
    from graphlib import CycleError, TopologicalSorter

    rest, found = {name: set(others) for name, others in edges.items()}, []
    while True:
        try:
            TopologicalSorter(rest).prepare()
            return found
        except CycleError as error:
            circle = error.args[1]
            found.append(circle)
            rest[circle[1]].discard(circle[0])


def faults(layout: Layout) -> list[str]:
    """What is against the rules, one line each."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    said = [f"{name}: a room without a floor" for name in sorted(layout.rooms - set(floor))]
    said += [f"{name}: a floor without its room" for name in sorted(set(floor) - layout.rooms)]
    both = {name: layout.head[name] | layout.inner[name] for name in {*layout.head, *layout.inner}}
    for name, others in sorted(both.items()):
        for other in sorted(others):
            own, below = room(name), room(other)
            if own != below and own != "roof" and floor.get(below, 99) >= floor.get(own, 99):
                said.append(f"{name} imports {other}: that is not below it")
    said += [f"{' -> '.join(circle)}: a circle" for circle in circles(layout.head)]
    said += [
        f"{name}: a function imports {', '.join(sorted(layout.inner[name]))}"
        for name in sorted(layout.inner)
        if layout.inner[name]
    ]
    # A recipe is read on its own.
    twice = {name: [m for m in found if room(m) != "recipes"] for name, found in layout.classes.items()}
    said += [f"{name}: a class of {' and of '.join(found)}" for name, found in twice.items() if len(found) > 1]
    return said


def main() -> int:
    """Print the layout; 1 if something is against the rules."""
    layout = read(Path(__file__).parent.parent / "src")
    arrows = sum(map(len, layout.head.values()))
    said = faults(layout)
    for line in said:
        print(line)
    print(
        f"{len(layout.rooms)} rooms on {len(FLOORS)} floors, {len(layout.arrows)} arrows between rooms, {arrows} between "
        f"files, {len(circles(layout.head))} circles, {sum(map(len, layout.inner.values()))} imports in functions, "
        f"{len(said)} faults"
    )
    return bool(said)


if __name__ == "__main__":
    sys.exit(main())
