"""The web page: templates, scripts and styles."""
