"""The cut of every described transformer: units that go with all that hangs on them, and configs that follow."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from octavo.cuts import best, check_kept, left, saved
from octavo.cuts.structured import Structured
from octavo.cuts.vocabulary import new_numbers
from octavo.errors import RequestError

sys.path.insert(0, str(Path(__file__).parent))
from small_transformers import MODELS, batch_of, outputs_of, small

pytest.importorskip("transformers")
#: Configs of these say the size of a head, so that any number of heads can be stated.
SIZED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "vit", "dinov2")


def cut_of(model, kind, share=0.5, **knobs):
    knobs = {"compensate": False, "score": "magnitude", **knobs}
    cut = Structured(**knobs)
    units = cut.units(model)
    evidence = cut.observe(model, [batch_of(kind)])
    kept = best(cut.scores(model, units, evidence), share)
    return units, kept, cut.apply(model, kept, evidence)


@pytest.mark.parametrize("kind", MODELS)
def test_what_goes_is_what_zeros_would_be(kind):
    model, batch = small(kind), batch_of(kind)
    units, kept, thinner = cut_of(model, kind, kinds=("head", "neuron"))
    # What reads a unit reads zeros: the last of its slices.
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for part in units:
            piece = part.slices[-1]
            weight = zeroed.get_parameter(piece.tensor)
            weight.index_fill_(piece.dim, piece.places[~kept[part.name]].flatten(), 0)
    assert torch.allclose(outputs_of(thinner, batch), outputs_of(zeroed, batch), atol=1e-5)
    assert not torch.allclose(outputs_of(thinner, batch), outputs_of(model, batch), atol=1e-3)
    small_state = thinner.state_dict()
    for name, masks in left(model, units, kept).items():
        assert tuple(small_state[name].shape) == tuple(int(mask.sum()) for mask in masks)


@pytest.mark.parametrize("kind", MODELS)
def test_a_config_says_what_it_can(kind, tmp_path):
    model, batch = small(kind), batch_of(kind)
    columns = () if kind.startswith("gemma") else ("column",)
    _, _, thinner = cut_of(model, kind, kinds=("head", "neuron", "layer", *columns), share=0.25)
    depths = [len(part) for part in thinner.modules() if isinstance(part, nn.ModuleList)]
    assert set(depths) == {2}
    thinner.save_pretrained(tmp_path)
    if kind == "dinov2":
        return
    again = type(model).from_pretrained(tmp_path)
    again.config.use_cache = False
    assert torch.allclose(outputs_of(again, batch), outputs_of(thinner, batch), atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_what_was_cut_is_cut_again(kind):
    """The config of some cannot say that columns went, so their number is that of the tensors."""
    model, kinds = small(kind), ("neuron",) if kind.startswith("gemma") else ("neuron", "column")
    for width in (32, 24):
        units, kept, thinner = cut_of(model, kind, kinds=kinds, share=0.25)
        assert all(part.count == width for part in units if part.kind == "column")
        for part in units:
            assert saved(model, [part], {part.name: kept[part.name]}) > 0
        total, less = (sum(tensor.numel() for tensor in each.parameters()) for each in (model, thinner))
        assert less == total - saved(model, units, kept)
        model = thinner
    assert torch.isfinite(outputs_of(model, batch_of(kind))).all()


@pytest.mark.parametrize(("name", "expected"), [("Dinov2Model", ["stage2"]), ("Dinov2Backbone", ["stem", "stage2"])])
def test_a_backbone_without_a_layer_is_saved_and_loaded(name, expected, tmp_path):
    import transformers

    torch.manual_seed(0)
    stages = {"out_features": ["stage1", "stage3"]} if name == "Dinov2Backbone" else {}
    model = getattr(transformers, name)(transformers.Dinov2Config(**MODELS["dinov2"][1], **stages)).eval()
    batch, cut = batch_of("dinov2"), Structured(("layer",), "magnitude", compensate=False)
    (layers,) = cut.units(model)
    thinner = cut.apply(model, {layers.name: torch.tensor([False, True, True])}, cut.observe(model, [batch]))
    assert thinner.config.out_features == expected and model.config.out_features[-1] == "stage3"
    thinner.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for ours, theirs in zip(outputs_of(again, batch), outputs_of(thinner, batch), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_layers_that_compute_by_their_number_stay():
    model = small("gpt2")
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(RequestError, match="layers cannot be cut, since scale_attn_by_inverse_layer_idx"):
        Structured(("layer", "head")).units(model)
    assert len(Structured(("head", "neuron")).units(model)) == 6


def test_fewer_heads_than_the_config_of_bert_can_say_leave_it_alone():
    model = small("bert")
    _, _, thinner = cut_of(model, "bert", kinds=("head",))
    assert thinner.config.num_attention_heads == 4
    assert thinner.encoder.layer[0].attention.self.num_attention_heads == 2


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_units_that_stay_make_up_for_those_that_go(kind):
    model, batch = small(kind), batch_of(kind, 64)
    reference = outputs_of(model, batch)
    lost = []
    for compensate in (False, True):
        cut = Structured(score="magnitude", compensate=compensate)
        units, evidence = cut.units(model), cut.observe(model, [batch])
        kept = best(cut.scores(model, units, evidence), 0.25)
        lost.append(float((outputs_of(cut.apply(model, kept, evidence), batch) - reference).norm()))
    assert lost[1] < lost[0]


def test_columns_that_something_unknown_reads_are_refused():
    model = small("bert")
    model.encoder.layer[1].adapter = nn.Linear(32, 8)
    with pytest.raises(RequestError, match=r"'encoder.layer.1.adapter.weight' of shape \(8, 32\) may read or write"):
        Structured(kinds=("column",)).units(model)
    with pytest.raises(RequestError, match="scales its embeddings"):
        Structured(kinds=("column",)).units(small("gemma"))


def test_all_units_of_a_place_cannot_go():
    model = small("bert")
    for part in Structured(kinds=("head", "neuron", "layer", "column")).units(model):
        with pytest.raises(RequestError, match=f"no {part.kind} of '{part.name}' is left; keep at least one"):
            check_kept([part], {part.name: torch.zeros(part.count, dtype=torch.bool)})


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"kinds": ("heads",)}, "kinds has 'heads'; choose from head, neuron"),
        ({"kinds": ()}, "kinds has nothing"),
        ({"score": "taylr"}, "did you mean 'taylor'"),
        ({"objective": "l7"}, "objective 'l7' is not known"),
        ({"example": "photo.png"}, "give a batch, from Python"),
    ],
)
def test_knobs_that_mean_nothing_are_refused(knobs, says):
    with pytest.raises(RequestError, match=says):
        Structured(**knobs)


def test_models_without_such_units_are_refused():
    with pytest.raises(RequestError, match="finds no units of the kinds head, neuron"):
        Structured().units(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "gpt2"])
def test_token_rows_that_no_text_uses_go_and_the_others_get_new_numbers(kind, tmp_path):
    model = small(kind)
    batch = {"input_ids": batch_of(kind)["input_ids"] % 20 + 5}
    cut = Structured(("token",), "usage", compensate=False)
    units, evidence = cut.units(model), cut.observe(model, [batch])
    kept = best(cut.scores(model, units, evidence), 0.5)
    thinner = cut.apply(model, kept, evidence)
    numbers = new_numbers(kept[units[0].name])
    moved = {"input_ids": numbers[batch["input_ids"]]}
    assert int(numbers[batch["input_ids"]].min()) >= 0 and thinner.config.vocab_size == 30
    expected, found = outputs_of(model, batch), outputs_of(thinner, moved)
    expected = expected if found.shape == expected.shape else expected[..., kept[units[0].name]]
    assert torch.allclose(found, expected, atol=1e-5)
    thinner.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.allclose(outputs_of(again, moved), found, atol=1e-5)


@pytest.mark.parametrize(
    ("where", "entry", "value"),
    [
        ("config", "eos_token_id", 7),
        ("config", "eos_token_id", [2, 7]),
        ("generation_config", "eos_token_id", [2, 7]),
        ("generation_config", "forced_bos_token_id", 7),
        ("generation_config", "forced_decoder_ids", [[1, None], [2, 7]]),
        ("generation_config", "force_words_ids", [[3, 4], [5, 7]]),
    ],
)
def test_tokens_that_a_config_names_stay(where, entry, value):
    model = small("llama")
    setattr(getattr(model, where), entry, value)
    cut = Structured(("token",), "usage", compensate=False)
    evidence = cut.observe(model, [{"input_ids": torch.full((2, 4), 9)}])
    kept = {"vocabulary:token": torch.arange(61) != 7}
    with pytest.raises(RequestError, match=f"lacks token 7, which is the {entry} of the config; keep it"):
        cut.apply(model, kept, evidence)
    # The score knows of it, too.
    assert bool(best(cut.scores(model, cut.units(model), evidence), 0.5)["vocabulary:token"][7])


#: Entries of a config of generation, and what they are without tokens 3 and 5.
ENTRIES = [
    ("eos_token_id", [2, 6], [2, 4]),
    ("eos_token_id", 6, 4),
    ("forced_decoder_ids", [[1, None], [3, 6]], [[1, None], [3, 4]]),
    ("force_words_ids", [[2, 4], [[6], [7]]], [[2, 3], [[4], [5]]]),
    ("bad_words_ids", [[4], [4, 5], [6, 7]], [[3], [4, 5]]),
    ("bad_words_ids", [[3]], None),
    ("suppress_tokens", [-1, 3, 4, 60], [-1, 3, 58]),
    ("begin_suppress_tokens", [], []),
    ("sequence_bias", {(4,): 2.0, (5, 6): -1.0}, {(3,): 2.0}),
    ("sequence_bias", [[[4], 2.0], [[5, 6], -1.0]], [[[3], 2.0]]),
    ("lang_to_id", {"<|en|>": 6, "<|de|>": 5}, {"<|en|>": 4}),
]


@pytest.mark.parametrize(("entry", "value", "expected"), ENTRIES)
def test_all_that_names_tokens_gets_their_new_numbers(entry, value, expected):
    model = small("whisper")
    configs = [each for each in (model.config, model.generation_config) if hasattr(each, entry)]
    for each in configs or [model.generation_config]:
        setattr(each, entry, value)
    cut = Structured(("token",), "usage", compensate=False)
    kept = {"vocabulary:token": ~torch.isin(torch.arange(61), torch.tensor([3, 5]))}
    thinner = cut.apply(model, kept, cut.observe(model, [batch_of("whisper")]))
    assert getattr(thinner.generation_config, entry) == expected
    assert getattr(thinner.config, entry, expected) == expected
    assert getattr(model.generation_config, entry) == value, "the model stays as it is"
