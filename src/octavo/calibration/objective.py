"""Measures of quality: how far outputs move from those of the source."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibration.outputs import described, leaves, mask_for, part, parts
from octavo.calibration.pooling import modes_of, pooled
from octavo.errors import RequestError
from octavo.sources.batches import Batch, copied, mask_of, repeatable, run, select, sequences_in  # noqa: F401  (for recipes)
from octavo.system.matmul import fast_matmul

#: Limit on the logits of one batch, so that a few copies are small compared to a model.
_LOGITS_BYTES = 1 << 28
#: The tokens for which a model gives a distribution: those of the decoder if there is an encoder too.
_TOKENS = ("decoder_input_ids", "input_ids")
#: Outputs with one vector per example or per token; the first that exists is used.
_VECTORS = ("sentence_embedding", "last_hidden_state", "pooler_output")
#: Distributions over tokens of the start and end of an answer.
_ENDS = ("start_logits", "end_logits")
#: Elements of a distribution over classes handled at a time: temporary tensors then stay in the processor's cache.
_PART = 1 << 20
#: A finite number for the logarithm of a zero probability.
_NEVER = -1e4
#: The sum of probabilities in 16 bits misses one by less than this; smaller probabilities than the second are not zero.
_ROUNDING, _LEAST = 1e-2, torch.finfo(torch.float32).tiny


def _vocabulary(module: nn.Module) -> int:
    """Number of classes that a language model predicts at every position; 0 for other models."""
    try:
        head = getattr(module, "get_output_embeddings", lambda: None)()
    except NotImplementedError:
        # Models without a token table, such as audio models, do not state that they have no head.
        return 0
    return 0 if head is None else len(head.weight)


class Objective(ABC):
    """A divergence between the outputs of the source and those of its compressed copy.

    It is zero for equal outputs and a mean over examples, so it can be compared between data sets of different size.
    """

    #: Name shown to users.
    metric: str = "divergence"

    @abstractmethod
    def outputs(self, module: nn.Module, batch: Batch) -> Tensor:
        """The compared values, as (examples, features)."""

    @abstractmethod
    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """Per-example divergence of two results of :meth:`outputs`, shape (examples,)."""

    @abstractmethod
    def probe(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """A scalar whose gradient is a random sample of the divergence's curvature.

        Averaged over samples, the outer product of its gradient is the Gauss-Newton matrix of the summed divergence at
        zero, where the divergence has no gradient.
        """

    def compared(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """Per-example divergence of results that may come from two models.

        Raises
        ------
        RequestError
            If their shapes differ.
        """
        if reference.shape != outputs.shape:
            raise RequestError(
                f"objective {type(self).__name__.lower()}: outputs of shape {tuple(outputs.shape)} cannot be compared "
                f"with {tuple(reference.shape)}; both models must return the same tensors, or choose another objective"
            )
        return self.divergence(reference, outputs)

    def pieces(self, module: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
        """The batches, split so that the outputs of each fit in memory."""
        return list(batches)

    @fast_matmul()
    def reference(self, module: nn.Module, batches: Iterable[Batch]) -> list[Tensor]:
        """Outputs of the uncompressed module, one tensor per batch."""
        with torch.inference_mode():
            return [self.outputs(module, batch) for batch in batches]

    @fast_matmul()
    def measure(self, module: nn.Module, batches: Iterable[Batch], reference: Iterable[Tensor]) -> Tensor:
        """Divergence of every example, shape (examples,), on the CPU."""
        with torch.inference_mode():
            pairs = zip(batches, reference, strict=True)
            return torch.cat([self.compared(old, self.outputs(module, batch)).cpu() for batch, old in pairs])


class OfOutputs(Objective):
    """An objective that reads what the module returns."""

    #: Description of the outputs that :meth:`read` needs, for messages.
    needs: str

    @abstractmethod
    def read(self, result: Any, module: nn.Module, batch: Batch) -> Tensor | None:
        """The compared values, as (examples, features); None if the result has none."""

    def outputs(self, module: nn.Module, batch: Batch) -> Tensor:  # noqa: D102
        result = run(module, batch)
        found = self.read(result, module, batch)
        if found is None:
            fitting = [name for name, kind in OBJECTIVES.items() if kind().read(result, module, batch) is not None]
            raise RequestError(
                f"the model returns {described(result)}: {self.needs}; "
                + (f"fits: {', '.join(fitting)}" if fitting else "give an objective that implements `outputs`")
            )
        return found


class Cosine(OfOutputs):
    """``1 - cosine`` of one vector per example.

    The vector is the ``sentence_embedding`` if there is one. A model with several kinds of input (text, image, sound)
    gives its concatenated unit embeddings. Otherwise the last hidden states are pooled over tokens without padding.

    Parameters
    ----------
    pooling
        How states are pooled: a mode of :data:`octavo.calibration.pooling.MODES`, or several whose vectors are
        concatenated (``cls+mean``). Not needed for modules that return a plain (examples, features) tensor.
    prompt
        Number of tokens at the start of every text that are not pooled.
    """

    metric = "1 - cosine"
    needs = "cosine needs a tensor (examples, features), a last_hidden_state or embeddings"

    def __init__(self, pooling: str = "mean", prompt: int = 0) -> None:
        self.modes = modes_of(pooling)
        self.pooling, self.prompt = pooling, prompt

    def read(self, result: Any, module: nn.Module, batch: Batch) -> Tensor | None:  # noqa: D102
        name, states = next(
            ((name, part(result, name)) for name in _VECTORS if part(result, name) is not None), ("", result)
        )
        sides = _sides(result) if name != "sentence_embedding" else []
        if sides:
            states = torch.cat([nn.functional.normalize(side.flatten(1).float(), dim=1) for side in sides], 1)
        if not isinstance(states, Tensor) or states.ndim < 2:
            return None
        if states.ndim == 3:
            states = pooled(states, mask_for(name, states, module, batch), self.modes, self.prompt)
        return nn.functional.normalize(states.flatten(1).float(), dim=1)

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:  # noqa: D102
        # For unit vectors, half the squared distance equals 1 - cosine and avoids its cancellation near zero.
        return (reference - outputs).double().square().sum(1) / 2

    def probe(self, outputs: Tensor, generator: torch.Generator) -> Tensor:  # noqa: D102
        return (outputs * torch.randn(outputs.shape, generator=generator).to(outputs.device)).sum()


class KL(OfOutputs):
    """``KL(source || compressed)`` of the class or next-token distribution, averaged over the positions of an example.

    Logits are (examples, ..., classes); with four or more dimensions they are images, with the classes in dimension 1.
    A module may also return the probabilities themselves. The start and end of an answer are two distributions over
    tokens. If a model has several heads, every position of each counts equally.
    """

    metric = "KL divergence"
    needs = "KL needs logits of shape (examples, ..., classes), of two classes or more"

    def pieces(self, module: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
        """Batches small enough that their logits over the whole vocabulary take 256 MB, if a sequence fits."""
        vocabulary = _vocabulary(module)
        result: list[Batch] = []
        for batch in batches:
            tokens = next((batch[key] for key in _TOKENS if key in batch), None) if isinstance(batch, Mapping) else None
            size = sequences_in(batch)
            most = size if tokens is None or not vocabulary else _LOGITS_BYTES // (4 * vocabulary * tokens.shape[1])
            result += [select(batch, slice(at, at + max(most, 1))) for at in range(0, size, max(most, 1))]
        return result

    def read(self, result: Any, module: nn.Module, batch: Batch) -> Tensor | None:  # noqa: D102
        logs = []
        for name, logits in _heads(result).items():
            mask = mask_for(name, logits, module, batch) if logits.ndim < 4 else None
            mask = None if mask is not None and bool(mask.all()) else mask
            found = logits.float().movedim(1, -1).flatten(1, -2) if logits.ndim > 3 else logits.float()
            if name in _ENDS:
                # Tokens are the classes, and padding cannot be chosen.
                found = found if mask is None else found.masked_fill(mask == 0, _NEVER)
                found, mask = found[:, None], None
            found = _logarithms(found) if name == "" else found.log_softmax(-1)
            if found.numel() and float(found.detach().amin()) == -math.inf:
                found = found.clamp_min(_NEVER)
            logs.append((found, mask))
        if len(logs) > 1:
            widest = max(found.shape[-1] for found, _ in logs)
            logs = [(_widened(found, widest), mask) for found, mask in logs]
        # Padding gets log-probabilities of zero on both sides, so it adds nothing to the divergence.
        masked = [
            found if mask is None or found.ndim != 3 else found * mask.to(found.dtype)[..., None]
            for found, mask in logs
        ]
        return None if not masked else masked[0] if len(masked) == 1 else torch.cat(masked, 1)

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:  # noqa: D102
        pairs = zip(_in_parts(reference), _in_parts(outputs), strict=True)
        terms = torch.cat([(old.exp() * (old - new)).sum(-1, dtype=torch.float64) for old, new in pairs])
        terms = terms.reshape(reference.shape[:-1])
        return terms if terms.ndim == 1 else terms.flatten(1).sum(1) / _live(reference).flatten(1).sum(1).clamp_min(1)

    def probe(self, outputs: Tensor, generator: torch.Generator) -> Tensor:  # noqa: D102
        flat = outputs.reshape(-1, outputs.shape[-1])
        live = _live(flat.detach())
        # By inverting the distribution function: one random number per position, not per class.
        parts = list(_in_parts(flat.detach()))
        shares = torch.rand(len(flat), 1, generator=generator).to(flat.device).split([len(part) for part in parts])
        labels = torch.cat([_drawn(*pair) for pair in zip(parts, shares, strict=True)])
        picked = flat.gather(1, labels[:, None])[:, 0] * live
        # The divergence is a mean over positions, so each sample is weighted by the square root of its share.
        positions = live.reshape(len(outputs), -1).sum(1).clamp_min(1).to(flat.dtype)
        return (picked.reshape(len(outputs), -1).sum(1) / positions.sqrt()).sum()


def are_probabilities(values: Tensor) -> bool:
    """Whether rows (..., classes) are distributions: a module ends in a softmax of its own."""
    found = values.detach()
    return bool(found.numel()) and float(found.amin()) >= 0 and float((found.sum(-1) - 1).abs().amax()) < _ROUNDING


def _logarithms(values: Tensor) -> Tensor:
    """Log-probabilities (..., classes) of logits, or of probabilities."""
    # A softmax of probabilities would be nearly the same for all inputs, and so hide every loss.
    return values.clamp_min(_LEAST).log() if are_probabilities(values) else values.log_softmax(-1)


def _in_parts(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor (..., classes) as (positions, classes), a few positions at a time."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return iter(flat.split(max(1, _PART // max(1, flat.shape[-1]))))


def _live(logs: Tensor) -> Tensor:
    """Which positions are not padding, whose log-probabilities are all zero; others are at most zero."""
    return logs.amin(-1) != 0


def _drawn(logs: Tensor, shares: Tensor) -> Tensor:
    """A label for every position of (positions, classes), where its distribution function reaches a share."""
    reached = logs.exp().cumsum(-1)
    return torch.searchsorted(reached, shares * reached[:, -1:])[:, 0].clamp_max(logs.shape[-1] - 1)


def _sides(result: Any) -> list[Tensor]:
    """The embeddings of every kind of input of a contrastive model, if all examples have them."""
    found = [value for name, value in parts(result).items() if name.endswith("_embeds") and isinstance(value, Tensor)]
    return found if all(side.ndim > 1 for side in found) and len({len(side) for side in found}) == 1 else []


def _heads(result: Any) -> dict[str, Tensor]:
    """The logits that a model returns, by name of the head."""
    if isinstance(result, Tensor):
        found = {"": result}
    elif isinstance(part(result, "logits"), Tensor):
        found = {"logits": part(result, "logits")}
    else:
        names = [name for name in parts(result) if name.endswith("_logits") and "router" not in name]
        ends = [name for name in _ENDS if name in names]
        found = {name: part(result, name) for name in ends or names}
    return {
        name: logits
        for name, logits in found.items()
        if isinstance(logits, Tensor) and logits.ndim > 1 and logits.shape[-1 if logits.ndim < 4 else 1] > 1
    }


def _widened(logs: Tensor, classes: int) -> Tensor:
    """Distributions of one head as (examples, positions, classes); classes that it lacks have zero probability."""
    logs = logs[:, None] if logs.ndim == 2 else logs.flatten(1, -2)
    return nn.functional.pad(logs, (0, classes - logs.shape[-1]), value=_NEVER)


class Squared(OfOutputs):
    """Squared error of the outputs relative to their mean square, for regressors and any other tensors.

    All floating tensors with one entry per example are compared, each relative to itself, and their errors are
    averaged. Caches and single numbers, such as a loss, are left out.
    """

    metric = "relative squared error"
    needs = "squared needs floating tensors with one entry per example"

    def read(self, result: Any, module: nn.Module, batch: Batch) -> Tensor | None:  # noqa: D102
        found = {"": result} if isinstance(result, Tensor) else leaves(result, sequences_in(batch))
        flat = []
        for name, tensor in found.items():
            mask = mask_for(name, tensor, module, batch) if tensor.ndim > 2 else None
            kept = (
                tensor
                if mask is None
                else tensor * mask.to(tensor.dtype).reshape(*mask.shape, *[1] * (tensor.ndim - 2))
            )
            flat.append(kept.float().reshape(len(kept), -1))
        if len(flat) < 2:
            return flat[0] if flat else None
        widest = max(tensor.shape[1] for tensor in flat)
        return torch.stack([nn.functional.pad(tensor, (0, widest - tensor.shape[1])) for tensor in flat], 1)

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:  # noqa: D102
        error = (reference - outputs).double().square()
        if error.ndim == 3:
            # Tensors of unequal size are concatenated and padded with zeros: sums are relative, means are not.
            return (error.sum(2) / reference.double().square().sum(2).mean(0).clamp_min(1e-30)).mean(1)
        return error.mean(1) / reference.double().square().mean().clamp_min(1e-30)

    def probe(self, outputs: Tensor, generator: torch.Generator) -> Tensor:  # noqa: D102
        if outputs.ndim == 3:
            sizes = outputs.detach().square().sum(2).mean(0).clamp_min(1e-30)
            scale = (2 / (sizes * outputs.shape[1])).sqrt()[:, None]
        else:
            scale = (2 / (outputs.detach().square().mean().clamp_min(1e-30) * outputs.shape[1])).sqrt()
        drawn = torch.randn(outputs.shape, generator=generator).to(outputs.device)
        return (outputs * drawn * scale).sum() if outputs.ndim == 3 else (outputs * drawn).sum() * scale


class Loss(Objective):
    """The increase of a user's loss, such as the cross entropy of true labels.

    Its curvature comes from per-example gradients (the empirical Fisher matrix), which is accurate for a model that
    fits its data. The other objectives need no such assumption.

    Parameters
    ----------
    function
        Takes the module and a batch, and returns one loss per example, shape (examples,).
    """

    metric = "increase of the loss"

    def __init__(self, function: Callable[[nn.Module, Batch], Tensor]) -> None:
        self.function = function

    def outputs(self, module: nn.Module, batch: Batch) -> Tensor:  # noqa: D102
        with repeatable():
            losses = self.function(module, copied(batch))
        if losses.ndim != 1:
            raise RequestError(f"the loss has shape {tuple(losses.shape)}; return one number per example, (examples,)")
        return losses.float()[:, None]

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:  # noqa: D102
        return (outputs - reference).double()[:, 0]

    def probe(self, outputs: Tensor, generator: torch.Generator) -> Tensor:  # noqa: D102
        # With random signs the expected square of the sum is the sum of the examples' squares.
        signs = torch.randint(0, 2, outputs.shape, generator=generator) * 2 - 1
        return (outputs * signs.to(outputs.device, outputs.dtype)).sum()


OBJECTIVES: dict[str, type[OfOutputs]] = {"cosine": Cosine, "kl": KL, "squared": Squared}


def objective(name: str | Objective) -> Objective:
    """The objective with that name, or the given objective."""
    if isinstance(name, Objective):
        return name
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise RequestError(f"objective {name!r} is not known; choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]()
