"""Messages of gRPC services that no dependency brings: see open_inference.proto."""
