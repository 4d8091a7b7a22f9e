"""The frame: what a lab enforces, fingerprints, bases, results and pages."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from octavo.cli import app
from octavo.errors import DivergedError, OctavoError, RequestError
from octavo.recipes.frame import STUDIES, Lab, Study, Verdict, get_study, studies, through_file
from octavo.recipes.frame import lab as lab_module
from octavo.recipes.frame import results as store
from octavo.recipes.frame.fingerprints import code_of
from octavo.recipes.frame.pages import index, page, picture
from octavo.system.records import plain_json, record_of
from octavo.training import cross_entropy


def made(run=None, seeds=3):
    """A study whose experiment is done."""

    def default(lab):
        for seed in lab.seeds:
            lab.add("plain", 9.0, 1000)
            lab.add("theirs", 1.0 + seed, 990, also_this=3)
        lab.judge("better", lab.ahead("theirs", "plain"))
        lab.say("As the arms show.")

    claims = {"better": "Theirs is below plain."}
    return Study(
        "tiny", system="Tiny", source="Nobody (2026)", metric="loss", higher=False, data="none", claims=claims,
        seeds=seeds, run=run or default,
    )  # fmt: skip


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A cache of its own."""
    monkeypatch.setattr(lab_module, "CACHE", tmp_path)
    return tmp_path


def lab(run=None, **options):
    return Lab(made(run, **options), device=torch.device("cpu"))


def test_results_are_saved_whole(tmp_path):
    result = store.reproduce(made(), lab())
    assert result.tally == "published 1/1" and result.seeds == (0, 1, 2)
    assert result.command == "octavo reproduce tiny" and result.reason == "As the arms show."
    ours = result.arms[1]
    assert (ours.name, ours.bytes, ours.values, ours.also) == (
        "theirs",
        990,
        (1.0, 2.0, 3.0),
        {"also this": (3.0,) * 3},
    )
    assert record_of(store.StudyResult, json.loads(json.dumps(plain_json(result)))) == result
    store.save(result, tmp_path)
    assert store.last("tiny", tmp_path) == result and store.last("another", tmp_path) is None


def test_a_gate_that_fails_leaves_claims_open():
    def run(lab):
        lab.add("plain", 1.0)
        lab.add("theirs", 0.5)
        lab.gate("damage is seen", lab.ahead("theirs", "plain", 2.0))
        lab.judge("better", lab.ahead("theirs", "plain"))

    result = store.reproduce(made(run), lab(run))
    assert result.claims[0].verdict == "not testable" and result.claims[0].failed == ("damage is seen",)
    assert "gate not passed: damage is seen" in page(result)


def test_what_is_not_whole_is_refused():
    def unjudged(lab):
        lab.add("plain", 1.0)

    def short(lab):
        lab.add("plain", 1.0)
        lab.add("plain", 1.0)
        lab.judge("better")

    def endless(lab):
        lab.add("plain", float("nan"))
        lab.judge("better")

    for run, text in ((unjudged, "not judged: better"), (short, "has 2 figures"), (endless, "not finite")):
        with pytest.raises(OctavoError, match=text):
            store.reproduce(made(run), lab(run))
    with pytest.raises(ValueError, match="more than 12 words"):
        replace(made(), claims={"long": "a " * 13})


def batches(epoch):
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(2):
        x = torch.randn(8, 4, generator=generator)
        yield x, (x[:, 0] > 0).long()


def test_trained_arms_have_equal_steps():
    here = lab()
    model = here.train(nn.Linear(4, 2), batches, cross_entropy, steps=5, seed=0, arm="a")
    here.train(model, batches, cross_entropy, steps=2, seed=0, arm="b", before=3)
    here.train(model, batches, cross_entropy, steps=9, seed=0)
    here.add("a", 1.0)
    here.add("b", 1.0)
    here.judge("better")
    here.check()
    assert here.arms["a"].steps == here.arms["b"].steps == 5
    here.train(model, batches, cross_entropy, steps=1, seed=0, arm="b")
    with pytest.raises(OctavoError, match="different steps"):
        here.check()
    with pytest.raises(OctavoError, match="epoch 0 has none"):
        here.train(model, lambda epoch: [], cross_entropy, steps=1, seed=0)


def test_grids_grow_at_their_edge_and_choose_once():
    here, tried = lab(), []

    def score(value):
        tried.append(value)
        return abs(value - 27)

    assert here.choose("rate", score, (1, 3), higher=False) == 27 and tried == [1, 3, 9, 27, 81]
    assert here.choose("rate", score, (1, 3)) == 27 and len(tried) == 5
    assert not here.choices["rate"].edge
    assert here.choose("other", lambda value: value, (1, 2), higher=True) == 16 and here.choices["other"].edge


def test_a_rate_with_which_training_diverges_is_the_worst():
    here = lab()

    def score(value):
        if value > 2:
            raise DivergedError("the loss is nan in step 3")
        return math.nan if value == 0.5 else value

    assert here.choose("rate", score, (0.5, 1, 2, 4), higher=True) == 2
    assert here.choices["rate"].scores == {"0.5": None, "1": 1, "2": 2, "4": None} and not here.choices["rate"].edge
    with pytest.raises(OctavoError, match="no value of"):
        here.choose("other", lambda value: math.inf, (1, 2))


def test_what_is_compared_with_nothing_is_not_testable():
    here = lab()
    here.judge("better")
    assert here.judged["better"].verdict is Verdict.NOT_TESTABLE


def test_a_knob_is_fitted_to_bytes():
    here, model = lab(), nn.Linear(64, 64)
    stored = here.quantization_alone(model, 3000)
    assert 2940 <= stored.bytes <= 3000
    width = here.thinner(lambda width: nn.Linear(64, width), through_file(model).bytes // 2, range(1, 65))
    assert 16 < width < 32
    with pytest.raises(OctavoError, match="none fits"):
        here.quantization_alone(model, 100)


def test_bases_are_made_once_for_code_data_and_settings(kept):
    here, trained = lab(), []

    def train(model):
        trained.append(model)
        nn.init.ones_(model.weight)

    def base(**settings):
        return here.base("line", lambda: nn.Linear(2, 2), train, **{"data": "x", "seed": 0, **settings})

    assert bool((base().weight == 1).all()) and bool((base().weight == 1).all()) and len(trained) == 1
    base(seed=1)
    base(data="y")
    assert len(trained) == 3 and len(list((kept / "full").iterdir())) == 3
    assert all(found.device == "CPU" for found in here.bases.values())


def test_a_result_knows_all_the_code_that_made_it():
    from octavo.training import fit

    names = set(code_of(fit, through_file))
    assert {"octavo.training.loop", "octavo.training.regimens.base", "octavo.methods.quantize.entropy"} <= names
    assert "octavo.training" not in names and not any(name.startswith("octavo.coding") for name in names)
    result = store.reproduce(made(), lab())
    own = replace(result, name="tiny", made_by={**result.made_by, "octavo.training.loop": "0"})
    with STUDIES.temporary():
        STUDIES.add("tiny", made())
        assert store.changed(result) == [] and store.changed(own) == ["octavo.training.loop"]
        assert "Changed since this run: `octavo.training.loop`." in page(own)


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '{"name": "tiny"}'])
def test_what_is_no_result_is_told(text, tmp_path):
    with STUDIES.temporary():
        STUDIES.add("tiny", made())
        (tmp_path / "tiny.json").write_text(text)
        for words in (["--list"], ["--page"]):
            refused = CliRunner().invoke(app, ["reproduce", *words, "--results", str(tmp_path)])
            assert refused.exit_code == 2 and "tiny.json: not a result" in refused.output.replace("\n", "")


def test_the_command_runs_saves_and_lists(tmp_path):
    (tmp_path / "file").write_text("")
    with STUDIES.temporary():
        STUDIES.add("tiny", made())
        run = CliRunner().invoke
        done = run(app, ["reproduce", "tiny", "--results", str(tmp_path)])
        assert done.exit_code == 0 and "holds: Theirs is below plain." in done.stdout
        listed = run(app, ["reproduce", "--list", "--results", str(tmp_path)]).stdout
        assert re.search(r"tiny +published 1/1 +Tiny", listed)
        assert run(app, ["reproduce", "--page", "--results", str(tmp_path)]).exit_code == 0
        refused = run(app, ["reproduce", "tiny", "--results", str(tmp_path / "file" / "results")])
        assert refused.exit_code == 2 and "no folder for results" in refused.output
        refused = run(app, ["reproduce", "nothing"])
        assert refused.exit_code == 2 and "'nothing' is not known" in refused.output
    assert "published 1/1" in (tmp_path / "recipes.md").read_text()
    assert (tmp_path / "recipes" / "tiny.md").exists() and "<svg" in (tmp_path / "recipes" / "tiny.svg").read_text()
    with pytest.raises(RequestError, match="not known"):
        get_study("nothing")


def test_the_pages_are_made_from_the_results():
    """What is committed agrees: each full result is on the pages as it is in its file."""
    where = store.folder()
    found = [result for name in studies() if (result := store.last(name, where)) is not None]
    assert (where.parent / "recipes.md").read_text(encoding="utf-8") == index(found)
    for result in found:
        assert not result.quick
        assert (where.parent / "recipes" / f"{result.name}.md").read_text(encoding="utf-8") == page(result)
        assert (where.parent / "recipes" / f"{result.name}.svg").exists()


def test_pictures_have_a_row_for_every_arm():
    drawn = picture(store.reproduce(made(), lab()))
    assert "theirs (990 bytes)" in drawn and "less is better" in drawn


def test_a_run_that_was_stopped_goes_on_after_its_last_seed(kept):
    begun, broken = [], [1]

    def run(lab):
        lab.add("before", 5.0)
        for seed in lab.each_seed():
            begun.append(seed)
            rate = lab.choose("rate", lambda rate: -abs(rate - 2), (1, 2, 3))
            if seed in broken:
                raise KeyboardInterrupt
            torch.manual_seed(seed)
            lab.add("theirs", seed + rate, 990, also_this=3 * seed)
            lab.add("plain", 9.0, 1000)
        lab.judge("better", lab.ahead("theirs", "plain"))

    with pytest.raises(KeyboardInterrupt):
        store.reproduce(made(run), lab(run))
    said, again = [], lab(run)
    again.show = said.append
    broken.clear()
    result = store.reproduce(made(run), again)
    assert begun == [0, 1, 1, 2] and any("1 of 3 seeds are done" in text for text in said)
    fresh = store.reproduce(made(run), lab(run))
    assert begun == [0, 1, 1, 2, 0, 1, 2], "a whole run leaves nothing that a later one would go on from"
    assert (result.arms, result.choices, result.claims) == (fresh.arms, fresh.choices, fresh.claims)
    assert not list(kept.rglob("tiny-*"))
