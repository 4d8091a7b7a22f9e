"""The judges of each kind of model: sentence encoders, language models, speech models, image classifiers."""

from __future__ import annotations

import json
import math
from types import MappingProxyType
from typing import Any

import torch
from common import CACHE, brown, windows
from judge import Judge, divergence
from models import ENCODER, PHOTOS, SPEECH
from photos import Lite0, photographs
from speech import START, clips, word_errors, words, written
from torch import Tensor, nn
from transformers import AutoTokenizer

import octavo
from octavo.calibration.objective import Cosine
from octavo.sources.tokens import text_batches
from octavo.system.atomic import write_file
from octavo.system.matmul import fast_matmul

#: Positions whose logits are in memory at a time.
_CHUNK = 256


class Sentences(Judge):
    """An encoder, by the vectors of sentences."""

    metric, hopeless = "1 - cosine", 0.5

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.data, judged = brown()
        self.batches = text_batches(self.folder, judged)
        self.reference = Cosine().reference(self.model, self.batches)

    def measure(self, model: nn.Module) -> dict[str, float]:
        return {"quality": float(Cosine().measure(model, self.batches, self.reference).mean())}

    def inputs(self) -> dict[str, Tensor]:
        padded = AutoTokenizer.from_pretrained(self.folder)(self.data, padding=True, return_tensors="pt")
        return {name: padded[name].contiguous() for name in ("input_ids", "attention_mask")}


class Language(Judge):
    """A language model, by the distributions of the next token on windows of running text."""

    metric, second_metric, hopeless = "mean KL", "perplexity", 4.0

    def __init__(self, name: str) -> None:
        super().__init__(name)
        length = min(512, self.model.config.max_position_embeddings)
        # A short context was learned on windows of half of it.
        judged = 512 if length == 512 else length // 2
        self.windows, self.test = windows(AutoTokenizer.from_pretrained(self.folder), judged=judged)
        self.data = [{"input_ids": rows} for rows in self.windows.split(8)]
        self.reference = [self._states(window) for window in self.test]
        self.head = self.model.get_output_embeddings().weight.detach().clone()

    @fast_matmul()
    @torch.inference_mode()
    def _states(self, window: Tensor) -> Tensor:
        return self.model.model(input_ids=window[None], use_cache=False).last_hidden_state[0]

    @fast_matmul()
    @torch.inference_mode()
    def measure(self, model: nn.Module) -> dict[str, float]:
        lost, loss = 0.0, 0.0
        head = model.get_output_embeddings()
        for window, before in zip(self.test, self.reference, strict=True):
            after = model.model(input_ids=window[None], use_cache=False).last_hidden_state[0]
            targets = window[1:]
            for at in range(0, len(window), _CHUNK):
                old = nn.functional.linear(before[at : at + _CHUNK], self.head).log_softmax(-1)
                new = head(after[at : at + _CHUNK]).log_softmax(-1)
                lost += divergence(old, new)
                wanted = targets[at : at + _CHUNK]
                loss -= float(new[: len(wanted)].gather(1, wanted[:, None]).sum())
        count, length = self.test.shape
        return {"quality": lost / (count * length), "second": math.exp(min(loss / (count * (length - 1)), 700))}

    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.windows, "attention_mask": torch.ones_like(self.windows)}


class Speech(Judge):
    """A model that writes what it hears, by the next token of what it wrote as it came, and by wrong words."""

    metric, second_metric, hopeless = "mean KL", "WER", 2.0

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        seen, self.test = clips()
        self.heard = torch.stack([clip.features for clip in seen])
        self.tokens, self.judged = self._transcripts([clip.features for clip in (*seen, *self.test)], len(seen))
        self.data = [
            {"input_features": features[None], "decoder_input_ids": tokens[None]}
            for features, tokens in zip(self.heard, self.tokens, strict=True)
        ]
        # The encoder's states serve all rows that differ in the decoder only.
        self.held: tuple[list[Tensor | None], list[Tensor]] = ([], [])
        self.reference = [
            self._logs(self.model, states, tokens)
            for states, tokens in zip(self._states(self.model), self.judged, strict=True)
        ]

    @fast_matmul()
    @torch.inference_mode()
    def _transcripts(self, features: list[Tensor], seen: int) -> tuple[list[Tensor], list[Tensor]]:
        """What the model writes for every clip, kept in the cache."""
        file = CACHE / "bench" / f"{self.name}-transcripts.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        if len(found) != len(features):
            found = []
            for sounds in torch.stack(features).split(8):
                states = self.model.model.encoder(sounds).last_hidden_state
                found += written(self.model, states, self.tokenizer)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, json.dumps(found).encode())
        tokens = [torch.tensor(line) for line in found]
        return tokens[:seen], tokens[seen:]

    @torch.inference_mode()
    def _states(self, model: nn.Module) -> list[Tensor]:
        return [model.model.encoder(clip.features[None]).last_hidden_state for clip in self.test]

    @torch.inference_mode()
    def _logs(self, model: Any, states: Tensor, tokens: Tensor) -> Tensor:
        made = model.model.decoder(input_ids=tokens[None], encoder_hidden_states=states, use_cache=False)
        # Before the last of the first marks, nothing is predicted that a user sees.
        return model.proj_out(made.last_hidden_state[0, len(START) - 1 :]).log_softmax(-1)

    def quality(self, weights: Any) -> dict[str, float]:
        held = [weights.get(name) for name in self.original if name.startswith("model.encoder.")]
        known, states = self.held
        same = len(known) == len(held) and all(a is b for a, b in zip(known, held, strict=True))
        self.held = (held, states if same else [])
        return super().quality(weights)

    @fast_matmul()
    def measure(self, model: nn.Module) -> dict[str, float]:
        states = self.held[1] if model is self.model else []
        if not states:
            states = self._states(model)
            self.held = (self.held[0], states if model is self.model else [])
        lost, wrong, said = 0.0, 0, 0
        for heard, tokens, before in zip(states, self.judged, self.reference, strict=True):
            lost += divergence(before, self._logs(model, heard, tokens))
        known = [(clip.said, heard) for clip, heard in zip(self.test, states, strict=True) if clip.said is not None]
        texts = written(model, torch.cat([heard for _, heard in known]), self.tokenizer)
        for (truth, _), tokens in zip(known, texts, strict=True):
            found = words(self.tokenizer.decode(tokens, skip_special_tokens=True))
            wrong, said = wrong + word_errors(words(truth), found), said + len(words(truth))
        return {"quality": lost / sum(len(before) for before in self.reference), "second": wrong / said}

    def inputs(self) -> dict[str, Tensor]:
        rows = nn.utils.rnn.pad_sequence(self.tokens, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(tokens) for tokens in self.tokens])
        mask = (torch.arange(rows.shape[1]) < lengths[:, None]).long()
        return {"input_features": self.heard, "decoder_input_ids": rows, "decoder_attention_mask": mask}


class Photos(Judge):
    """An image classifier, by its distribution over the classes."""

    metric, second_metric, hopeless = "mean KL", "top-1 agreement", 4.0
    options = MappingProxyType({"objective": "kl"})

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.seen, self.test = photographs()
        self.data = list(self.seen.split(16))
        self.reference = self._logs(self.model)

    @property
    def source(self) -> nn.Module:
        with torch.no_grad():
            for name, tensor in self.live.items():
                tensor.copy_(self.original[name])
        return self.model

    def reload(self, artifact: Any) -> nn.Module:
        return octavo.load(artifact, into=Lite0()).eval()

    @fast_matmul()
    @torch.inference_mode()
    def _logs(self, model: nn.Module) -> Tensor:
        return torch.cat([model(images).log_softmax(-1) for images in self.test.split(32)])

    def measure(self, model: nn.Module) -> dict[str, float]:
        after = self._logs(model)
        same = (after.argmax(1) == self.reference.argmax(1)).float().mean()
        return {"quality": divergence(self.reference, after) / len(after), "second": float(same)}

    def inputs(self) -> dict[str, Tensor]:
        return {"x": self.seen}


def judge(name: str) -> Judge:
    """The judge of a model."""
    return {ENCODER: Sentences, SPEECH: Speech, PHOTOS: Photos}.get(name, Language)(name)
