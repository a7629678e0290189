"""A finished run becomes a model folder, an ONNX file and a card."""
