"""MoDeGPT: thinner blocks without training, by decomposing pairs of matrices together.

Source: Lin et al. (2024), arXiv 2408.09632. With the moments of one forward pass (:class:`Moments`), in every block:

- The MLP. With the moment ``C`` (m, m) of its neurons, those of the largest ridge leverage ``[C (C + l I)^-1]_ii`` are
  kept (the set ``S``), and the matrix that reads them compensates the rest: ``W_D <- W_D C[:, S] C[S, S]^-1``.
- Queries and keys. Of the pairs of dimensions that the rotary embedding rotates together, those with the largest
  ``sqrt(E|q|^2) sqrt(E|k|^2)``, summed over the query heads of a group, are kept. This score is invariant to the
  rotation.
- Values and output. With values ``v = W_V x`` of moment ``M`` (size, size), ``W_O W_V`` of a head becomes the low-rank
  product with the least output error: the truncated SVD of ``W_O M^(1/2)``. Query heads that share the values share one
  basis: that of their stacked ``W_O``, so that a direction is worth what all readers lose without it.

The share of weights cut from a layer depends on its influence on the residual stream (:func:`allocate`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo.cuts.decoder import DecoderBlock, Moments, blocks
from octavo.errors import RequestError
from octavo.forms import Dense, Form, Trimmed
from octavo.methods.factorize.factors import Factors, whitened

#: The pairs that can be decomposed: the MLP (type I), queries with keys (type II), values with the output (type III).
TYPES = ("mlp", "query-key", "value-output")
#: The largest share cut from a layer.
LIMIT = 0.8


@dataclass(frozen=True)
class Decomposition:
    """A decoder's thinner blocks, as matrices of the original shapes.

    Parameters
    ----------
    forms
        Forms of weights by parameter name: a :class:`octavo.forms.Trimmed` each.
    biases
        Changed biases by parameter name.
    """

    forms: dict[str, Form]
    biases: dict[str, Tensor]

    @torch.no_grad()
    def load(self, model: nn.Module) -> nn.Module:
        """Set these weights and biases in the model, in place."""
        parameters = dict(model.named_parameters())
        for name, form in self.forms.items():
            parameters[name].copy_(form.dense())
        for name, bias in self.biases.items():
            parameters[name].copy_(bias)
        return model


def allocate(influence: Sequence[float], mean: float, temperature: float = 0.015) -> list[float]:
    """The shares of weights to cut from each layer.

    They maximise ``sum_l s_l (1 - phi_l) + temperature * entropy(phi)`` under the given mean, which gives ``phi = L *
    mean * softmax(-s / temperature)``. The excess above :data:`LIMIT` is distributed to the others in proportion.

    Parameters
    ----------
    influence
        ``s``, one per layer.
    mean
        From 0 to :data:`LIMIT`.
    temperature
        High temperatures make layers equal.
    """
    if not 0 <= mean <= LIMIT:
        raise RequestError(f"modegpt: the share of weights to cut is {mean!r}; it must be from 0 to {LIMIT}")
    if not temperature > 0:
        raise RequestError(f"modegpt: the temperature is {temperature!r}; it must be above 0")
    if wrong := [value for value in influence if not math.isfinite(value)]:
        raise RequestError(f"modegpt: an influence is {wrong[0]!r}; it must be a finite number")
    logits = -torch.tensor(influence, dtype=torch.float64) / temperature
    shares, free = torch.zeros(len(logits), dtype=torch.float64), torch.ones(len(logits), dtype=torch.bool)
    while bool(free.any()):
        left = len(logits) * mean - LIMIT * int((~free).sum())
        shares[free] = left * logits[free].softmax(0)
        over = free & (shares > LIMIT)
        if not bool(over.any()):
            break
        shares[over], free = LIMIT, free & ~over
    return shares.tolist()


@torch.no_grad()
def decompose(
    model: nn.Module,
    moments: Sequence[Moments],
    shares: Sequence[float],
    types: Collection[str] = TYPES,
    *,
    ridge: float = 1e-4,
) -> Decomposition:
    """Cut a share of the weights of every block.

    Parameters
    ----------
    moments
        The result of :func:`octavo.cuts.decoder.observe`, one per block.
    shares
        The share cut from every block, from 0 to below 1; at least one unit of each kind is kept.
    types
        A choice from :data:`TYPES`; the others are unchanged.
    ridge
        Added to the diagonals of moments, as a share of their mean.

    Raises
    ------
    RequestError
        If the model's architecture is unknown, or the arguments do not fit it.
    """
    found = blocks(model)
    if not len(found) == len(moments) == len(shares):
        raise RequestError(
            f"modegpt: {len(found)} blocks, but {len(moments)} moments and {len(shares)} shares; give one of each per "
            "block"
        )
    if wrong := [share for share in shares if not 0 <= share < 1]:
        raise RequestError(f"modegpt: a share to cut is {wrong[0]!r}; it must be at least 0 and below 1")
    if unknown := sorted(set(types) - set(TYPES)):
        raise RequestError(f"modegpt: type {unknown[0]!r} is not known; choose from {', '.join(TYPES)}")
    result = Decomposition({}, {})
    for block, seen, share in zip(found, moments, shares, strict=True):
        for kind in TYPES:
            if kind in types and share > 0:
                remove(kind, block, seen, _most(kind, block, seen, 1 - share, ridge), ridge, result)
    return result


def remove(kind: str, block: DecoderBlock, seen: Moments, kept: Tensor, ridge: float, result: Decomposition) -> None:
    """Add to ``result`` what is left of one type of module in a block.

    Parameters
    ----------
    kept
        Bools: (neurons,) of the MLP; (shared, size) rotated dimensions of the keys, both of a pair alike; or (shared,
        size) directions of values, from the one that matters most.
    """
    {"mlp": _mlp, "query-key": _query_key, "value-output": _value_output}[kind](block, seen, kept, ridge, result)


def _most(kind: str, block: DecoderBlock, seen: Moments, keep: float, ridge: float) -> Tensor:
    """The units of a block that matter most, as many as are to stay."""
    if kind == "query-key":
        return pairs(seen.queries, seen.keys, _count(keep, block.size // 2))
    if kind == "value-output":
        first = torch.arange(block.size) < _count(keep, block.size)
        return first.to(block.linear("self_attn.v_proj").weight.device).expand(block.shared, -1)
    scores = leverage(seen.neurons, ridge)
    kept = torch.zeros(len(scores), dtype=torch.bool, device=block.linear("mlp.down_proj").weight.device)
    kept[_largest(scores, _count(keep, len(kept)))] = True
    return kept


def leverage(moment: Tensor, ridge: float) -> Tensor:
    """``[C (C + l I)^-1]_ii = 1 - l [(C + l I)^-1]_ii`` with ``l = ridge * mean(diag C)``: (m, m) to (m,)."""
    damped, added = _damped(moment, ridge)
    return 1 - added * torch.cholesky_inverse(torch.linalg.cholesky(damped)).diagonal()


def refitted(weight: Tensor, moment: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """``W C[:, S] C[S, S]^-1``, ``C`` damped: the matrix (d, |S|) on the kept units that is nearest to ``W`` (d, m)."""
    damped, _ = _damped(moment, ridge)
    factor = torch.linalg.cholesky(damped[kept][:, kept])
    return torch.cholesky_solve(damped[kept] @ weight.double().t(), factor).t()


def pairs(queries: Tensor, keys: Tensor, count: int) -> Tensor:
    """The pairs of rotated dimensions to keep, for each key head.

    Parameters
    ----------
    queries, keys
        (heads, size) and (shared, size) mean squares; dimension ``i`` is rotated with ``i + size / 2``.

    Returns
    -------
    Tensor
        (shared, size) bools, ``2 * count`` of them true in every row.
    """
    scores = pair_scores(queries, keys)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, _largest(scores, count), True)
    return kept.repeat(1, 2)


def pair_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """What every pair of rotated dimensions adds to the scores of attention: (shared, size / 2)."""
    shared, size = keys.shape
    ours, theirs = (energy.view(len(energy), 2, size // 2).sum(1).sqrt() for energy in (queries, keys))
    return ours.view(shared, -1, size // 2).sum(1) * theirs


def value_bases(outputs: Tensor, moment: Tensor, rank: int, ridge: float) -> tuple[list[Tensor], Tensor]:
    """The replacements of the output matrices of heads that share values, and of the values.

    Parameters
    ----------
    outputs
        (d, group, size).
    moment
        (size, size) second moment of the values.

    Returns
    -------
    lefts, right
        One (d, rank) for each head of the group, and the (rank, size) by which values are multiplied; the rank is lower
        where the matrices have no more.
    """
    found, (width, group, _) = value_factors(outputs, moment, rank, ridge), outputs.shape
    left, right = found.left[:, :rank].double(), found.right[:rank].double()
    return list(left.view(group, width, -1)), right


def value_factors(outputs: Tensor, moment: Tensor, rank: int | None, ridge: float) -> Factors:
    """The decomposition behind :func:`value_bases`; its ``values`` say what each direction is worth."""
    return whitened(outputs.transpose(0, 1).flatten(0, 1), None, moment, rank, damping=ridge)


def _mlp(block: DecoderBlock, seen: Moments, kept: Tensor, ridge: float, result: Decomposition) -> None:
    gate, up, down = (block.linear(f"mlp.{name}_proj") for name in ("gate", "up", "down"))
    for name, linear in (("gate", gate), ("up", up)):
        _cut_rows(block, f"mlp.{name}_proj", linear.weight, linear.bias, kept, result)
    weight = refitted(down.weight, seen.neurons, kept, ridge).to(down.weight)
    result.forms[f"{block.name}.mlp.down_proj.weight"] = Trimmed(Dense(weight), _all(len(weight), kept), kept)


def _query_key(block: DecoderBlock, seen: Moments, kept: Tensor, ridge: float, result: Decomposition) -> None:
    for name, rows in (("q", kept.repeat_interleave(block.group, 0)), ("k", kept)):
        linear = block.linear(f"self_attn.{name}_proj")
        _cut_rows(block, f"self_attn.{name}_proj", linear.weight, linear.bias, rows.flatten(), result)


def _value_output(block: DecoderBlock, seen: Moments, kept: Tensor, ridge: float, result: Decomposition) -> None:
    value, output, name = block.linear("self_attn.v_proj"), block.linear("self_attn.o_proj"), f"{block.name}.self_attn"
    values = value.weight.double().view(block.shared, block.size, -1)
    outputs = output.weight.double().view(-1, block.shared, block.group, block.size)
    bias = values.new_zeros(block.shared, block.size)
    moved = torch.zeros_like(bias) if value.bias is None else value.bias.double().view_as(bias)
    if value.bias is not None and output.bias is not None:
        # Attention weights sum to one, so the bias of values passes through unchanged.
        constant = torch.einsum("dhgi,hi->d", outputs, moved)
        result.biases[f"{name}.o_proj.bias"] = (output.bias + constant).to(output.bias)
        moved = torch.zeros_like(bias)
    rows = torch.zeros_like(bias, dtype=torch.bool)
    first, second = [], []
    for head in range(block.shared):
        last = int(kept[head].nonzero().max()) + 1
        lefts, right = value_bases(outputs[:, head], seen.values[head], last, ridge)
        # The matrices may have no direction that is kept.
        rows[head] = kept[head] & (torch.arange(block.size).to(kept.device) < len(right))
        chosen = rows[head, : len(right)]
        bias[head, rows[head]] = (right @ moved[head])[chosen]
        first.append((right @ values[head])[chosen])
        second += [left[:, chosen] for left in lefts]
    columns = rows.repeat_interleave(block.group, 0).flatten()
    made = torch.cat(first).to(value.weight), torch.cat(second, 1).to(output.weight)
    result.forms[f"{name}.v_proj.weight"] = Trimmed(Dense(made[0]), rows.flatten(), _all(value.in_features, rows))
    result.forms[f"{name}.o_proj.weight"] = Trimmed(Dense(made[1]), _all(output.out_features, rows), columns)
    if value.bias is not None:
        result.biases[f"{name}.v_proj.bias"] = bias.flatten().to(value.bias)


def _cut_rows(
    block: DecoderBlock, path: str, weight: Tensor, bias: Tensor | None, kept: Tensor, result: Decomposition
) -> None:
    result.forms[f"{block.name}.{path}.weight"] = Trimmed(
        Dense(weight[kept].clone()), kept, _all(weight.shape[1], kept)
    )
    if bias is not None:
        result.biases[f"{block.name}.{path}.bias"] = bias * kept


def _count(keep: float, units: int) -> int:
    return max(1, round(keep * units))


def _all(count: int, like: Tensor) -> Tensor:
    return torch.ones(count, dtype=torch.bool, device=like.device)


def _largest(scores: Tensor, count: int) -> Tensor:
    """Indices of the largest scores; ties choose the first, on every machine."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _damped(moment: Tensor, ridge: float) -> tuple[Tensor, float]:
    """``C + l I`` in float64, and ``l``; a zero moment gets a diagonal too."""
    added = ridge * float(moment.diagonal().mean()) or 1e-12
    moment = moment.double()
    return moment + added * torch.eye(len(moment)).to(moment), added
