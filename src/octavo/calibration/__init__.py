"""Calibration: objectives, watches, curvature, and models run whole or block by block."""
