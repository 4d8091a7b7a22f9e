"""Exporting models to files for onnxruntime."""
