"""Conversion of exported models for other runtimes: ONNX and LiteRT."""
