"""Damage that nothing hides: every change of what counts must be refused."""

from __future__ import annotations

import json
import random

from fuzzing.draft import Draft, mutation, pick
from fuzzing.trees import change_number


@mutation("damage: bytes of a file", alters=False, weight=8)
def _bytes(draft: Draft, rng: random.Random) -> None:
    name = pick(rng, draft.files)
    whole = bytearray(draft.files[name].head() + draft.files[name].data)
    what = rng.choice(["flip", "flip", "cut", "grow", "move"])
    if what == "flip":
        whole[rng.randrange(len(whole))] ^= rng.randrange(1, 256)
    elif what == "cut":
        whole = whole[: rng.randrange(len(whole))]
    elif what == "grow":
        whole += rng.randbytes(rng.randrange(1, 9))
    else:
        at, other = rng.randrange(len(whole)), rng.randrange(len(whole))
        whole[at], whole[other] = whole[other], whole[at]
    draft.after.append(lambda folder: (folder / name).write_bytes(whole))


@mutation("damage: manifest", alters=False, weight=4)
def _manifest(draft: Draft, rng: random.Random) -> None:
    draft.signed = False
    if rng.random() < 0.5:
        change_number(draft.manifest, rng)
        return
    body = bytearray(json.dumps(draft.manifest, separators=(",", ":"))[1:].encode())
    body[rng.randrange(len(body))] ^= rng.randrange(1, 256)
    draft.text = bytes(body)


@mutation("damage: contents exchanged", alters=False, weight=2)
def _exchanged(draft: Draft, rng: random.Random) -> None:
    """Two tensors of one length change places; checksums are as they were."""
    names = [name for name in draft.names() if draft.content(name)]
    one = pick(rng, names)
    other = pick(rng, [name for name in names if name != one and len(draft.content(name)) == len(draft.content(one))])
    first, second = draft.content(one), draft.content(other)
    crcs = json.dumps(draft.manifest)
    draft.replace(one, second)
    draft.replace(other, first)
    draft.manifest = json.loads(crcs)
