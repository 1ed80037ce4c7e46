"""Several processes that serve the same models on the same ports, and their supervisor. See docs/workers.md."""
