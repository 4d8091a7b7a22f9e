"""Modules that are small or cheap by design: nothing of them has to be compressed afterwards."""

from octavo.architectures.deep_hash import DeepHash
from octavo.architectures.linformer import LinformerAttention, SequenceClassifier

__all__ = ["DeepHash", "LinformerAttention", "SequenceClassifier"]
