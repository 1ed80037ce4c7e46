"""The HTTP API: a Flask app, and one package for each protocol."""
