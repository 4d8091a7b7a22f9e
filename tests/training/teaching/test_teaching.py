"""Teaching: what the losses compute, that students learn by them, and what bad input is told."""

import copy

import pytest
import torch
from torch import nn

from octavo.errors import RequestError
from octavo.training import cross_entropy, fit
from octavo.training.teaching import (
    ATTENTION,
    VALUES,
    Channels,
    HiddenStates,
    Lesson,
    Logits,
    Phase,
    Projections,
    Relations,
    channel_divergence,
    evenly,
    hidden_error,
    outputs_within,
    projections,
    relation,
    relation_divergence,
    same_tokens,
    teach,
)


def net(width, classes=5, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(inplace=True), nn.Linear(width, classes))


def batches(count=8):
    generator = torch.Generator().manual_seed(3)
    return list(torch.randn(32 * count, 6, generator=generator).split(32))


class Encoder(nn.Module):
    """One self-attention with named projections, on token ids."""

    def __init__(self, width, vocabulary=20, stride=1, fused=False):
        super().__init__()
        self.stride, self.fused = stride, fused
        self.table = nn.Embedding(vocabulary, width)
        if fused:
            self.c_attn = nn.Linear(width, 3 * width)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids, attention_mask=None):
        x = self.table(input_ids[:, :: self.stride])
        q, k, v = self.c_attn(x).chunk(3, -1) if self.fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        scores = q @ k.transpose(1, 2)
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask[:, None, :: self.stride] == 0, -1e9)
        return self.head(scores.softmax(-1) @ v)


def tokens(length=7, vocabulary=20):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (4, length), generator=generator)
    mask = (torch.arange(length) < torch.tensor([[length], [5], [3], [1]])).long()
    return {"input_ids": ids, "attention_mask": mask}


# The formulas


def test_relations_are_the_attention_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        attn_implementation="eager",
    )  # fmt: skip
    model, batch = transformers.BertModel(config, add_pooling_layer=False).eval(), tokens()
    names = projections(model)[-1]
    assert names == Projections(*(f"encoder.layer.1.attention.self.{part}" for part in ("query", "key", "value")))
    with torch.no_grad(), outputs_within(model, names.modules) as seen:
        expected = model(**batch, output_attentions=True).attentions[-1]
    ours = relation(seen[names.query], seen[names.key], 4, batch["attention_mask"]).exp()
    assert torch.allclose(ours, expected, atol=1e-6)


def test_padding_has_no_share_and_does_not_count():
    torch.manual_seed(0)
    left, right, mask = torch.randn(2, 5, 6), torch.randn(2, 5, 6), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    logs = relation(left, right, 2, mask)
    assert (
        torch.allclose(logs[0, :, :3, :3].exp().sum(-1), torch.ones(2, 3)) and float(logs[0, ..., 3:].exp().sum()) == 0
    )
    assert torch.allclose(logs[0, :, :3, :3], relation(left[:1, :3], right[:1, :3], 2)[0], atol=1e-6)
    other = relation(right, left, 2, mask)
    whole = [relation_divergence(logs[k : k + 1, :, :n, :n], other[k : k + 1, :, :n, :n]) for k, n in ((0, 3), (1, 5))]
    assert torch.allclose(relation_divergence(logs, other, mask), (3 * whole[0] + 5 * whole[1]) / 8)


def test_divergence_of_relations_is_zero_only_if_they_are_equal():
    torch.manual_seed(0)
    one, other = (relation(torch.randn(1, 4, 6), torch.randn(1, 4, 6), 3) for _ in range(2))
    assert float(relation_divergence(one, one)) == 0 < float(relation_divergence(one, other))
    by_hand = nn.functional.kl_div(other, one, log_target=True, reduction="none").sum(-1).mean()
    assert torch.allclose(relation_divergence(one, other), by_hand)


def test_padding_on_the_left_gives_decoders_no_nan():
    torch.manual_seed(0)
    states, mask = torch.randn(1, 4, 6, requires_grad=True), torch.tensor([[0, 0, 1, 1]])
    logs = relation(states, states, 2, mask, causal=True)
    assert float(logs.detach()[0, 0, 2, 2].exp()) == 1
    relation_divergence(relation(states.detach().flip(1), states.detach(), 2, mask, True), logs, mask).backward()
    assert states.grad.isfinite().all()


def test_channels_are_distributions_over_pixels():
    torch.manual_seed(0)
    theirs, ours = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    total = 0.0
    for n in range(2):
        for c in range(3):
            p, q = (part[n, c].flatten().div(2).softmax(0) for part in (theirs, ours))
            total += float((p * (p / q).log()).sum())
    assert float(channel_divergence(theirs, ours, 2.0)) == pytest.approx(4 / 3 * total / 2, rel=1e-5)
    # A constant in a channel, and any scale of its softmax's sum, change nothing.
    assert float(channel_divergence(theirs, theirs + 7)) == pytest.approx(0, abs=1e-6)


def test_hidden_states_of_padding_do_not_count():
    one, other = torch.zeros(1, 3, 2), torch.tensor([[[1.0, 1.0], [2.0, 0.0], [9.0, 9.0]]])
    assert float(hidden_error(one, other, torch.tensor([[1, 1, 0]]))) == pytest.approx((1 + 2) / 2)
    assert float(hidden_error(one, other)) == pytest.approx((1 + 2 + 81) / 3)


def test_layers_are_matched_evenly():
    names = [f"layer.{k}" for k in range(6)]
    assert evenly(names, ["a", "b", "c"]) == {"layer.1": "a", "layer.3": "b", "layer.5": "c"}
    assert evenly(names, ["a"]) == {"layer.5": "a"}
    with pytest.raises(RequestError, match="7 of the student cannot be matched to 6"):
        evenly(names, list("abcdefg"))


# Learning


def test_logits_follow_the_teacher_and_need_no_labels():
    teacher, student = net(32), net(8, seed=1)
    losses = fit(student, lambda epoch: batches(), Lesson(teacher, [Logits(2.0)]), epochs=10, lr=1e-2)
    assert losses[-1] < losses[0] / 4
    x = batches()[0]
    with torch.no_grad():
        target, logs = (teacher(x) / 2).log_softmax(-1), (student(x) / 2).log_softmax(-1)
    expected = 4 * float((target.exp() * (target - logs)).sum(-1).mean())
    assert float(Lesson(teacher, [Logits(2.0)])(student, x)) == pytest.approx(expected, rel=1e-5)


def test_maps_are_trained_with_the_student_and_dropped():
    teacher, student = net(32), net(8, seed=1)
    lesson, before = Lesson(teacher, [HiddenStates({"0": "0"})]), set(student.state_dict())
    with lesson.maps(student, batches()[0]):
        (learned,) = [p for name, p in student.named_parameters() if name not in before]
        start = learned.detach().clone()
        losses = fit(student, lambda epoch: batches(), lesson, epochs=10, lr=1e-2)
        assert not torch.equal(learned, start) and learned.shape == (32, 8)
    assert losses[-1] < 0.7 * losses[0] and set(student.state_dict()) == before


def test_maps_are_dropped_when_training_fails():
    teacher, student = net(32), net(8, seed=1)
    lesson = Lesson(teacher, [HiddenStates({"0": "0"})])
    with pytest.raises(KeyError), lesson.maps(student, batches()[0]):
        raise KeyError
    assert len(list(student.children())) == 3


def test_outputs_are_those_before_a_layer_that_changes_them_in_place():
    teacher, x = net(8), batches()[0]
    with torch.no_grad(), outputs_within(teacher, ["0"]) as seen:
        teacher(x)
    assert float(seen["0"].min()) < 0


@pytest.mark.parametrize("fused", [False, True])
def test_relations_are_learned_by_a_student_of_other_width(fused):
    torch.manual_seed(0)
    teacher, student, batch = Encoder(12), Encoder(6, fused=fused), tokens()
    lesson = Lesson(teacher, [Relations(heads=3)])
    both, first = (Lesson(teacher, [Relations(3, related=part)]) for part in ((VALUES,), (ATTENTION,)))
    assert torch.allclose(lesson(student, batch), both(student, batch) + first(student, batch))
    losses = fit(student, lambda epoch: [batch] * 10, lesson, epochs=10, lr=2e-2)
    assert losses[-1] < losses[0] / 3


def test_channels_are_learned_through_a_convolution():
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Conv2d(1, k, 3), nn.ReLU(), nn.Conv2d(k, 2, 1)) for k in (8, 3))
    images = list(torch.randn(64, 1, 8, 8).split(16))
    lesson = Lesson(teacher, [Channels({"0": "0", "2": "2"}, temperature=2.0)])
    with lesson.maps(student, images[0]):
        losses = fit(student, lambda epoch: images, lesson, epochs=20, lr=1e-2)
    assert losses[-1] < losses[0] / 2


def test_the_sum_is_weighted_and_a_term_without_weight_equals_the_first():
    teacher, student = net(8), net(8, seed=1)
    x, y = batches()[0], torch.arange(32) % 5
    logits, hidden = Logits(1.0), HiddenStates({"1": "1"}, weight=0.25)
    parts = [Lesson(teacher, [term])(student, x) for term in (logits, hidden)]
    whole = Lesson(teacher, [logits, hidden], cross_entropy)(student, (x, y))
    assert torch.allclose(whole, cross_entropy(student, (x, y)) + parts[0] + parts[1])
    balanced = Lesson(teacher, [logits, HiddenStates({"1": "1"}, weight=None)])(student, x)
    assert torch.allclose(balanced, 2 * parts[0])
    with pytest.raises(RequestError, match="its first term needs a weight"):
        Lesson(teacher, [Logits(weight=None)])


def test_a_teacher_that_is_remembered_runs_once_for_each_batch():
    teacher, student = net(8), net(8, seed=1)
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    plain = Lesson(teacher, [Logits(), HiddenStates({"0": "0"})])
    kept = Lesson(teacher, [Logits(), HiddenStates({"0": "0"})], remember=torch.float32)
    expected = [float(plain(student, x)) for x in batches(2)]
    calls.clear()
    for _ in range(3):
        assert [float(kept(student, x.clone())) for x in batches(2)] == pytest.approx(expected)
    assert len(calls) == 2


def test_batches_that_differ_anywhere_are_remembered_apart():
    transformers = pytest.importorskip("transformers")

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x, scale=1.0, deep=None):
            return self.inner(x) * scale + (0.0 if deep is None else deep["shift"][0])

    torch.manual_seed(0)
    teacher, student, x = Scaled(), Scaled(), torch.randn(5, 4)
    plain, kept = Lesson(teacher, [Logits()]), Lesson(teacher, [Logits()], remember=torch.float32)
    shifts = [{"x": x, "deep": {"shift": [torch.arange(3.0) * k]}} for k in (1, 2)]
    batches = [{"x": x, "scale": 2.0}, {"x": x, "scale": 3.0}, {"x": 2 * x}, *shifts]
    for batch in [kind(part) for kind in (dict, transformers.BatchEncoding) for part in batches]:
        with torch.no_grad():
            assert float(kept(student, batch)) == pytest.approx(float(plain(student, batch)))
    with pytest.raises(RequestError, match="cannot be remembered, since the content of object is not known"):
        kept(student, {"x": x, "note": object()})


def test_phases_follow_each_other():
    teacher, student = net(32), net(8, seed=1)
    inner, outer = Lesson(teacher, [HiddenStates({"1": "1"})]), Lesson(teacher, [Logits()])
    losses = teach(student, lambda epoch: batches(), [Phase(inner, 2, 1e-2), Phase(outer, 3, 1e-2)])
    assert [len(part) for part in losses] == [2, 3] and all(part[-1] < part[0] for part in losses)
    assert len(list(student.children())) == 3


# Bad input


def test_a_name_that_matches_nothing_is_told_with_those_that_are_near():
    with pytest.raises(RequestError, match=r"Encoder: has no module 'k_porj'.*'k_proj'"):
        Lesson(Encoder(6), [HiddenStates({"k_porj": "k_proj"})])(Encoder(6), tokens())


def test_a_module_that_does_not_run_is_told():
    student = Encoder(6)
    student.extra = nn.Linear(2, 2)
    with pytest.raises(RequestError, match="'extra' did not run"):
        Lesson(Encoder(6), [HiddenStates({"q_proj": "extra"})])(student, tokens())


def test_other_classes_and_vocabularies_are_told():
    with pytest.raises(RequestError, match="the teacher has 5 and the student 4"):
        Lesson(net(8), [Logits()])(net(8, classes=4), batches()[0])
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    teacher, student = (transformers.BertModel(transformers.BertConfig(vocab_size=n, **sizes)) for n in (30, 25))
    with pytest.raises(RequestError, match="the teacher knows 30 tokens and the student 25"):
        Lesson(teacher, [Relations(2)])(student, tokens())


def test_other_lengths_of_sequences_are_told():
    with pytest.raises(RequestError, match=r"\(4, 7\) and the student \(4, 4\); both must read the same tokens"):
        Lesson(Encoder(6), [Relations(3)])(Encoder(6, stride=2), tokens())
    with pytest.raises(RequestError, match=r"teacher has \[4, 7\] places and the student \[4, 4\]"):
        Lesson(Encoder(6), [HiddenStates({"q_proj": "q_proj"})])(Encoder(6, stride=2), tokens())
    with pytest.raises(RequestError, match="both must predict the same positions"):
        Lesson(Encoder(6), [Logits()])(Encoder(6, stride=2), tokens())


def test_other_widths_without_maps_are_told():
    with pytest.raises(RequestError, match=r"widths are 8 in the teacher and 4 in the student.*lesson.maps"):
        Lesson(net(8), [HiddenStates({"0": "0"})])(net(4), batches()[0])


def test_heads_and_layers_that_there_are_not_are_told():
    with pytest.raises(RequestError, match="a width of 6 cannot be split into 4 heads"):
        Lesson(Encoder(6), [Relations(4)])(Encoder(6), tokens())
    with pytest.raises(RequestError, match=r"has 1 self-attention layers.*no layer 1"):
        Lesson(Encoder(6), [Relations(3, teacher=1)])(Encoder(6), tokens())
    with pytest.raises(RequestError, match="has 0 self-attention layers"):
        Lesson(net(8), [Relations(2)])(net(8), batches()[0])
    with pytest.raises(RequestError, match="names no two of query, key, value"):
        Relations(2, related=(("query", "keys"),))


def test_what_is_no_map_of_features_is_told():
    with pytest.raises(RequestError, match=r"shape \(32, 8\) is no map of features"):
        Lesson(net(8), [Channels({"0": "0"})])(net(8), batches()[0])


class Words:
    """A tokenizer that splits at spaces, or into letters."""

    def __init__(self, known, letters=False):
        self.known, self.letters = known, letters

    def get_vocab(self):
        return dict(self.known)

    def __call__(self, text):
        parts = list(text) if self.letters else text.split()
        return {"input_ids": [self.known.get(part, 0) for part in parts]}


def test_other_tokenizers_are_told():
    known = {"<unk>": 0, "The": 1, "e": 2}
    same_tokens(Words(known), Words(known))
    with pytest.raises(RequestError, match="number 1 of 3 tokens differently, such as 'e' \\(2 and 3\\)"):
        same_tokens(Words(known), Words({**known, "e": 3}))
    with pytest.raises(RequestError, match="one vocabulary but split a text"):
        same_tokens(Words(known), Words(known, letters=True))


def test_maps_leave_the_student_as_it_was():
    torch.manual_seed(0)
    teacher, student = (
        nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 5))
        for width in (16, 4)
    )
    student[1].eval()
    before, modes = copy.deepcopy(student.state_dict()), [part.training for part in student.modules()]
    lesson = Lesson(teacher, [HiddenStates({"1": "1"})])
    with lesson.maps(student, torch.randn(8, 6)):
        pass
    assert [part.training for part in student.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    student.train()
    with lesson.maps(student, torch.randn(8, 6)):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
