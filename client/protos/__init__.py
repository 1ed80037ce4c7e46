"""Messages of TensorFlow Serving's gRPC API, without TensorFlow: see prediction.proto."""
