"""TensorFlow Serving's gRPC API: PredictionService, ModelService, health and reflection."""
