"""Access control of both entry points, HTTP and gRPC: tokens, rate limit, trusted proxies, CORS."""
