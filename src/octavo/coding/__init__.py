"""Lossless storage of integer tensors, one self-describing blob of bytes each."""

from octavo.coding.container import Header
from octavo.coding.decoder import decode, describe
from octavo.coding.encoder import encode

__all__ = ["Header", "decode", "describe", "encode"]
