"""Records of JSON values: every value has the type of its field, or the first that has not is named."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from octavo.system.records import FieldError, plain_json, record_of


@dataclass(frozen=True)
class Inner:
    number: float
    name: str = "none"


@dataclass(frozen=True)
class Outer:
    inner: Inner
    several: tuple[Inner, ...] = ()
    pair: tuple[int, str] | None = None
    named: Mapping[str, Inner | None] = field(default_factory=dict)
    mixed: tuple[tuple[str | int | float | None, ...], ...] = ()
    anything: Any = None


WHOLE = Outer(
    Inner(1), (Inner(0.5, "a"),), (3, "b"), {"x": None, "y": Inner(2.0)}, (("a", 1, 0.5, None),), {"free": [1, {}]}
)


def test_json_and_back_is_the_same_record() -> None:
    assert record_of(Outer, json.loads(json.dumps(plain_json(WHOLE)))) == WHOLE
    assert record_of(Outer, {"inner": {"number": 1}, "unknown": 3}) == Outer(Inner(1))


def test_what_json_has_not_is_written_as_what_it_has() -> None:
    assert plain_json([float("nan"), float("inf"), Path("a"), (1,), True]) == [None, None, "a", [1], True]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "the file is a list; an object is needed"),
        ({}, "inner is missing"),
        ({"inner": {}}, r"inner\.number is missing"),
        ({"inner": {"number": True}}, r"inner\.number is true; a number is needed"),
        ({"inner": {"number": 10**400}}, r"inner\.number is 10{39}; a number is needed"),
        ({"inner": {"number": 1, "name": None}}, r"inner\.name is null; a text is needed"),
        ({"inner": {"number": 1}, "several": [{"number": "x" * 99}]}, r'several\[0\]\.number is "x{39}; a number'),
        ({"inner": {"number": 1}, "pair": [1]}, "pair is a list; a list of 2 is needed"),
        ({"inner": {"number": 1}, "pair": [1, 2]}, r"pair\[1\] is 2; a text is needed"),
        ({"inner": {"number": 1}, "named": []}, "named is a list; an object is needed"),
        ({"inner": {"number": 1}, "named": {"k": 3}}, r"named\['k'\] is 3; an object is needed"),
        ({"inner": {"number": 1}, "mixed": [[{}]]}, r"mixed\[0\]\[0\] is an object; a text or an integer or a number"),
    ],
)
def test_the_first_value_that_does_not_fit_is_named(value: Any, says: str) -> None:
    with pytest.raises(FieldError, match=f"^{says}"):
        record_of(Outer, value)
