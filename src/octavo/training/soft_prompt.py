"""Soft prompts: trained vectors that a frozen, compressed language model reads before its tokens.

A prompt is trained on the compressed weights themselves, and kept in a small file beside the artifact. It also fits
other compressions of the same model, since these read the same embeddings.

Source: Compress, Then Prompt (Xu et al., 2023), arXiv 2305.11186.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from octavo.errors import ArtifactError, RequestError
from octavo.sources.tokens import context_of, is_causal
from octavo.system.atomic import writing
from octavo.system.paths import checked, reason
from octavo.system.raw import narrowed
from octavo.training.losses import logits_of

#: The only tensor in the file of a prompt.
_NAME = "soft_prompt"


class SoftPrompt(nn.Module):
    """Vectors that stand for the embeddings of tokens.

    Parameters
    ----------
    vectors
        (length, width), with the width of the model's embeddings.

    Examples
    --------
    >>> prompt = SoftPrompt(torch.randn(20, 64))
    >>> prompt.save("soft_prompt.safetensors")
    >>> SoftPrompt.load("soft_prompt.safetensors").length
    20
    """

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        if vectors.ndim != 2 or not vectors.numel():
            raise RequestError(
                f"soft prompt: vectors have the shape {tuple(vectors.shape)}; give (length, width), both at least 1"
            )
        self.vectors = nn.Parameter(vectors.detach().clone())

    @property
    def length(self) -> int:
        """Positions of the context that it takes."""
        return len(self.vectors)

    @classmethod
    def start(cls, model: nn.Module, length: int = 20, *, seed: int = 0) -> Self:
        """The embeddings of so many tokens drawn at random, in float32: a start for training.

        Raises
        ------
        RequestError
            If the length is below 1, or the model has no table of tokens.
        """
        if length < 1:
            raise RequestError(f"soft prompt: length is {length}; give at least 1 (20 to 100 are usual)")
        table = _table(model)
        words = int(table.num_embeddings)
        drawn = torch.randint(words, (length,), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            return cls(table(drawn.to(table.weight.device)).float())

    def save(self, path: str | Path, *, dtype: torch.dtype = torch.float16) -> None:
        """Write a ``.safetensors`` file, whole or not at all.

        Parameters
        ----------
        path
            Such as ``soft_prompt.safetensors`` in the folder of an artifact, which stays valid.
        dtype
            What vectors are stored in.
        """
        with writing(checked(path)) as aside:
            save_file({_NAME: narrowed(self.vectors.detach(), dtype).cpu().contiguous()}, aside)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote, as float32.

        Raises
        ------
        ArtifactError
            If the file is damaged or holds something else.
        RequestError
            If the file does not exist.
        """
        path = checked(path)
        if not path.is_file():
            raise RequestError(f"{path}: no such file; give the file of a soft prompt")
        try:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
                vectors = file.get_tensor(_NAME) if names == [_NAME] else None
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{path}: cannot be read: {reason(error)}; copy the file again") from error
        if vectors is None or vectors.ndim != 2 or not vectors.is_floating_point():
            raise ArtifactError(f"{path}: holds {', '.join(names[:3]) or 'nothing'} and no soft prompt; give its file")
        if not bool(vectors.isfinite().all()):
            raise ArtifactError(f"{path}: the soft prompt has NaN or Inf; train it again")
        return cls(vectors.float())


class Prompted(nn.Module):
    """A causal language model that reads a soft prompt before every sequence.

    The model is frozen, and always in its evaluation mode. So :func:`octavo.training.fit` trains the prompt alone.

    Parameters
    ----------
    model
        A ``transformers`` model that predicts the next token, such as a loaded artifact.

    Raises
    ------
    RequestError
        If the model does not predict the next token, or the prompt is made for embeddings of another width.
    """

    def __init__(self, model: nn.Module, prompt: SoftPrompt) -> None:
        super().__init__()
        if not is_causal(model):
            raise RequestError(
                f"{type(model).__name__}: predicts no next token, and a soft prompt is for models that do; give one"
            )
        width = int(_table(model).embedding_dim)
        if prompt.vectors.shape[1] != width:
            raise RequestError(
                f"soft prompt: has vectors of {prompt.vectors.shape[1]} numbers, but {type(model).__name__} embeds "
                f"tokens in {width}; train one for this model"
            )
        self.model, self.prompt = model.requires_grad_(False).eval(), prompt

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (sequences, tokens, vocabulary) at the tokens; those at the prompt are left out."""
        logits = logits_of(self.model(**self.embedded(input_ids, attention_mask)))
        return logits[:, self.prompt.length :]

    def embedded(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """What the model is called with, ``inputs_embeds`` among it; its ``generate`` takes the same.

        Raises
        ------
        RequestError
            If prompt and tokens are longer than the context of the model.
        """
        count, tokens = input_ids.shape
        total, most = self.prompt.length + tokens, context_of(self.model)
        if total > most:
            raise RequestError(
                f"soft prompt: its {self.prompt.length} vectors and {tokens} tokens take {total} positions, but "
                f"{type(self.model).__name__} has {most}; give shorter sequences"
            )
        embedded = _table(self.model)(input_ids)
        vectors = self.prompt.vectors.to(embedded).expand(count, -1, -1)
        given = {"inputs_embeds": torch.cat([vectors, embedded], 1)}
        if attention_mask is not None:
            ahead = attention_mask.new_ones(count, self.prompt.length)
            given["attention_mask"] = torch.cat([ahead, attention_mask], 1)
        return given

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the prompt; the model keeps its own, without dropout."""
        super().train(mode)
        self.model.eval()
        return self


def _table(model: Any) -> Any:
    """The embedding of tokens."""
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        found = None
    if not isinstance(found, nn.Embedding):
        raise RequestError(f"{type(model).__name__}: has no embedding of tokens; give a transformers language model")
    return found
