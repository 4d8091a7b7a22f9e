"""Requests that cannot be served: one clear error, the right exit code, nothing left behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import octavo

#: Fixtures of conftest.py: a command run in this process, and one that must be refused.
Command = Refused = Callable[..., Any]


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (["--ratio", "0"], "ratio 0.0 is not a positive finite number"),
        (["--ratio", "-3"], "ratio -3.0 is not a positive finite number"),
        (["--ratio", "inf"], "ratio inf is not a positive finite number"),
        (["--bits", "0"], "bits 0.0 is not a positive finite number"),
        (["--bits", "1e300"], "more bytes than any disk has"),
        (["--size", "a lot"], "write it like 11MB"),
        (["--size", "-5MB"], "write it like 11MB"),
        (["--size", "11XB"], "write it like 11MB"),
        (["--size", "9" * 400], "more bytes than any disk has"),
        ([], "exactly one of ratio, size and bits (got none of them)"),
        (["--ratio", "8", "--size", "1MB"], "exactly one of ratio, size and bits (got ratio, size)"),
    ],
    ids=lambda value: "_".join(value)[:24] if isinstance(value, list) else "",
)
def test_budgets(refused: Refused, bare: Path, budget: list[str], says: str) -> None:
    assert "RequestError" in refused(bare, *budget, says=says).err


def test_a_ratio_that_is_no_number(refused: Refused, bare: Path) -> None:
    refused(bare, "--ratio", "eight", says="--ratio")
    for ratio in ("eight", [8], {}):
        with pytest.raises(octavo.RequestError, match="not a positive finite number"):
            octavo.compress(bare, ratio=ratio)


@pytest.mark.parametrize("budget", [("--ratio", "1e6"), ("--size", "0"), ("--ratio", "40")])
def test_what_cannot_be_reached_names_what_can(
    command: Command, refused: Refused, bare: Path, tmp_path: Path, budget: tuple[str, str]
) -> None:
    result = refused(bare, *budget, "--preset", "fast", "--json", code=3, says="ask for a ratio of at most")
    limit = json.loads(result.out)["limit"]
    assert json.loads(result.out)["error"] == "BudgetError"
    done = command("compress", bare, "--ratio", limit, "--preset", "fast", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["artifact"]["ratio"] >= limit


@pytest.mark.parametrize(
    ("ratio", "options"),
    [
        (1e6, {"preset": "fast"}),
        (9, {"methods": ["rtn", "svd"]}),
        (1e6, {"preset": "fast", "keep": {"*word*": "float16"}}),
    ],
)
def test_the_limit_holds_with_data(bert: Path, texts: Path, ratio: float, options: dict) -> None:
    with pytest.raises(octavo.BudgetError) as found:
        octavo.compress(bert, ratio=ratio, data=texts, **options)
    limit = found.value.limit
    assert 1 < limit < ratio
    assert octavo.compress(bert, ratio=limit, data=texts, **options).ratio >= limit


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--methods", "gptq,zip"], "'zip' is neither a method nor a family"),
        (["--objective", "beauty"], "choose one of cosine, kl, squared"),
        (["--ignore", "third.*"], "matches no site; sites are named like 'first.weight'"),
        (["--keep", "third.*=float16"], "matches no site; sites are named like 'first.weight'"),
        (["--ignore", "*", "--keep", "first*=float16"], "matches no site"),
        (["--keep", "=float16"], "write GLOB=SPEC"),
        (["--keep", "first.weight="], "write GLOB=SPEC"),
        (["--keep", "first.weight=float8"], "method 'float8' is not known"),
        (["--keep", "first.weight=gptq:bits"], "write a choice like gptq:bits=4,group=64"),
        (["--keep", "first.weight=rtn:bits=4"], "site 'first.weight': rtn: the setting {'bits': 4} has no 'group'"),
        (["--keep", "first.weight=rtn:bits=400,group=0"], "bits is 400"),
        (["--keep", "first.weight=rtn:bits=many,group=0"], "bits is 'many'"),
        (["--plan", "missing.yaml"], "a plan has its own budget"),
    ],
    ids=lambda value: "_".join(map(str, value))[:40] if isinstance(value, list) else "",
)
def test_options(refused: Refused, bare: Path, options: list[str], says: str) -> None:
    assert "RequestError" in refused(bare, "--ratio", "4", *options, says=says).err


def test_unknown_words_of_the_command_line(command: Command, bare: Path) -> None:
    for words in (["compress", bare, "--ratio", "4"], ["compress", bare, "--out", "x", "--rate", "4"], ["fold"]):
        assert command(*words).code == 2


def plan_of(file: Path, profile: Path, **budget: float) -> dict:
    octavo.plan(profile, **budget).save(file)
    return yaml.safe_load(file.read_text())


@pytest.fixture(scope="module")
def profile(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile") / "measured"
    octavo.profile(bare, folder, methods=["rtn", "entropy", "svd"])
    return folder


def _unknown_site(plan: dict) -> None:
    plan["sites"]["third.weight"] = plan["sites"]["first.weight"]


def _no_site(plan: dict) -> None:
    plan["sites"][5] = plan["sites"].pop("first.weight")


def _missing_site(plan: dict) -> None:
    del plan["sites"]["second.weight"]


def _unknown_method(plan: dict) -> None:
    plan["sites"]["first.weight"]["method"] = "zip"


def _no_method(plan: dict) -> None:
    plan["sites"]["first.weight"]["method"] = ["rtn"]


def _setting(**setting: object) -> Callable[[dict], None]:
    def change(plan: dict) -> None:
        plan["sites"]["first.weight"] = {"method": "rtn", "setting": setting}

    return change


def _no_setting(plan: dict) -> None:
    plan["sites"]["first.weight"]["setting"] = None


def _finer(plan: dict) -> None:
    plan["sites"]["second.weight"] = {"method": "keep", "setting": {"dtype": "float32"}}


def _no_budget(plan: dict) -> None:
    del plan["budget"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_unknown_site, "site 'third.weight' is not in the source"),
        (_no_site, "is not in the source"),
        (_missing_site, "site 'second.weight' is missing"),
        (_unknown_method, "method 'zip' is not known"),
        (_no_method, "is not known"),
        (_setting(bits=99, group=0), "site 'first.weight': rtn: bits is 99"),
        (_setting(bits=4, group=-1), "site 'first.weight': rtn: group is -1"),
        (_setting(bits="four", group=0), "site 'first.weight': rtn: bits is 'four'"),
        (_setting(), "has no 'bits'"),
        (_no_setting, "not a plan"),
        (_finer, "its budget of"),
        (_no_budget, "not a plan"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_edited_plans(refused: Refused, bare: Path, profile: Path, tmp_path: Path, change: Callable, says: str) -> None:
    file = tmp_path / "plan.yaml"
    plan = plan_of(file, profile, ratio=6)
    change(plan)
    file.write_text(yaml.safe_dump(plan))
    assert "RequestError" in refused(bare, "--plan", file, says=says).err


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"step": 0},
        {"step": -1.0},
        {"step": "wide"},
        {"step": float("nan")},
        {"step": 1e-30},
    ],
)
def test_absurd_steps_in_a_plan(refused: Refused, bare: Path, profile: Path, tmp_path: Path, setting: dict) -> None:
    file = tmp_path / "plan.yaml"
    plan = plan_of(file, profile, ratio=6)
    plan["sites"]["first.weight"] = {"method": "entropy", "setting": setting}
    file.write_text(yaml.safe_dump(plan))
    assert "RequestError" in refused(bare, "--plan", file, says="site 'first.weight': entropy: ").err


@pytest.mark.parametrize(
    "content", [b"", b"- 1", b"a: [", b"\xff\xfe", b"sites: 3\nbudget: 9000\nasked: x", b"budget: many"]
)
def test_files_that_are_no_plan(refused: Refused, bare: Path, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "plan.yaml"
    file.write_bytes(content)
    refused(bare, "--plan", file, says="not a plan")
    refused(bare, "--plan", tmp_path / "missing.yaml", says="not a plan")


def test_a_plan_as_it_was_solved_is_carried_out(command: Command, bare: Path, profile: Path, tmp_path: Path) -> None:
    solved = command("plan", profile, "--ratio", "6", "--out", tmp_path / "plan.yaml", "--json")
    assert solved.code == 0, solved.err
    result = command("compress", bare, "--plan", tmp_path / "plan.yaml", "--out", tmp_path / "out")
    assert result.code == 0, result.err


def test_profiles_that_are_none(refused: Refused, command: Command, bare: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    for folder in (tmp_path / "missing", tmp_path / "notes"):
        refused(bare, "--ratio", "4", "--profile", folder, says="not a finished profile")
        result = command("plan", folder, "--ratio", "4")
        assert result.code == 2 and "not a profile" in result.said
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear diary"


def test_a_profile_of_another_source(refused: Refused, profile: Path, tmp_path: Path, lab: Any) -> None:
    other = lab.write_bare(tmp_path / "other.safetensors", seed=1)
    before = lab.tree(profile)
    refused(other, "--ratio", "4", "--profile", profile, says="holds the work of another job (different: source)")
    assert lab.tree(profile) == before


def test_a_profile_brings_its_own_request(refused: Refused, bare: Path, profile: Path) -> None:
    for option in (["--preset", "fast"], ["--methods", "rtn"], ["--seed", "1"], ["--keep", "first*=float16"]):
        refused(
            bare,
            "--ratio",
            "4",
            "--profile",
            profile,
            *option,
            says=f"--profile: these options cannot be combined with it: {option[0]}",
        )


def test_a_damaged_profile(command: Command, profile: Path, tmp_path: Path) -> None:
    for content in (b"", b"[]", b"{}", b"\xff", (profile / "profile.json").read_bytes()[:-50]):
        (tmp_path / "profile.json").write_bytes(content)
        result = command("plan", tmp_path, "--ratio", "4")
        assert result.code == 2 and "not a profile that this version can read" in result.said


def test_profile_and_frontier_refuse_alike(command: Command, bare: Path, tmp_path: Path, lab: Any) -> None:
    before = lab.tree(tmp_path)
    out = tmp_path / "measured"
    assert command("profile", bare, "--out", out, "--methods", "zip").code == 2
    assert command("profile", tmp_path / "missing", "--out", out).code == 2
    assert command("frontier", bare, "--out", out, "--ratios", "4,six").code == 2
    assert lab.tree(tmp_path) == before
    assert command("frontier", bare, "--out", out, "--ratios", "1e6", "--preset", "fast").code == 3


def test_folders_of_others_are_never_removed(command: Command, bare: Path, tmp_path: Path, lab: Any) -> None:
    letters = tmp_path / "letters"
    letters.mkdir()
    (letters / "to_mother.txt").write_text("dear mother")
    for resume in (False, True):
        with pytest.raises(octavo.RequestError, match=r"neither empty nor a work folder of Octavo"):
            octavo.profile(bare, letters, resume=resume)
        with pytest.raises(octavo.RequestError, match=r"neither empty nor a work folder of Octavo"):
            octavo.compress(bare, ratio=4, workspace=letters, resume=resume)
    assert command("profile", bare, "--out", letters, "--overwrite").code == 2
    assert command("profile", bare, "--out", letters).code == 2
    assert lab.tree(letters) == {"to_mother.txt": b"dear mother"}


def test_evaluate_says_what_it_needs(command: Command, bert: Path, artifact: Path, tmp_path: Path) -> None:
    for words, says in (
        ([artifact, "--metric", "beauty"], "choose one of divergence, spearman"),
        ([artifact], "give the source with --against"),
        ([bert, "--metric", "spearman"], "sentence,sentence,score"),
        ([tmp_path / "missing", "--against", bert], "no such file or folder"),
    ):
        result = command("evaluate", *words)
        assert result.code == 2 and says in result.said, result.err


def test_modules_that_cannot_be_compressed(lab: Any) -> None:
    with pytest.raises(octavo.RequestError, match="no parameters or buffers"):
        octavo.compress(torch.nn.ReLU(), ratio=2)
    module = lab.net()
    module.register_buffer("few", torch.zeros(4, 4).to_sparse())
    with pytest.raises(octavo.RequestError, match="'few' has layout"):
        octavo.compress(module, ratio=2)
