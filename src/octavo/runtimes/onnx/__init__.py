"""Models as files of onnxruntime."""
