"""Calibration: objectives, watches, curvature, and models run whole or block by block."""

from octavo.calibration.influences import Influence, influence

__all__ = ["Influence", "influence"]
