"""Vocabularies in GGUF: tokens, their kinds, merges, and which of llama.cpp's pre-tokenizers splits text.

A GGUF file that is a source already has all of this, which is copied. A folder of ``transformers`` has it in
``tokenizer.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.errors import RequestError
from octavo.runtimes.gguf.architectures import require_gguf

_NORMAL, _CONTROL, _USER, _UNUSED, _BYTE = 1, 3, 4, 5, 6
#: A score at which llama.cpp never merges two pieces.
_NEVER = -1e9


def copy_metadata(writer: Any, file: Path) -> None:
    """Everything that a GGUF file says of its model, but for the types of its tensors."""
    gguf = require_gguf()
    for name, field in gguf.GGUFReader(file).fields.items():
        if name.startswith(("GGUF.", "split.")) or name in (
            "general.architecture",
            "general.file_type",
            "general.quantization_version",
        ):
            continue
        kind = field.types[0]
        writer.add_key_value(name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)


def add_vocabulary(writer: Any, folder: Path, size: int) -> bool:
    """Write the vocabulary of a folder of ``transformers``.

    Parameters
    ----------
    size
        Rows of the embedding: a vocabulary with fewer tokens is padded.

    Returns
    -------
    bool
        Whether there is one; without it, llama.cpp runs the model on token numbers only.

    Raises
    ------
    RequestError
        If it cannot be written for llama.cpp, or has more tokens than the embedding.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        if any(folder.glob("tokenizer*")) or (folder / "vocab.json").exists():
            raise RequestError(
                f"{folder}: has a tokenizer but no tokenizer.json; save it again with "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        writer.add_tokenizer_model("no_vocab")
        return False
    data = json.loads(file.read_text(encoding="utf-8"))
    model = data["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise RequestError(
            f"{file}: a tokenizer of type {model.get('type')!r} cannot be written for llama.cpp yet; give a GGUF "
            "file of the model, whose tokenizer is copied"
        )
    tokens, kinds = _tokens(data, file, size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(tokens, kinds, merges))
        writer.add_add_space_prefix(bool(_prepends(data)))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitter(data.get("pre_tokenizer") or {}, file))
        writer.add_token_list(tokens)
        writer.add_token_merges(merges)
    writer.add_token_types(kinds)
    require_gguf().SpecialVocab(folder, load_merges=False, n_vocab=size).add_to_gguf(writer, quiet=True)
    return True


def _tokens(data: Mapping[str, Any], file: Path, size: int) -> tuple[list[str], list[int]]:
    vocabulary, added = data["model"]["vocab"], data.get("added_tokens", [])
    count = max([*vocabulary.values(), *(token["id"] for token in added)]) + 1
    if count > size:
        raise RequestError(
            f"{file}: has {count} tokens, and the embedding {size} rows; give the tokenizer of this model"
        )
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [_UNUSED] * size
    for token, number in vocabulary.items():
        is_byte = len(token) == 6 and token.startswith("<0x") and data["model"].get("byte_fallback")
        tokens[number], kinds[number] = token, _BYTE if is_byte else _NORMAL
    for token in added:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = _CONTROL if token["special"] else _USER
    return tokens, kinds


def _scores(tokens: list[str], kinds: list[int], merges: list[str]) -> list[float]:
    """Scores at which llama.cpp merges pieces in the order of the merges."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair.replace(" ", "", 1), rank)
    found = []
    for token, kind in zip(tokens, kinds, strict=True):
        if kind != _NORMAL or len(token) == 1:
            found.append(0.0)
        else:
            found.append(-float(ranks[token]) if token in ranks else _NEVER)
    return found


def _prepends(data: Mapping[str, Any]) -> bool:
    return '"Prepend"' in json.dumps([data.get("normalizer"), data.get("pre_tokenizer")])


def _splitter(rule: Mapping[str, Any], file: Path) -> str:
    """The name of llama.cpp's pre-tokenizer that splits text in the same way."""
    words = json.dumps(rule, ensure_ascii=False)
    if "\\\\p{N}{1,3}" in words and "(?i:" in words:
        return "llama-bpe"
    if "(?i:" in words and "|\\\\p{N}|" in words:
        return "qwen2"
    if '"Digits"' in words and '"individual_digits": true' in words:
        return "smollm"
    if rule.get("type") == "ByteLevel" and rule.get("use_regex", True):
        return "gpt-2"
    raise RequestError(
        f"{file}: splits text in a way that llama.cpp is not known to have; --for gguf knows that of GPT-2, SmolLM, "
        "Llama 3 and Qwen 2. Give a GGUF file of the model, whose tokenizer is copied"
    )
