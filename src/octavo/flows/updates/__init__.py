"""Codecs of updates: gradients, differences of weights, what workers send to each other."""

from octavo.flows.updates.base import UpdateCodec, UpdateState

__all__ = ["UpdateCodec", "UpdateState"]
