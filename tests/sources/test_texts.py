"""Files of calibration texts as people have them."""

import json
from pathlib import Path

import pytest

import octavo
from octavo.sources.texts import cleaned, read_texts

TEXTS = [f"Sentence number {k} of the file." for k in range(12)]


def lines(texts: list[str]) -> str:
    return "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)


def written(folder: Path, name: str, content: str, encoding: str = "utf-8") -> Path:
    (folder / name).write_bytes(content.encode(encoding, "surrogatepass"))
    return folder / name


READ: dict[str, tuple[str, str]] = {
    "plain": ("t.txt", "\n".join(TEXTS)),
    "marked": ("t.txt", "\ufeff" + "\n".join(TEXTS)),
    "windows": ("t.TXT", "\r\n".join(TEXTS)),
    "lines": ("t.jsonl", lines(TEXTS)),
    "marked lines": ("t.jsonl", "\ufeff" + lines(TEXTS)),
    "windows lines": ("t.jsonl", lines(TEXTS).replace("\n", "\r\n") + "\r\n\r\n"),
    "upper case": ("t.JSONL", lines(TEXTS)),
    "ndjson": ("t.ndjson", lines(TEXTS)),
    "upper ndjson": ("t.NDJSON", lines(TEXTS)),
    "strings": ("t.jsonl", "\n".join(map(json.dumps, TEXTS))),
    "list": ("t.json", json.dumps([{"text": text, "label": 1} for text in TEXTS], indent=1)),
    "list of strings": ("t.JSON", "\ufeff" + json.dumps(TEXTS)),
    "lines called json": ("t.json", lines(TEXTS)),
    "csv": ("t.csv", "label,text\n" + "\n".join(f'1,"{text}"' for text in TEXTS)),
    "marked csv": ("t.CSV", "\ufefftext,label\r\n" + "\r\n".join(f"{text},1" for text in TEXTS)),
    "csv by its first words": ("t.csv", "id,sentence,topic\n" + "\n".join(f"{k},{t},x" for k, t in enumerate(TEXTS))),
    "csv of Europe": ("t.csv", "id;Text\n" + "\n".join(f"{k};{text}" for k, text in enumerate(TEXTS))),
    "tsv": ("t.tsv", "text\tlabel\n" + "\n".join(f"{text}\t1" for text in TEXTS)),
}


@pytest.mark.parametrize("case", READ)
def test_files_are_read(tmp_path: Path, case: str) -> None:
    assert read_texts(written(tmp_path, *READ[case])) == TEXTS


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_separators_inside_of_strings_divide_nothing(tmp_path: Path, separator: str) -> None:
    texts = [f"{text}{separator}more" for text in TEXTS]
    assert read_texts(written(tmp_path, "t.jsonl", lines(texts))) == texts
    assert read_texts(written(tmp_path, "u.jsonl", "\n".join(json.dumps({"text": text}) for text in texts))) == texts
    quoted = "text,label\n" + "\n".join(f'"{text}",1' for text in texts)
    assert read_texts(written(tmp_path, "t.csv", quoted)) == texts


def test_lines_inside_of_cells(tmp_path: Path) -> None:
    rows = "text,label\n" + "\n".join(f'"{text}\nand ""so"" on, and on",1' for text in TEXTS)
    assert read_texts(written(tmp_path, "t.csv", rows)) == [f'{text}\nand "so" on, and on' for text in TEXTS]


@pytest.mark.parametrize("half", ["\\ud83d", "\\udc00", "\\udc00\\ud83d"])
def test_halves_of_characters_are_replaced(tmp_path: Path, half: str) -> None:
    found = read_texts(written(tmp_path, "t.jsonl", f'{{"text": "a {half} b"}}\n' * 12))
    assert found == ["a " + "\ufffd" * (len(half) // 6) + " b"] * 12
    assert cleaned(["a \ud83d b", "a \ud83d\ude00 b", "zażółć"]) == ["a \ufffd b", "a \U0001f600 b", "zażółć"]


FINE = '{"text": "fine"}'
REFUSED: dict[str, tuple[str, str, str]] = {
    "deep": ("t.jsonl", "[" * 100_000, "line 1 is not JSON of texts: it nests too deeply"),
    "deep later": ("t.ndjson", f"{FINE}\n{FINE}\n{'[' * 100_000}", "line 3 is not JSON of texts: it nests too deeply"),
    "deep list": ("t.json", "[" * 100_000, "is not JSON of texts: it nests too deeply"),
    "no object": ("t.jsonl", f"{FINE}\n[1]\n", "line 2 has no string under 'text'"),
    "bad line called json": ("t.json", f"{FINE}\n{{\n", "line 2 is not JSON"),
    "one object": ("t.json", json.dumps({"rows": [FINE]}), "holds no list"),
    "bad entry": ("t.json", json.dumps(["fine", {"words": "no"}]), "entry 2 has no string under 'text'"),
    "numbers": ("t.csv", "a,b\n" + "1,2\n" * 12, "no column holds text"),
    "short row": ("t.csv", "id,text\n1,fine\n2\n", "line 3 has 1 columns, but the text is in column 2"),
    "open quote": ("t.csv", 'id,text\n1,"fine\n' + "2,fine\n" * 12, "cannot be read as a table"),
    "empty": ("t.csv", "", "0 calibration texts"),
    "long cell": ("t.csv", "text\n" + "a" * 200_000, "line 2 cannot be read as a table"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_files_are_refused_by_line(tmp_path: Path, case: str) -> None:
    name, content, says = REFUSED[case]
    with pytest.raises(octavo.RequestError) as found:
        read_texts(written(tmp_path, name, content))
    assert str(found.value).startswith(f"{tmp_path / name}: ") and says in str(found.value)


def test_another_encoding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(octavo.RequestError, match="cannot be read as UTF-8 text"):
        read_texts(written(tmp_path, "t.csv", "text\n" + "\n".join(TEXTS), "utf-16"))


def write_xlnet(folder: Path) -> None:
    from transformers import XLNetConfig, XLNetModel

    XLNetModel(XLNetConfig(vocab_size=100, d_model=32, n_layer=1, n_head=2, d_inner=64)).save_pretrained(folder)


@pytest.mark.parametrize("longest", [-1, 0, None])
def test_a_context_of_minus_one_is_no_limit(longest: int | None) -> None:
    from torch import nn
    from transformers import PreTrainedConfig

    from octavo.sources.tokens import context_of

    module = nn.Linear(2, 2)
    config = PreTrainedConfig()
    config.max_position_embeddings = longest
    module.config = config
    assert context_of(module) == 2**31


def test_xlnet_takes_sequences(tmp_path: Path) -> None:
    import torch

    write_xlnet(tmp_path / "xlnet")
    tokens = torch.randint(5, 100, (24, 12))
    batches = [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}]
    assert octavo.compress(tmp_path / "xlnet", ratio=3, data=batches, preset="fast", methods=["rtn"]).ratio >= 3
