"""Quick runs: every study runs in miniature without data of full runs, on shared tiny bases."""

import json

import pytest

from octavo.recipes.frame import Lab, get_study, studies
from octavo.recipes.frame import lab as lab_module
from octavo.recipes.frame.results import StudyResult, reproduce
from octavo.system.records import plain_json, record_of

NAMES = sorted(studies())


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache for all studies, so that bases are trained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab_module, "CACHE", tmp_path_factory.mktemp("cache"))
        patch.setenv("OCTAVO_DATA", str(tmp_path_factory.mktemp("empty") / "not there"))
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_quick_runs_work(name, cache):
    study = get_study(name)
    result = reproduce(study, Lab(study, quick=True))
    assert len(result.arms) >= 3 and len(result.claims) == len(study.claims) + len(study.extras)
    assert result.reason and "Changed" not in result.reason
    assert record_of(StudyResult, json.loads(json.dumps(plain_json(result)))) == result
