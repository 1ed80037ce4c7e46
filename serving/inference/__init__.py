"""The models: loading, versions, batching and calls. Knows no protocol."""
