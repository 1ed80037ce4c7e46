"""The Open Inference Protocol without its wire formats: what its HTTP and its gRPC form have in common."""
