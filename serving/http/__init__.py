"""The HTTP server: uvicorn on a socket of ours, with a WSGI application behind greenlets. Knows nothing of Flask."""
