"""Changes of JSON as a tree: the manifest's, and with the same functions the configuration's."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from fuzzing.draft import Draft, Inapplicable, mutation, pick
from octavo import forms
from octavo.coding.container import CHUNK

NUMBERS: list[Any] = [
    0, 1, -1, 2, 3, 7, 8, 64, 255, 256, 1023, 1024, 65536, 10**6, 2**24, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**62 - 1,
    2**63 - 1, 2**63, 2**64, 10**30, 1.5, 1e308, 0.0, -0.0, True, False,
]  # fmt: skip
JUNK: list[Callable[[], Any]] = [
    *[lambda value=value: value for value in NUMBERS],
    lambda: None, lambda: "", lambda: "x", lambda: "grid", lambda: "../model.safetensors", lambda: "\x1b[31mred\x00",
    lambda: "[/b]", lambda: "\ud800", lambda: "a" * 100_000, lambda: [], lambda: {}, lambda: [[]], lambda: {"form": "grid"},
    lambda: [1] * 150_000, lambda: [0] * 65, lambda: [2**40, 2**40], lambda: float("nan"), lambda: float("inf"),
    lambda: nested({}, 60), lambda: nested([], 60), lambda: "float8_e4m3fn", lambda: "int64", lambda: "complex64",
]  # fmt: skip


def nested(value: Any, depth: int) -> Any:
    """A value inside so many of its kind."""
    for _ in range(depth):
        value = [value] if isinstance(value, list) else {"a": value}
    return value


def paths(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """The way to every value within."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*at, key)
        yield from paths(value[key], (*at, key))


def holder(tree: Any, path: tuple) -> Any:
    """What holds the value at the end of a path."""
    for key in path[:-1]:
        tree = tree[key]
    return tree


def somewhere(tree: Any, rng: random.Random) -> tuple:
    """A path, by chance at each level, so that few long lists do not draw all of it."""
    path: tuple = ()
    while isinstance(tree, dict | list) and tree:
        key = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        path, tree = (*path, key), tree[key]
        if rng.random() < 0.15:
            break
    if not path:
        raise Inapplicable("an empty tree")
    return path


def change_value(tree: Any, rng: random.Random) -> None:
    """Another value in a place of any kind."""
    path = somewhere(tree, rng)
    holder(tree, path)[path[-1]] = rng.choice(JUNK)()


def change_number(tree: Any, rng: random.Random) -> None:
    """Another number in place of a number: near it, of another magnitude, or odd."""
    numbers = [path for path in paths(tree) if type(holder(tree, path)[path[-1]]) in (int, float)]
    path = pick(rng, numbers)
    old = holder(tree, path)[path[-1]]
    near = [old + 1, old - 1, old * 2, old // 2, -old, old * 1000, old + 0.5, float(old), str(old)]
    holder(tree, path)[path[-1]] = rng.choice(near if rng.random() < 0.5 else NUMBERS)


def change_keys(tree: Any, rng: random.Random) -> None:
    """A key removed, renamed, doubled, or two values exchanged."""
    path = somewhere(tree, rng)
    inside, key = holder(tree, path), path[-1]
    what = rng.choice(["remove", "double", "exchange", "rename", "empty"])
    if what == "remove":
        del inside[key]
    elif what == "empty":
        inside[key] = type(inside[key])() if isinstance(inside[key], dict | list | str) else None
    elif isinstance(inside, list):
        other = rng.randrange(len(inside))
        inside[key], inside[other] = inside[other], inside[key]
        if what == "double":
            inside *= rng.choice([2, 50])
    elif what == "exchange":
        other = rng.choice(list(inside))
        inside[key], inside[other] = inside[other], inside[key]
    else:
        name = rng.choice(
            [f"{key}x", "x", "", f"{key}/", "../x", "\x1b[2J", "layer[/b].weight", "__metadata__", "a" * 9000]
        )
        inside[name] = copy.deepcopy(inside[key])
        if what == "rename":
            del inside[key]


@mutation("manifest: value", weight=10)
def _value(draft: Draft, rng: random.Random) -> None:
    change_value(draft.manifest, rng)


@mutation("manifest: number", weight=10)
def _number(draft: Draft, rng: random.Random) -> None:
    key = pick(rng, [key for key, value in draft.manifest.items() if value and isinstance(value, dict)])
    change_number(draft.manifest[key], rng)


@mutation("manifest: keys", weight=8)
def _keys(draft: Draft, rng: random.Random) -> None:
    change_keys(draft.manifest, rng)


@mutation("manifest: several", weight=6)
def _several(draft: Draft, rng: random.Random) -> None:
    for _ in range(rng.randrange(2, 5)):
        rng.choice([change_value, change_number, change_keys])(draft.manifest, rng)


def form_of(draft: Draft, rng: random.Random) -> tuple[dict, dict]:
    """A site, and one of the forms in it."""
    site = pick(rng, draft.manifest["sites"].values())
    found = [
        holder(site, path)[path[-1]]
        for path in paths(site)
        if (path[0] == "form" and path[-1] != "form") or path == ("form",)
    ]
    return site, pick(rng, [item for item in found if isinstance(item, dict) and "form" in item])


@mutation("form: number", weight=12)
def _form_number(draft: Draft, rng: random.Random) -> None:
    _, form = form_of(draft, rng)
    change_number(form, rng)


@mutation("form: kind", weight=6)
def _form_kind(draft: Draft, rng: random.Random) -> None:
    _, form = form_of(draft, rng)
    form["form"] = rng.choice(forms.form_names())


@mutation("form: another's", weight=4)
def _form_of_another(draft: Draft, rng: random.Random) -> None:
    (_, one), (_, other) = form_of(draft, rng), form_of(draft, rng)
    meta = copy.deepcopy(other)
    one.clear()
    one.update(meta)


@mutation("form: inside itself", weight=2)
def _form_in_itself(draft: Draft, rng: random.Random) -> None:
    site, _ = form_of(draft, rng)
    child = {"sum": "base", "scaled": "base", "cut": "inner", "lowrank": "left", "sparse": "values"}
    for _ in range(rng.choice([1, 2, 6, 7, 40, 300])):
        kind = rng.choice(list(child))
        site["form"] = {"form": kind, "rank": 2, "kept": 3, child[kind]: site["form"]}


@mutation("form: long list", weight=3)
def _long_list(draft: Draft, rng: random.Random) -> None:
    lists = [path for path in paths(draft.manifest) if isinstance(holder(draft.manifest, path)[path[-1]], list)]
    found = holder(draft.manifest, path := pick(rng, lists))[path[-1]]
    found[rng.randrange(len(found) + 1) :] = [rng.choice([1, 2, 3, 1 << 20, -1])] * rng.choice(
        [30, 32, 33, 64, 150_000]
    )


@mutation("form: shape", weight=8)
def _shape(draft: Draft, rng: random.Random) -> None:
    site = pick(rng, draft.manifest["sites"].values())
    shape = site["shape"]
    what = rng.choice(["one", "turn", "split", "huge", "exponent", "layout", "dtype"])
    if what == "one":
        shape[rng.randrange(len(shape))] = rng.choice([0, 1, 2, 17, 1 << 12, 1 << 20, 1 << 24, 1 << 33])
    elif what == "turn":
        shape.reverse()
    elif what == "split":
        shape[:] = [shape[0], *[1] * rng.randrange(1, 40), *shape[1:]]
    elif what == "huge":
        shape[:] = rng.choice(
            [[1, 1 << 24], [1 << 24, 1], [4096, 4096], [1 << 12, 1 << 13], [3000] * 2, [1 << 31, 1 << 31]]
        )
    elif what == "exponent":
        site["layout"] = [*site.get("layout", ["rows_first", 1])[:2], rng.choice([1, -1, 1023, -1023, 1024, 200, 0])]
    elif what == "layout":
        kind = rng.choice(["rows_first", "columns_first", "transposed", "stacked"])
        site["layout"] = [kind, rng.choice([1, 2, 3, shape[0], 1 << 40])]
    else:
        site["dtype"] = rng.choice(["float64", "float32", "float16", "bfloat16", "int8", "bool", "complex64", "uint64"])


@mutation("manifest: bits and dtypes", weight=4)
def _dtypes(draft: Draft, rng: random.Random) -> None:
    names = ["float64", "float16", "bfloat16", "float32", "complex128", "complex64", "complex32", "float8_e4m3fn", "int64", "bool",
             "uint8", "uint64", "qint8", "quint4x2", "bits8", "dtype", "nn"]  # fmt: skip
    table = pick(rng, [key for key in ("kept", "bits") if draft.manifest.get(key)])
    entry = draft.manifest[table][pick(rng, draft.manifest[table])]
    entry[rng.randrange(len(entry)) if table == "bits" else 1] = rng.choice(names)


@mutation("manifest: aliases and extra", weight=4)
def _aliases(draft: Draft, rng: random.Random) -> None:
    names = draft.names()
    alias = rng.choice(
        ["x", "", "../x", "\x1b]0;x\x07", rng.choice(names), "a" * 5000, "[red]x", "2_Dense/x", "__metadata__"]
    )
    what = rng.choice(["alias", "many", "extra", "deep extra"])
    if what == "alias":
        draft.manifest["aliases"][alias] = rng.choice(names)
    elif what == "many":
        draft.manifest["aliases"].update({f"x{k}": names[0] for k in range(3000)})
    else:
        extra = draft.manifest.setdefault("extra", {})
        extra[alias] = nested({}, 900) if what == "deep extra" else rng.choice(JUNK)()


@mutation("manifest: text", weight=5)
def _text(draft: Draft, rng: random.Random) -> None:
    body = json.dumps(draft.manifest, separators=(",", ":"))[1:].encode()
    key = rng.choice([b'"sites"', b'"kept"', b'"files"', b'"form"', b'"source"'])
    count = rng.choice([1000, 100_000, 1_000_000])
    draft.text = rng.choice([
        lambda: body.replace(b'"version"', b'"version":2,"version"', 1),
        lambda: body.replace(key + b":", key + b":{}," + key + b":", 1),
        lambda: b'"x":' + b"[" * count + b"]" * count + b"," + body,
        lambda: b'"x":' + b'{"a":' * count + b"1" + b"}" * count + b"," + body,
        lambda: b'"x":[' + b"{}," * count + b"{}]," + body,
        lambda: b'"x":[' + b"[]," * count + b"[]]," + body,
        lambda: b'"extra":{"y":[' + b"1.5," * count + b"0]}," + body,
        lambda: b'"x":{' + b",".join(b'"%d":0' % k for k in range(count // 10)) + b"}," + body,
        lambda: b'"x":' + b"9" * count + b"," + body,
        lambda: b'"x":NaN,"y":-Infinity,' + body,
        lambda: b'"x":"\\ud800",' + body,
        lambda: body.replace(b"0", b"\xff", 1),
        lambda: body + b" " * count,
        lambda: body[: rng.randrange(len(body))],
        lambda: b'"sha256":"' + b"0" * 64 + b'",' + body,
        lambda: body.replace(b'"weight"', b'"\\u0077eight"', 1),
    ])()  # fmt: skip


@mutation("manifest: chunks of nothing", weight=1)
def _constant(draft: Draft, rng: random.Random) -> None:
    name = pick(rng, draft.manifest["coded"])
    draft.manifest["coded"][name][1:] = [rng.choice([CHUNK, 4 * CHUNK, 1 << 24, 1 << 28])]
