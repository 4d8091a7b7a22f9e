"""The suite of knowledge: questions, their scores by likelihood, and the command."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from typer.testing import CliRunner

import octavo
from octavo.cli import app
from octavo.errors import RequestError
from octavo.training import fit, next_token
from octavo.verification.knowledge import (
    Fact,
    Question,
    answered,
    builtin_facts,
    closed_book,
    encoder_of,
    in_context,
    read_facts,
    scored,
    summaries,
)

TEMPLATES = ("the colour of {} is", "the home of {} is")
ANSWERS = (("red", "blue", "green", "white"), ("paris", "rome", "oslo", "kiev"))
FACTS = [
    Fact(
        TEMPLATES[number % 2], f"thing{number}", ANSWERS[number % 2][number // 2 % 4], "known" if number < 8 else "new"
    )
    for number in range(16)
]


def write_facts(file: Path, facts=FACTS) -> Path:
    rows = [{"template": f.template, "subject": f.subject, "answer": f.answer, "label": f.label} for f in facts]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of a small decoder that learned the first eight facts by heart."""
    folder = tmp_path_factory.mktemp("model")
    words = sorted({word for f in FACTS for word in f"{f.prompt} {f.answer}".split()})
    vocabulary = {word: number for number, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=128,
        )
    )  # fmt: skip
    ids = torch.tensor([tokenizer.encode(f"{f.prompt} {f.answer}").ids for f in FACTS[:8]])
    fit(made, lambda epoch: [{"input_ids": ids}] * 60, next_token, lr=1e-2)
    made.save_pretrained(folder)
    return folder


def test_built_in_questions_are_sound():
    found = builtin_facts()
    assert len(found.facts) >= 90 and len(found.passages) == 16
    asked = {
        "facts": closed_book(found.facts),
        "context": in_context(found.facts),
        "summaries": summaries(found.passages),
    }
    assert {kind: len(questions) for kind, questions in asked.items()} == {
        "facts": len(found.facts), "context": len(found.facts), "summaries": 16,
    }  # fmt: skip
    for question in (one for questions in asked.values() for one in questions):
        assert len(set(question.answers)) == len(question.answers) >= 4
    for fact, question in zip(found.facts, asked["facts"], strict=True):
        assert question.prompt == fact.prompt and question.answers[0] == fact.answer
    assert closed_book(found.facts) == asked["facts"]  # drawn the same every time


def test_the_context_alone_holds_the_answer():
    subjects = {fact.subject for fact in FACTS}
    asked = in_context(FACTS, statements=3)
    assert len(asked) == len(FACTS) and any(q.answers[0] != f.answer for q, f in zip(asked, FACTS, strict=True))
    for question in asked:
        *lines, last = question.prompt.split("\n")
        assert len(lines) == 3 and f"{last} {question.answers[0]}." in lines
        assert set(question.answers) in map(set, ANSWERS)
        assert not subjects & set(question.prompt.split())


def test_other_right_answers_are_no_candidates():
    facts = [Fact("x {} is", "a", "one"), Fact("x {} is", "a", "two"), Fact("x {} is", "b", "three")]
    assert [set(question.answers) for question in closed_book(facts)] == [
        {"one", "three"}, {"two", "three"}, {"three", "one", "two"},
    ]  # fmt: skip


def test_scores_are_those_of_each_answer_alone(model):
    """Batching, padding and shared beginnings change nothing."""
    encode, made = encoder_of(model), transformers.AutoModelForCausalLM.from_pretrained(model)
    questions = [
        Question("the colour of thing0 is", ("red", "blue", "red red", "red the of")),
        Question("the home of thing1 is the home of", ("oslo the", "kiev", "oslo is"), bare="the"),
        Question("the", ("colour of thing0", "home")),
    ]

    def alone(prompt: str, answer: str) -> tuple[float, bool]:
        ids, begun = torch.tensor([encode(f"{prompt} {answer}")]), len(encode(prompt))
        logs = made(ids).logits[0].log_softmax(-1)[begun - 1 : -1]
        wanted = ids[0, begun:]
        return float(logs.gather(1, wanted[:, None]).sum()), bool((logs.argmax(1) == wanted).all())

    @torch.no_grad()
    def run(batches):
        return [made(**batch).logits.log_softmax(-1) for batch in batches]

    with torch.no_grad():
        for question, got in zip(questions, answered(questions, encode, run), strict=True):
            plain = [alone(question.prompt, answer)[0] for answer in question.answers]
            if question.bare is not None:
                plain = [a - alone(question.bare, answer)[0] for a, answer in zip(plain, question.answers, strict=True)]
            assert got.rank == sum(total >= plain[0] for total in plain)
            assert got.written == alone(question.prompt, question.answers[0])[1]


def test_equal_answers_are_ahead():
    run = lambda batches: [torch.zeros(*batch["input_ids"].shape, 9).log_softmax(-1) for batch in batches]  # noqa: E731
    (found,) = answered([Question("1", ("2", "3", "4"))], lambda text: list(map(int, text.split())), run)
    score = scored([found])
    assert found.rank == 3 and score.likeliest == 0 and score.reciprocal_rank == pytest.approx(1 / 3)


def test_a_model_knows_what_it_learned(model, tmp_path):
    found = octavo.evaluate(model, suite="knowledge", data=write_facts(tmp_path / "facts.jsonl"))
    known, new = found.labels["known"], found.labels["new"]
    assert (known.written, known.likeliest, known.questions, known.chance) == (1.0, 1.0, 8, 0.25)
    assert new.written < 0.7 and found.facts.questions == 16
    assert found.in_context.questions == 16 and found.in_context.written < 0.7  # it never learned to look
    assert found.summaries.written is None and math.isfinite(found.perplexity)


def test_artifacts_and_blocks_are_measured_alike(model, tmp_path, monkeypatch):
    facts = write_facts(tmp_path / "facts.jsonl")
    octavo.compress(model, ratio=1.5, preset="fast", methods=["keep"]).save(tmp_path / "folded")
    whole = octavo.evaluate(tmp_path / "folded", suite="knowledge", data=facts)
    assert whole.facts.written >= 0.5
    monkeypatch.setattr("octavo.sources.memory._SHARE", 0)
    blocks = octavo.evaluate(model, suite="knowledge", data=facts)
    assert blocks.labels["known"].written == 1.0


def test_the_command_shows_the_scores(model, tmp_path):
    facts = write_facts(tmp_path / "facts.jsonl")
    shown = CliRunner().invoke(app, ["evaluate", str(model), "--suite", "knowledge", "--data", str(facts)])
    assert shown.exit_code == 0 and "facts, known" in shown.stdout and "100.0%" in shown.stdout
    told = CliRunner().invoke(app, ["evaluate", str(model), "--suite", "knowledge", "--data", str(facts), "--json"])
    assert json.loads(told.stdout)["labels"]["known"]["written"] == 1.0


def test_tables_hold_facts_too(tmp_path):
    (tmp_path / "facts.csv").write_text("Template,subject,answer\nx {} is,a,one\n\nx {} is,b,two\n", encoding="utf-8")
    (tmp_path / "facts.jsonl").write_text(
        '{"template": "x {} is", "subject": "a", "answer": "one"}\n{"template": "x {} is", "subject": "b", "answer": '
        '"two"}\n{"passage": "Long.", "summary": "Short."}\n'
    )
    table, lines = read_facts(tmp_path / "facts.csv"), read_facts(tmp_path / "facts.jsonl")
    assert table.facts == lines.facts == (Fact("x {} is", "a", "one"), Fact("x {} is", "b", "two"))
    assert table.passages == builtin_facts().passages and len(lines.passages) == 1


def test_bad_facts_are_named(tmp_path):
    good = '{"template": "x {} is", "subject": "a", "answer": "one"}\n'
    for content, says in (
        ("not json\n", "line 1 is not JSON"),
        (good + "[1]\n", "line 2 is no object"),
        (good + '{"template": "x {} is", "subject": "a"}\n', "line 2: has no text under 'answer'"),
        (good + '{"template": "x is", "subject": "a", "answer": "b"}\n', "line 2: the template 'x is' needs {} once"),
        (good + '{"template": "x {}", "subject": " ", "answer": "b"}\n', "line 2: subject and answer"),
        (good + '{"passage": "x"}\n', "line 2: has no text under 'summary'"),
        (good, "has a single answer"),
        ("", "holds no facts"),
    ):
        file = tmp_path / "facts.jsonl"
        file.write_text(content)
        with pytest.raises(RequestError, match=says.replace("{", r"\{").replace("}", r"\}")):
            read_facts(file)


def test_bad_requests_are_refused(model, tmp_path):
    for options, says in (
        ({"suite": "beauty"}, "suite 'beauty' is not known"),
        ({"suite": "knowledge", "metric": "perplexity"}, "has its own measures"),
        ({"suite": "knowledge", "against": model}, "has its own measures"),
        ({"suite": "knowledge", "data": tmp_path / "missing.jsonl"}, "cannot be read"),
    ):
        with pytest.raises(RequestError, match=says):
            octavo.evaluate(model, **options)
    with pytest.raises(RequestError, match="nothing stands before it"):
        answered([Question("", ("a", "b"))], lambda text: [len(text)], lambda batches: [])
