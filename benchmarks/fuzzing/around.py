"""Changes of what lies around the weights: configuration, index, companions, links, devices and pickles."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

from fuzzing.draft import Draft, Inapplicable, mutation, pick
from fuzzing.trees import change_keys, change_number, change_value

#: Written if anything in an artifact is run.
CANARY = "ran-code"


class _Payload:
    """Leaves a trace when it is unpickled."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self) -> tuple:
        return (open, (self.place, "w"))


def _config(draft: Draft, rng: random.Random) -> tuple[str, dict[str, Any]]:
    name = "config.json"
    if name not in draft.others:
        raise Inapplicable("no model")
    return name, json.loads(draft.others[name])


def _put(draft: Draft, rng: random.Random, name: str, value: Any) -> None:
    """Write a file of JSON, which the manifest knows of or not."""
    draft.others[name] = json.dumps(value).encode()
    if rng.random() < 0.6:
        draft.sign_others()


@mutation("config: tree", alters=False, weight=10)
def _tree(draft: Draft, rng: random.Random) -> None:
    name, config = _config(draft, rng)
    rng.choice([change_value, change_number, change_keys])(config, rng)
    _put(draft, rng, name, config)


@mutation("config: known keys", alters=False, weight=14)
def _known(draft: Draft, rng: random.Random) -> None:
    name, config = _config(draft, rng)
    changes: dict[str, list] = {
        "auto_map": [{"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}, {"AutoModel": "x/y--evil.Model"}, [], "x", 7],
        "transformers_weights": ["evil.safetensors", "pytorch_model.bin", "../model.safetensors", "/etc/passwd", 7, [], "", "config.json"],
        "quantization_config": [None, {}, [], "octavo", 7, {"quant_method": "octavo", "packed": "x"}, {"quant_method": "octavo", "packed": True},
                                {"quant_method": "bitsandbytes", "load_in_8bit": True}, {"quant_method": "nothing"}, {"quant_method": 7},
                                {"quant_method": "gptq", "bits": 4}, {"quant_method": "octavo", "x": [1] * 1000}],
        "architectures": [None, [], ["Nothing"], "BertModel", 7, ["BertForMaskedLM"], ["GPT2Model"], ["__init__"], ["AutoModel"], [7], ["pipeline"]],
        "model_type": [None, "gpt2", "nothing", 7, [], "llama", "__class__", "encoder-decoder", "timm_wrapper"],
        "dtype": [None, "float16", "float64", "int8", "nothing", 7, [], "nn", "auto", "bool", "Tensor", "quint8", "complex64"],
        "torch_dtype": ["float16", "nothing", 7, []],
        "num_hidden_layers": [0, -1, 2, 3, 100_000, 10**9, 1.5, "x", None, 2**63],
        "hidden_size": [0, -1, 8, 25, 10**6, 2**31, 10**9, 2**63, "x", None],
        "vocab_size": [0, 1, 31, 33, 10**9, 2**40, 2**62, -1, "x"],
        "intermediate_size": [47, 10**9, 2**62, 0],
        "max_position_embeddings": [31, 10**9, 2**62, 0],
        "num_labels": [10**9, 10**7, -1, 0, "x", 2**40],
        "id2label": [{str(k): "x" for k in range(200_000)}, [], {"x": 1}, 7],
        "num_attention_heads": [0, 5, -1, 10**9, "x"],
        "hidden_act": ["nothing", "gelu", 7, ["gelu"], "__import__"],
        "_attn_implementation": ["kernels-community/flash-attn", "nothing", "eager", "flash_attention_2", 7],
        "attn_implementation": ["kernels-community/flash-attn", "x/y:z", "nothing", "eager", {"": "x/y"}, 7],
        "tie_word_embeddings": [True, False, 7, "x"],
        "is_encoder_decoder": [True],
        "is_decoder": [True],
        "add_cross_attention": [True],
        "use_kernels": [True],
        "base_model_tp_plan": [{"*": "colwise"}, 7],
        "_name_or_path": ["../x", "/etc", "x/y"],
        "custom_pipelines": [{"x": {"impl": "evil.X"}}],
        "pruned_heads": [{"0": [0]}, {"0": [0, 1, 2]}, 7],
        "text_config": [{}, 7, {"model_type": "gpt2"}],
        "transformers_version": ["999", 7],
    }  # fmt: skip
    for key in rng.sample(sorted(changes), rng.choice([1, 1, 1, 2])):
        config[key] = rng.choice(changes[key])
    if rng.random() < 0.15:
        config["add_cross_attention"] = config["is_decoder"] = True
    draft.others["evil.py"] = f"open({CANARY!r}, 'w')\nclass Model: pass\nclass Config: pass\n".encode()
    _beside(draft, rng)
    _put(draft, rng, name, config)


def _beside(draft: Draft, rng: random.Random) -> None:
    """Other weights than the artifact's."""
    name = rng.choice(
        [
            "pytorch_model.bin",
            "evil.safetensors",
            "model.bin",
            "adapter_model.bin",
            "adapter_model.safetensors",
            "model.fp16.safetensors",
        ]
    )
    if name.endswith(".bin"):
        draft.others[name] = pickle.dumps(_Payload(CANARY))
    else:
        draft.others[name] = _other_weights(draft)


def _other_weights(draft: Draft) -> bytes:
    """A file of tensors of the same names and shapes that hold other numbers."""
    import torch
    from safetensors.torch import save

    sites, kept = draft.manifest["sites"], draft.manifest["kept"]
    tensors = {name: torch.full(site["shape"], 0.5) for name, site in sites.items()}
    shapes = {name: entry for name, _, entry in draft._entries()}
    tensors.update({name: torch.full(shapes[name]["shape"], 0.5) for name in kept if name in shapes})
    return save(tensors)


@mutation("beside: weights", alters=False, weight=6)
def _weights(draft: Draft, rng: random.Random) -> None:
    _beside(draft, rng)
    if rng.random() < 0.3:
        _put(
            draft,
            "adapter_config.json",
            {"peft_type": "LORA", "base_model_name_or_path": rng.choice(["/etc", "x/y", None])},
        )
    if rng.random() < 0.5:
        _put(
            draft,
            "pytorch_model.bin.index.json",
            {"metadata": {}, "weight_map": dict.fromkeys(draft.names(), "pytorch_model.bin")},
        )
    if rng.random() < 0.3:
        _put(
            draft,
            "model.safetensors.index.json",
            {"metadata": {}, "weight_map": dict.fromkeys(draft.names(), "evil.safetensors")},
        )
        draft.others["evil.safetensors"] = _other_weights(draft)


@mutation("index: tree", alters=False, weight=5)
def _index(draft: Draft, rng: random.Random) -> None:
    name = pick(rng, [name for name in draft.others if name.endswith(".index.json")])
    index = json.loads(draft.others[name])
    weight_map = index["weight_map"]
    what = rng.choice(["tree", "omit", "evil", "outside", "all", "metadata", "none", "more", "shard"])
    if what == "tree":
        rng.choice([change_value, change_keys])(index, rng)
    elif what == "omit":
        del weight_map[rng.choice(list(weight_map))]
    elif what == "shard":
        gone = rng.choice(sorted(set(weight_map.values())))
        index["weight_map"] = {key: file for key, file in weight_map.items() if file != gone}
    elif what in ("evil", "outside"):
        weight_map[rng.choice(list(weight_map))] = {
            "evil": "evil.safetensors",
            "outside": rng.choice(["../evil.safetensors", "/dev/zero"]),
        }[what]
        draft.others["evil.safetensors"] = _other_weights(draft)
    elif what == "all":
        index["weight_map"] = dict.fromkeys(weight_map, "evil.safetensors")
        draft.others["evil.safetensors"] = _other_weights(draft)
    elif what == "metadata":
        index["metadata"] = rng.choice([None, [], 7, {"total_size": -1}, {"total_size": 10**18}, {"total_size": "x"}])
    elif what == "more":
        weight_map["x"] = rng.choice(sorted(set(weight_map.values())))
    else:
        index["weight_map"] = {}
    _put(draft, rng, name, index)


@mutation("index: where none was", alters=False, weight=3)
def _new_index(draft: Draft, rng: random.Random) -> None:
    if any(name.endswith(".index.json") for name in draft.others):
        raise Inapplicable("there is one")
    file = rng.choice(["evil.safetensors", "model.safetensors", "../x.safetensors"])
    _put(draft, rng, "model.safetensors.index.json", {"metadata": {}, "weight_map": dict.fromkeys(draft.names(), file)})
    draft.others["evil.safetensors"] = _other_weights(draft)


NAMES = ["config.json", "report.json", "modules.json", "config_sentence_transformers.json", "tokenizer.json", "tokenizer_config.json",
         "generation_config.json", "model.safetensors.index.json", "1_Pooling/config.json", "2_Dense/config.json", "adapter_config.json",
         "sentence_bert_config.json", "special_tokens_map.json", "README.md", "processor_config.json", "chat_template.jinja",
         "report.html", "quantize_config.json", "hf_quant_config.json", "params.json"]  # fmt: skip


def _some_companion(draft: Draft, rng: random.Random) -> str:
    there = [name for name in NAMES if name in draft.others]
    return rng.choice(there) if there and rng.random() < 0.8 else rng.choice(NAMES)


@mutation("companion: device or link", alters=False, weight=8)
def _device(draft: Draft, rng: random.Random) -> None:
    counted = [*draft.files, "octavo.json"]
    name = _some_companion(draft, rng) if rng.random() < 0.75 else rng.choice(counted)
    what = rng.choice(["fifo", "zero", "loop", "nothing", "folder", "outside", "random", "parent"])

    def replace(folder: Path) -> None:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        moved = folder.parent / "outside"
        if place.exists():
            place.rename(moved)
        if what == "fifo":
            os.mkfifo(place)
        elif what == "folder":
            place.mkdir()
        elif what == "parent" and place.parent != folder:
            place.parent.rename(folder.parent / "outside-folder")
            place.parent.symlink_to(folder.parent / "outside-folder")
        else:
            target = {
                "zero": "/dev/zero",
                "random": "/dev/urandom",
                "loop": str(place),
                "nothing": str(folder / "gone"),
                "outside": str(moved),
            }
            place.symlink_to(target.get(what, str(moved)))

    draft.after.append(replace)


@mutation("companion: content", alters=False, weight=8)
def _content(draft: Draft, rng: random.Random) -> None:
    name = _some_companion(draft, rng)
    old = draft.others.get(name, b"{}")
    count = rng.choice([100, 20_000, 1_000_000])
    draft.others[name] = rng.choice([
        lambda: b"", lambda: b"null", lambda: b"[]", lambda: b"7", lambda: b"{", lambda: b"\xff\xfe\x00", lambda: old[: len(old) // 2],
        lambda: b"[" * count + b"]" * count, lambda: b'{"a":' * count + b"1" + b"}" * count, lambda: b"{}" * count,
        lambda: b'{"x":[' + b"{}," * count + b"{}]}", lambda: old + b" " * count, lambda: b'{"x":' + b"9" * count + b"}",
        lambda: old.replace(b'"', b"'", 1), lambda: b"\0" * count, lambda: b"\xef\xbb\xbf" + old, lambda: b'"' + b"x" * count + b'"',
    ])()  # fmt: skip
    if rng.random() < 0.6:
        draft.sign_others()


@mutation("companion: tree", alters=False, weight=8)
def _companion_tree(draft: Draft, rng: random.Random) -> None:
    name = pick(rng, [name for name in NAMES if name in draft.others and name.endswith(".json")])
    try:
        tree = json.loads(draft.others[name])
    except ValueError as error:
        raise Inapplicable(name) from error
    if not tree:
        raise Inapplicable("an empty tree")
    rng.choice([change_value, change_number, change_keys])(tree, rng)
    _put(draft, rng, name, tree)


@mutation("companion: modules", alters=False, weight=3)
def _modules(draft: Draft, rng: random.Random) -> None:
    if "modules.json" not in draft.others:
        raise Inapplicable("no encoder")
    modules = json.loads(draft.others["modules.json"])
    entry = rng.choice(modules)
    what = rng.choice(["type", "path", "drop", "many"])
    if what == "type":
        entry["type"] = rng.choice(["evil.Model", "os.system", "sentence_transformers.models.Normalize", "", 7, None, "builtins.eval",
                                    "sentence_transformers.sentence_transformer.modules.WordEmbeddings", "torch.nn.Linear"])  # fmt: skip
        draft.others["evil.py"] = f"open({CANARY!r}, 'w')\nclass Model: pass\n".encode()
    elif what == "path":
        entry["path"] = rng.choice(["..", "../x", "/etc", "x/y", "", "\x00", "2_Dense", 7, None, "a" * 5000])
    elif what == "drop":
        modules.remove(entry)
    else:
        modules *= rng.choice([2, 300])
    _put(draft, rng, "modules.json", modules)


@mutation("nothing", alters=False, weight=1)
def _nothing(draft: Draft, rng: random.Random) -> None:
    """The honest artifact, signed again."""
