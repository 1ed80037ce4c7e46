"""Programs that measure: each prints figures of docs/benchmarks.md."""
