"""The page, its scripts and styles."""
