"""The core names no concrete method or form: where it must know something, the method or form says it."""

import ast
from pathlib import Path

import pytest

import octavo
import octavo.forms
from octavo.forms import Form
from octavo.methods import methods

ROOT = Path(octavo.__file__).parent
FORMS = {name for name, kind in vars(octavo.forms).items() if isinstance(kind, type) and kind is not Form}
#: Files in which a form or a method is written.
MODULES = {kind.__module__ for kind in (*methods().values(), *(vars(octavo.forms)[name] for name in FORMS))}
#: Words that mean other things as well: a dtype, and an option.
OTHERWISE = {"int8", "keep"}
CORE = [
    *(file for room in ("allocation", "artifact", "calibration", "encoding", "targets", "verification", "report")
      for file in sorted((ROOT / room).rglob("*.py"))),
    *(file for file in sorted(ROOT.glob("*.py")) if file.name != "__init__.py"),
]  # fmt: skip


@pytest.mark.parametrize("file", CORE, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_the_core_names_no_method_and_no_form(file):
    named = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            named |= {node.value} & (set(methods()) - OTHERWISE)
        if isinstance(node, ast.ImportFrom):
            imported = {alias.name for alias in node.names}
            named |= (
                imported if node.module in MODULES else imported & FORMS if node.module == "octavo.forms" else set()
            )
    assert not named
