"""Serves exported SavedModels over HTTP. Knows nothing of how they were trained."""
