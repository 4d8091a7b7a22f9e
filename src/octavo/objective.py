"""What quality means for a source: how far its outputs move from what they were."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from octavo.batches import Batch, mask_of, run, select, sequences_in
from octavo.errors import RequestError
from octavo.matmul import fast_matmul

#: Logits of one batch take no more, so that some copies of them do not matter beside a model.
_LOGITS_BYTES = 1 << 28


def _vocabulary(module: nn.Module) -> int:
    """Classes of the distribution that a language model gives at every position; 0 if it is none."""
    head = getattr(module, "get_output_embeddings", lambda: None)()
    return 0 if head is None else len(head.weight)


class Objective(ABC):
    """A divergence between the outputs of the source and those of its compressed copy.

    Zero for equal outputs, and a mean over examples, so that it can be compared between data of different size.
    """

    #: What users see.
    metric: str

    @abstractmethod
    def outputs(self, module: nn.Module, batch: Batch) -> Tensor:
        """What is compared, as (examples, features)."""

    @abstractmethod
    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """Per-example divergence of two results of :meth:`outputs`, shape (examples,)."""

    @abstractmethod
    def probe(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """A scalar whose gradient is a random sample of the divergence's curvature.

        Averaged over samples the outer product of its gradient equals the Gauss-Newton matrix of the summed
        divergence at zero, where the divergence itself has no gradient.
        """

    def pieces(self, module: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
        """The batches, cut so that the outputs of each fit in memory."""
        return list(batches)

    @fast_matmul()
    def reference(self, module: nn.Module, batches: Iterable[Batch]) -> list[Tensor]:
        """Outputs of the uncompressed module, one tensor a batch."""
        with torch.inference_mode():
            return [self.outputs(module, batch) for batch in batches]

    @fast_matmul()
    def measure(self, module: nn.Module, batches: Iterable[Batch], reference: Iterable[Tensor]) -> Tensor:
        """Divergence of every example, shape (examples,)."""
        with torch.inference_mode():
            pairs = zip(batches, reference, strict=True)
            return torch.cat([self.divergence(old, self.outputs(module, batch)) for batch, old in pairs])


class Cosine(Objective):
    """``1 - cosine`` of one vector an example: the mean of the last hidden states over the tokens that are no padding.

    Parameters
    ----------
    pooling
        ``mean`` or ``cls``. Modules that return a plain (examples, features) tensor need neither.
    """

    metric = "1 - cosine"

    def __init__(self, pooling: str = "mean") -> None:
        self.pooling = pooling

    def outputs(self, module: nn.Module, batch: Batch) -> Tensor:  # noqa: D102
        result = run(module, batch)
        states = getattr(result, "last_hidden_state", result)
        if not isinstance(states, Tensor):
            raise RequestError(
                f"the model returns {type(result).__name__}: cosine needs a tensor or a last_hidden_state"
            )
        if states.ndim == 3:
            mask = mask_of(batch)
            if self.pooling == "cls":
                states = states[:, 0]
            elif mask is None:
                states = states.mean(1)
            else:
                weights = mask.to(states.dtype)[..., None]
                states = (states * weights).sum(1) / weights.sum(1).clamp_min(1)
        return nn.functional.normalize(states.flatten(1).float(), dim=1)

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:  # noqa: D102
        # Half the squared distance equals 1 - cosine for unit vectors, without its cancellation near zero.
        return (reference - outputs).double().square().sum(1) / 2

    def probe(self, outputs: Tensor, generator: torch.Generator) -> Tensor:  # noqa: D102
        return (outputs * torch.randn(outputs.shape, generator=generator).to(outputs.device)).sum()


class KL(Objective):
    """``KL(source || compressed)`` of the class or next-token distribution, mean over the positions of an example."""

    metric = "KL divergence"

    def pieces(self, module: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
        """Batches of so few sequences that their logits over the whole vocabulary take 256 MB, if one does."""
        vocabulary = _vocabulary(module)
        result: list[Batch] = []
        for batch in batches:
            tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
            size = sequences_in(batch)
            most = size if tokens is None or not vocabulary else _LOGITS_BYTES // (4 * vocabulary * tokens.shape[1])
            result += [select(batch, slice(at, at + max(most, 1))) for at in range(0, size, max(most, 1))]
        return result

    def outputs(self, module: nn.Module, batch: Batch) -> Tensor:  # noqa: D102
        result = run(module, batch)
        logits = getattr(result, "logits", result)
        if not isinstance(logits, Tensor) or logits.ndim < 2:
            raise RequestError(
                f"the model returns {type(result).__name__}: KL needs logits of shape (examples, ..., classes)"
            )
        logs = logits.float().log_softmax(-1)
        mask = mask_of(batch)
        if logs.ndim == 3 and mask is not None:
            # Padding gets log-probabilities of zero on both sides, so it adds nothing to the divergence.
            logs = logs * mask.to(logs.dtype)[..., None]
        return logs

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:  # noqa: D102
        terms = (reference.exp() * (reference - outputs)).sum(-1, dtype=torch.float64)
        return (
            terms
            if terms.ndim == 1
            else terms.flatten(1).sum(1) / (reference != 0).any(-1).flatten(1).sum(1).clamp_min(1)
        )

    def probe(self, outputs: Tensor, generator: torch.Generator) -> Tensor:  # noqa: D102
        flat = outputs.reshape(-1, outputs.shape[-1])
        live = (flat != 0).any(-1)
        # By the inverse of the distribution function: one random number a position, not one a class.
        reached = flat.detach().exp().cumsum(-1)
        drawn = torch.rand(len(flat), 1, generator=generator).to(reached) * reached[:, -1:]
        labels = torch.searchsorted(reached, drawn)[:, 0].clamp_max(flat.shape[-1] - 1)
        picked = flat.gather(1, labels[:, None])[:, 0] * live
        # The divergence is a mean over positions, so each position's sample counts by the root of its share.
        positions = live.reshape(len(outputs), -1).sum(1).clamp_min(1).to(flat.dtype)
        return (picked.reshape(len(outputs), -1).sum(1) / positions.sqrt()).sum()


class Squared(Objective):
    """Squared error of the outputs relative to their mean square: for regressors and anything else with tensors."""

    metric = "relative squared error"

    def outputs(self, module: nn.Module, batch: Batch) -> Tensor:  # noqa: D102
        result = run(module, batch)
        states = getattr(result, "last_hidden_state", result)
        if not isinstance(states, Tensor):
            raise RequestError(
                f"the model returns {type(result).__name__}: give an objective with an `outputs` of its own"
            )
        return states.float().flatten(1)

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:  # noqa: D102
        scale = reference.double().square().mean().clamp_min(1e-30)
        return (reference - outputs).double().square().mean(1) / scale

    def probe(self, outputs: Tensor, generator: torch.Generator) -> Tensor:  # noqa: D102
        scale = (2 / (outputs.detach().square().mean().clamp_min(1e-30) * outputs.shape[1])).sqrt()
        return (outputs * torch.randn(outputs.shape, generator=generator).to(outputs.device)).sum() * scale


class Loss(Objective):
    """The increase of a loss of the user's own, such as the cross entropy of true labels.

    Its curvature is taken from per-example gradients (the empirical Fisher matrix), which is near the truth for a model
    that fits its data; the other objectives need no such assumption.

    Parameters
    ----------
    function
        Takes the module and a batch, and returns one loss an example, shape (examples,).
    """

    metric = "increase of the loss"

    def __init__(self, function: Callable[[nn.Module, Batch], Tensor]) -> None:
        self.function = function

    def outputs(self, module: nn.Module, batch: Batch) -> Tensor:  # noqa: D102
        losses = self.function(module, batch)
        if losses.ndim != 1:
            raise RequestError(f"the loss has shape {tuple(losses.shape)}; return one number an example, (examples,)")
        return losses.float()[:, None]

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:  # noqa: D102
        return (outputs - reference).double()[:, 0]

    def probe(self, outputs: Tensor, generator: torch.Generator) -> Tensor:  # noqa: D102
        # Random signs: the square of the sum is then, on average, the sum of the examples' squares.
        signs = torch.randint(0, 2, outputs.shape, generator=generator) * 2 - 1
        return (outputs * signs.to(outputs.device, outputs.dtype)).sum()


OBJECTIVES: dict[str, type[Objective]] = {"cosine": Cosine, "kl": KL, "squared": Squared}


def objective(name: str | Objective) -> Objective:
    """The objective of that name, or the one given."""
    if isinstance(name, Objective):
        return name
    if name not in OBJECTIVES:
        raise RequestError(f"objective {name!r} is not known; choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]()
