"""Relations between tokens inside self-attention, as MiniLM compares them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.training.teaching.terms import TensorPair, Term

#: Attention itself, and the relations of values.
ATTENTION, VALUES = ("query", "key"), ("value", "value")
#: How transformers' architectures name the three projections, and the one that computes all side by side.
_NAMES = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"))
_ALL_IN_ONE = ("c_attn", "Wqkv", "qkv")
_PARTS = ("query", "key", "value")


@dataclass(frozen=True)
class Projections:
    """Names of the modules that compute queries, keys and values of one self-attention.

    If all three are one module, its output is the three of them side by side.
    """

    query: str
    key: str
    value: str

    @property
    def modules(self) -> tuple[str, str, str]:
        """The three names in order."""
        return (self.query, self.key, self.value)


def projections(model: nn.Module) -> list[Projections]:
    """The projections of all self-attention layers, in the model's order.

    They are found by the names that architectures of ``transformers`` use. Other models state theirs as
    :class:`Projections`.
    """
    found = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        prefix = f"{name}." if name else ""
        for names in (*_NAMES, *((one,) * 3 for one in _ALL_IN_ONE)):
            if all(one in children for one in names):
                found.append(Projections(*(prefix + one for one in names)))
                break
    return found


def relation(left: Tensor, right: Tensor, heads: int, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Logarithms of ``softmax(left right^T / sqrt(width of a head))``.

    With queries and keys, and as many heads as the model has, it is its attention before dropout.

    Parameters
    ----------
    left, right
        (sequences, tokens, width): the heads' parts side by side.
    heads
        Into how many parts the width is divided, whatever heads the model has.
    mask
        (sequences, tokens), zero for padding. It gets no share, and the others' shares sum to one.
    causal
        Whether tokens see only themselves and those before.

    Returns
    -------
    torch.Tensor
        (sequences, heads, tokens, tokens), float32; the least number where there is no share.
    """
    if left.ndim != 3 or left.shape != right.shape:
        raise RequestError(
            f"relations: shapes are {tuple(left.shape)} and {tuple(right.shape)}; both must be (sequences, tokens, one "
            "width). With grouped queries compare queries with queries: pairs=(('query', 'query'), ('value', 'value'))"
        )
    width = left.shape[-1]
    if heads < 1 or width % heads:
        raise RequestError(f"relations: a width of {width} cannot be split into {heads} heads; choose a divisor of it")
    one, other = (part.float().unflatten(-1, (heads, -1)).transpose(1, 2) for part in (left, right))
    scores = one @ other.transpose(-1, -2) / (width // heads) ** 0.5
    # Not minus infinity: padding that comes first sees nothing before it, and must not make NaN.
    least = torch.finfo(scores.dtype).min
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None, :] == 0, least)
    if causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(ones.triu(1), least)
    return scores.log_softmax(-1)


def relation_divergence(theirs: Tensor, ours: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of two results of :func:`relation`, averaged over heads and real tokens."""
    each = (theirs.exp() * (theirs - ours)).sum(-1).mean(1)
    if mask is None:
        return each.mean()
    return (each * mask).sum() / mask.sum()


@dataclass(frozen=True)
class Relations(Term):
    """The relations between tokens in one self-attention layer of each model (MiniLM, Wang et al., 2020).

    ``KL(A_T || A_S)`` of attention ``softmax(Q K^T / sqrt d)``, plus the same of ``softmax(V V^T / sqrt d)``. Both are
    averaged over heads and tokens, and padding is left out. Widths and heads of the models may differ, since queries,
    keys and values are split into ``heads`` equal parts. They are read where they are projected; a rotation by position
    or a normalization after that is not seen.

    Parameters
    ----------
    heads
        Relation heads: a divisor of both models' widths. With the heads of the models, this is MiniLM.
    teacher, student
        Which self-attention layer: its index, negative ones from the end, or the names of its projections. The paper
        takes the last; in deep teachers an upper middle one may be better (MiniLMv2, Wang et al., 2021).
    related
        What is related with what. MiniLMv2 takes (query, query), (key, key) and (value, value).
    causal
        Whether tokens see only those before, as in decoders.
    """

    heads: int
    teacher: int | Projections = -1
    student: int | Projections = -1
    related: tuple[tuple[str, str], ...] = (ATTENTION, VALUES)
    causal: bool = False

    def __post_init__(self) -> None:
        for pair in self.related:
            if len(pair) != 2 or not set(pair) <= set(_PARTS):
                raise RequestError(f"relations: {pair!r} names no two of {', '.join(_PARTS)}; choose from these")
        if not self.related:
            raise RequestError("relations: nothing is related; give pairs such as ('value', 'value')")

    def pairs(self, teacher: nn.Module, student: nn.Module) -> list[tuple[str, str]]:
        """Queries, keys and values of both models."""
        theirs, ours = _chosen(teacher, self.teacher), _chosen(student, self.student)
        return list(zip(theirs.modules, ours.modules, strict=True))

    def value(self, pairs: Sequence[TensorPair], mask: Tensor | None) -> Tensor:
        """The sum of the divergences."""
        theirs, ours = (_parts([pair[side] for pair in pairs]) for side in (0, 1))
        total = theirs["query"].new_zeros(())
        for left, right in self.related:
            if theirs[left].shape[:2] != ours[left].shape[:2]:
                raise RequestError(
                    f"relations: the teacher has (sequences, tokens) {tuple(theirs[left].shape[:2])} and the student "
                    f"{tuple(ours[left].shape[:2])}; both must read the same tokens"
                )
            logs = [relation(part[left], part[right], self.heads, mask, self.causal) for part in (theirs, ours)]
            total = total + relation_divergence(logs[0], logs[1], mask)
        return total


def _parts(outputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values; a module that computed all gave the same output three times."""
    if outputs[0] is outputs[1]:
        outputs = outputs[0].chunk(3, -1)
    return dict(zip(_PARTS, outputs, strict=True))


def _chosen(model: nn.Module, layer: int | Projections) -> Projections:
    if isinstance(layer, Projections):
        return layer
    found = projections(model)
    if not -len(found) <= layer < len(found):
        raise RequestError(
            f"{type(model).__name__}: has {len(found)} self-attention layers with known projections, so there is no "
            f"layer {layer}; choose one of them, or name its modules as octavo.training.teaching.Projections"
        )
    return found[layer]
