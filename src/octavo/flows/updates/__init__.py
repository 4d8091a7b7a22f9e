"""Codecs of updates: gradients, differences of weights, what workers send to each other."""

from octavo.flows.updates.base import UpdateCodec, UpdateState
from octavo.flows.updates.ddp import CompressedGradients, compress_ddp

__all__ = ["CompressedGradients", "UpdateCodec", "UpdateState", "compress_ddp"]
