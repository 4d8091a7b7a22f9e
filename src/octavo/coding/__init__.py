"""Lossless storage of integer tensors, one self-describing blob of bytes each."""

from octavo.coding.allowance import Allowance
from octavo.coding.container import Header
from octavo.coding.decoder import decode, describe
from octavo.coding.encoder import encode
from octavo.coding.parities import ParityContext

__all__ = ["Allowance", "Header", "ParityContext", "decode", "describe", "encode"]
