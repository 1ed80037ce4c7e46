"""The gRPC services: TensorFlow Serving's and the Open Inference Protocol's, health and reflection."""
