"""Prometheus metrics of requests, model calls, models and the process; also under TensorFlow Serving's names."""

from serving.metrics.page import CONTENT_TYPE, Metrics

__all__ = ["CONTENT_TYPE", "Metrics"]
