"""Tuned models as deltas on one base: merged into one model, or served in turn."""
