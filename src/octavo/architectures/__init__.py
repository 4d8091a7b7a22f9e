"""Modules that are small or cheap by design: nothing of them has to be compressed afterwards."""

from octavo.architectures.linformer import LinformerAttention, SequenceClassifier

__all__ = ["LinformerAttention", "SequenceClassifier"]
