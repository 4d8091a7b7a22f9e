"""What calibration sees: objectives, watches, curvature, models whole or block by block."""
