"""Recipes: every one runs in miniature, results are kept whole, and the page says what the results say."""

import json
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from octavo.cli import app
from octavo.errors import RequestError
from octavo.recipes import Arm, Check, Finding, Recipe, Trial, difference, get_recipe, recipes
from octavo.recipes import results as store
from octavo.system.records import plain_json, record_of

NAMES = (
    "afm", "alds", "comera", "compactifai", "dsformer", "ekfac", "eora", "greenformers", "groupreduce", "maestro",
    "modegpt", "one-way-filters", "trp",
)  # fmt: skip


def made(values=(1.0, 2.0, 3.0), holds=True):
    """A recipe whose experiment is done."""
    arms = [Arm("plain", 1000, (4.0, 4.0, 4.0)), Arm("theirs", 990, values, {"rank": 3})]
    check = Check("Theirs is below plain.", holds, f"{arms[1].mean:g} against {arms[0].mean:g}.")
    return Recipe(
        "tiny", "Tiny", "Nobody (2026)", "It is better.", "loss (lower is better)", "none",
        lambda trial: Finding(arms, [check], "As the arms show."),
    )  # fmt: skip


def test_every_system_has_its_recipe():
    assert set(NAMES) <= set(recipes())


#: Knobs of recipes whose quick runs would take long: one learning rate, few rounds.
QUICKER = {
    "dsformer": {"RATES": (3e-4,), "ROUNDS": 2},
    "ekfac": {"_RANKS": (0.5,), "_ZEROS": (0.5,)},
    "maestro": {"RATES": (0.1,), "EPOCHS": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_quick_runs_work(name, tmp_path, monkeypatch):
    for knob, value in QUICKER.get(name, {}).items():
        monkeypatch.setattr(sys.modules[get_recipe(name).run.__module__], knob, value)
    monkeypatch.setattr("octavo.recipes.base.CACHE", tmp_path)
    monkeypatch.setenv("OCTAVO_DATA", str(tmp_path / "not there"))
    result = store.reproduce(get_recipe(name), Trial(quick=True))
    assert len(result.arms) >= 3 and result.checks and result.reason
    assert all(arm.bytes >= 0 and len(arm.values) >= 1 for arm in result.arms)
    assert len({arm.name for arm in result.arms}) == len(result.arms)
    assert record_of(store.RecipeResult, json.loads(json.dumps(plain_json(result)))) == result


def test_results_are_saved_whole_and_listed(tmp_path):
    result = store.reproduce(made(), Trial())
    assert result.holds and result.command == "octavo reproduce tiny" and result.seeds == (0, 1, 2)
    assert result.arms[1] == store.ArmRow("theirs", 990, (1.0, 2.0, 3.0), 2.0, 1.0, {"rank": 3})
    store.save(result, tmp_path)
    assert store.last("tiny", tmp_path) == result
    assert store.last("another", tmp_path) is None


def test_differences_are_of_pairs_and_know_their_error():
    found = difference((3.0, 4.0, 8.0), (1.0, 3.0, 5.0))
    assert found.mean == 2 and found.error == pytest.approx(1 / 3**0.5)
    assert found.surely == pytest.approx(2 - 2 / 3**0.5) and str(found) == "+2 ± 0.58"
    assert difference((3.0, 4.0, 5.0), (3.0,)) == difference((3.0, 4.0, 5.0), (3.0, 3.0, 3.0))
    one = difference((3.0,), (1.0,))
    assert one.error is None and one.surely == 2 and str(one) == "+2"
    with pytest.raises(ValueError, match="3 values cannot be paired with 2"):
        difference((1.0, 2.0, 3.0), (1.0, 2.0))


def test_a_claim_holds_only_if_all_of_it_does():
    assert not made(holds=False).run(Trial()).holds
    assert "does not hold at this scale" in store.page([store.reproduce(made(holds=False), Trial())])


def test_the_page_is_made_from_the_results():
    """What is committed agrees: each full result is on the page as it is in its file."""
    where = store.folder()
    found = [result for name in NAMES if (result := store.last(name, where)) is not None]
    assert (where.parent / "recipes.md").read_text(encoding="utf-8") == store.page(found)
    for result in found:
        assert not result.quick and result.name in NAMES
        assert result.holds == all(check.holds for check in result.checks)
        recipe = get_recipe(result.name)
        if not store.outdated(result):
            assert all(
                getattr(result, key) == getattr(recipe, key) for key in ("system", "source", "claim", "metric", "data")
            )


def test_a_result_knows_the_recipe_that_made_it(tmp_path):
    result = store.reproduce(made(), Trial())
    recipe = get_recipe("afm")
    assert store.fingerprint(recipe) == store.fingerprint(recipe) != store.fingerprint(get_recipe("alds"))
    of_another = replace(result, name="afm", recipe="0" * 16)
    assert store.outdated(of_another) and not store.outdated(replace(of_another, recipe=store.fingerprint(recipe)))
    assert "The recipe has changed since this run." in store.page([of_another])


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '{"name": "afm"}'])
def test_what_is_no_result_is_told(text, tmp_path):
    (tmp_path / "afm.json").write_text(text)
    for words in (["--list"], ["--page"]):
        refused = CliRunner().invoke(app, ["reproduce", *words, "--results", str(tmp_path)])
        assert refused.exit_code == 2 and "afm.json: not a result" in refused.output.replace("\n", "")


def test_a_folder_that_cannot_be_written_is_told_before_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    refused = CliRunner().invoke(app, ["reproduce", "afm", "--results", str(tmp_path / "file" / "results")])
    assert refused.exit_code == 2 and "no folder for results" in refused.output


def test_figures_that_are_not_finite_are_refused():
    with pytest.raises(RequestError, match="'theirs' has figures that are not finite"):
        store.reproduce(made(values=(1.0, float("nan"), 2.0)), Trial())


def test_the_page_of_another_folder_lies_in_it(tmp_path):
    store.save(store.reproduce(made(), Trial()), tmp_path)
    assert store.write_page(tmp_path) == tmp_path / "recipes.md"


def test_the_command_lists_and_refuses(tmp_path):
    run = CliRunner().invoke
    listed = json.loads(run(app, ["reproduce", "--list", "--json", "--results", str(tmp_path)]).stdout)
    assert {entry["name"] for entry in listed} >= set(NAMES)
    assert all(set(entry) == {"name", "system", "source", "claim", "result"} for entry in listed)
    assert all(entry["result"] is None for entry in listed)
    for words in (["reproduce"], ["reproduce", "alds", "--list"]):
        refused = run(app, words)
        assert refused.exit_code == 2 and "--list" in refused.output
    refused = run(app, ["reproduce", "nothing"])
    assert refused.exit_code == 2 and "'nothing' is not known; choose from afm, alds" in refused.output
    with pytest.raises(RequestError, match="not known"):
        get_recipe("nothing")
