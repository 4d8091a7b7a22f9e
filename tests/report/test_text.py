"""Formatting for people."""

from typing import Any

import pytest

from octavo.report.text import count, duration, figures, moment, percent, plain, ratio, setting, size


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0 B"),
        (768, "768 B"),
        (999.9, "1000 B"),
        (70_000, "70.0 kB"),
        (589_824, "590 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (11_290_000, "11.29 MB"),
        (133_456_789, "133.5 MB"),
        (999_990_000, "1.00 GB"),
        (1.2e9, "1.20 GB"),
        (2.5e15, "2500.0 TB"),
        (None, "not measured"),
        (float("nan"), "not measured"),
    ],
)
def test_sizes_are_decimal(value: Any, shown: str) -> None:
    assert size(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.0031, "0.0031"),
        (0.00314159, "0.00314"),
        (1.234e-5, "1.23e-5"),
        (1e-7, "1e-7"),
        (3.8, "3.8"),
        (999.6, "1,000"),
        (6100, "6,100"),
        (-2.5, "-2.5"),
        (1e20, "1.00e+20"),
        (None, "not measured"),
    ],
)
def test_numbers_have_three_figures(value: Any, shown: str) -> None:
    assert figures(value) == shown


def test_other_quantities_read_well() -> None:
    assert [count(n) for n in (12, 30522, 999_900, 22_713_216, 7e9)] == [
        "12",
        "30,522",
        "1 million",
        "22.7 million",
        "7 billion",
    ]
    assert [duration(s) for s in (0.3, 40, 125, 7500)] == ["0.3 s", "40 s", "2 min 5 s", "2 h 5 min"]
    assert [ratio(r) for r in (1, 8.05, 123.4, None)] == ["1.00×", "8.05×", "123×", "not measured"]
    assert [percent(1, 3), percent(1, 0), percent(None)] == ["33.3 %", "–", "–"]
    assert moment("2026-11-22T03:00:00Z") == "22 November 2026, 03:00 UTC"
    assert moment("yesterday") == "yesterday"
    assert setting({"step": 0.123456, "bits": 4, "axis": [0, 1]}) == "step=0.123, bits=4, axis=[0, 1]"


def test_strings_of_strangers_become_one_printable_line() -> None:
    assert plain("a\nb\x1b[31m\u202e\udc80") == "a\\nb\\x1b[31m\\u202e\\udc80"
    long = plain("encoder." + "x" * 500 + ".weight")
    assert len(long) == 160
    assert long.startswith("encoder.x")
    assert long.endswith("x.weight")
