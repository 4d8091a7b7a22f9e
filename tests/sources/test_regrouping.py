"""Sequences of similar length share a batch; nothing else about them changes."""

import torch

from octavo.sources.batches import whole
from octavo.sources.regrouping import regrouped

LENGTHS = [[9, 3, 40], [12, 40, 5], [7, 7, 7]]


def batches(lengths=LENGTHS, keys=("input_ids", "attention_mask", "token_type_ids")):
    made, token = [], 1
    for some in lengths:
        ids, mask = torch.full((len(some), max(some)), -1), torch.zeros(len(some), max(some), dtype=torch.long)
        for row, length in enumerate(some):
            ids[row, :length] = torch.arange(token, token + length)
            mask[row, :length], token = 1, token + length
        parts = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(mask)}
        made.append({key: parts[key] for key in keys})
    return made


def sequences(some):
    return sorted(tuple(row[mask.bool()].tolist()) for batch in some
                  for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True))  # fmt: skip


def test_the_same_sequences_with_less_padding():
    before = batches([[9, 3, 40]] * 40)
    after = regrouped(before)
    assert sequences(after) == sequences(before)
    assert all(set(batch) == set(before[0]) for batch in after)
    assert sum(batch["input_ids"].numel() for batch in after) < 0.6 * sum(b["input_ids"].numel() for b in before)
    for batch in after:
        assert bool((batch["input_ids"][batch["attention_mask"] == 0] == -1).all())
        assert batch["input_ids"].numel() <= 1 << 10


def test_other_data_is_left_alone():
    for data in (
        batches([[8, 8], [8, 8]]),
        batches(keys=("input_ids",)),
        [{**batch, "labels": torch.zeros(3)} for batch in batches()],
        [{key: part.flip(1) for key, part in batch.items()} for batch in batches()],
        [whole(batch) for batch in batches()],
        [torch.zeros(4, 8)],
        [],
    ):
        after = regrouped(data)
        assert len(after) == len(data) and all(one is other for one, other in zip(after, data, strict=True))
