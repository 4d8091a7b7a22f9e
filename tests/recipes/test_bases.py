"""Bases of studies: trained once, kept under what made them, with their quality."""

from octavo.recipes.frame import Lab, Study
from octavo.recipes.frame import lab as lab_module
from octavo.recipes.frame.bases import classifier, language_model, make_all


def test_all_bases_are_made_once_and_their_quality_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(lab_module, "CACHE", tmp_path)
    study = Study("none", system="", source="", metric="", higher=True, data="", claims={})
    steps = []
    found = make_all(Lab(study, quick=True, show=steps.append))
    assert [row.metric for row in found] == ["accuracy (%)", "accuracy (%)", "perplexity", "perplexity"]
    # Ten classes, and 512 tokens.
    assert found[0].value > 20 and found[2].value < 400 and found[0].seconds > 0
    assert sum(text.startswith("training") for text in steps) == 3, "both data sets are one in quick runs"
    assert make_all(Lab(study, quick=True, show=steps.append)) == found and len(steps) == 4
    lab = Lab(study, quick=True, show=steps.append)
    classifier(lab, 1)
    assert len(steps) == 5, "another seed is another base"
    model, windows = language_model(lab, tied=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight and windows.train.max() < 512
